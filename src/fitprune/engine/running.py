"""A running call of a pruned model, layer by layer: a prefill, from which tokens leave, or a step that follows one.

Shapes: B batch, Q columns of this call, m rows present at a layer (Q until tokens leave), m' rows that stay, d hidden
size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from fitprune._support import host
from fitprune.engine.cache import PrunedLayer
from fitprune.engine.kept import Prefill
from fitprune.engine.layer_inputs import LayerInputs
from fitprune.engine.rows import pack, take, to_columns, untake
from fitprune.scoring.received import Attention
from fitprune.scoring.view import LayerView, Prompt

# From a view to the rows that stay, [B, m] bool; None where nothing leaves.
Choose = Callable[[LayerView], "torch.Tensor | None"]


@dataclasses.dataclass(frozen=True)
class RunningStep:
    """A call that goes on with a pruned cache and has no images: nothing leaves.

    Attributes:
        inputs: what its layers get.
    """

    inputs: LayerInputs

    def sees_every_key(self, cache: Any, mask: Any) -> bool:
        """Whether one token is decoded that sees every key in the cache, so that layers run as in the dense model."""
        call = self.inputs.call
        plain = call.length == 1 and call.valid is None and mask is None and cache is not None
        return plain and all(layer.shows_all for layer in cache.layers if isinstance(layer, PrunedLayer))

    def before_layer(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cut a layer's arguments to the keys in its cache."""
        return hidden, self.inputs.of(number, hidden, kwargs)

    def after_layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """After the last layer, let padding repeat the token before it; see `to_columns`."""
        if number < len(self.inputs.adapted.layers) - 1:
            return hidden
        return to_columns(hidden, None, self.inputs.call.own_valid, self.inputs.call.length)


@dataclasses.dataclass
class RunningPrefill:
    """A call with images: tokens leave before a layer, or inside it after its attention.

    Attributes:
        inputs: what its layers get.
        choose: says which rows stay.
        prompt: the whole prefill, for scorers.
        kept: [B, m] columns, within this call, of the rows present; -1 at padding.
        image: [B, m] number of the image of each row present; -1 for text and padding.
        question: [B, m] bool, rows whose attention is cross.
        rope_offset: [B, P + Q], how far multimodal rotary positions after each column are from it; see `rotary`. None
            where the cache's own offset stays.
        stop: ends the forward that computes a layer's queries and keys ahead, while one runs.
    """

    inputs: LayerInputs
    choose: Choose
    prompt: Prompt
    kept: torch.Tensor
    image: torch.Tensor
    question: torch.Tensor
    rope_offset: torch.Tensor | None = None
    stop: Callable[[Attention], NoReturn] | None = None
    _packed: bool = False  # whether rows have left
    _hidden: torch.Tensor | None = None  # the present layer's input
    _previous: LayerView | None = None  # the view inside the layer before; None once rows have left after it
    # Between a layer's attention and its end: the rows that stay [B, m'], shorter samples filled up on the left with
    # some that leave, and their columns.
    _leaving: tuple[torch.Tensor, torch.Tensor] | None = None
    _entered: list[torch.Tensor] = dataclasses.field(default_factory=list)  # `kept` before each layer so far
    _after: list[torch.Tensor] = dataclasses.field(default_factory=list)  # and after it

    @property
    def record(self) -> Prefill:
        """What it kept, after its last layer."""
        return Prefill(self._entered, self._after, self.prompt.images)

    def before_layer(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Let tokens leave before a layer, and cut its arguments to those that are present."""
        self._hidden = hidden
        if self.inputs.adapted.attentions[number] is not None:
            self._choose(number, True, hidden.device, lambda: self._attention_ahead(number, hidden, kwargs))
            self._hidden = hidden = self._drop(hidden)
            self._previous = None
        self._entered.append(self.kept)
        return hidden, self.inputs.of(number, hidden, kwargs, self.kept if self._packed else None)

    def _attention_ahead(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Attention:
        """Compute the queries and keys that a layer would have if no token left before it; the past is left out."""
        arguments, valid = self.inputs.ahead(number, kwargs, self.kept.to(hidden.device), self._packed)

        def run(stop: Callable[[Attention], NoReturn]) -> None:
            self.stop = stop
            try:
                with torch.no_grad():  # the layer's own forward, without the hooks around it: it knows its norms
                    self.inputs.adapted.layers[number].forward(hidden, **arguments)
            finally:
                self.stop = None

        attention: Attention = host.run_until_stopped(run)
        if valid is None:
            return attention
        return dataclasses.replace(attention, softmax=dataclasses.replace(attention.softmax, valid=valid))

    def after_attention(self, number: int, attention: Attention) -> None:
        """Choose, from the layer's own queries and keys, the tokens that leave at its end."""
        device, valid = attention.query.device, self.inputs.keys_valid
        softmax = dataclasses.replace(attention.softmax, valid=None if valid is None else valid.to(device))
        attention = dataclasses.replace(attention, softmax=softmax)
        self._previous = self._choose(number, False, device, lambda: attention)

    def _choose(self, number: int, before: bool, device: torch.device, attention: Callable[[], Attention]) -> LayerView:
        """Show a place to what chooses, and note which rows leave there."""
        assert self._hidden is not None
        view = LayerView(
            layer=number,
            before=before,
            image=self.image.to(device),
            question=self.question.to(device),
            column=self.kept.to(device),
            hidden=self._hidden.to(device),
            prompt=self.prompt,
            attention=attention,
            previous=self._previous if before else None,
        )
        stays = self.choose(view)
        if stays is not None:
            present = (self.kept >= 0).to(stays.device)
            if bool((present & ~stays).any()):
                self._leaving = pack(self.kept, stays & present)
        return view

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Take the rows that stay, if some leave: [B, m, d] -> [B, m', d].

        Args:
            hidden: the MLP's input.

        Raises:
            ValueError: the MLP does not see the layer's rows.
        """
        if self._leaving is None:
            return hidden
        if hidden.shape[:2] != self.kept.shape:
            raise ValueError(
                f"a layer's MLP gets {list(hidden.shape)} where {list(self.kept.shape)} rows are present: the decoder "
                "is not of the common shape, and cannot be pruned"
            )
        return take(hidden, self._leaving[0])

    def after_mlp(self, output: Any) -> Any:
        """Give an MLP's output the residual's rows: [B, m', d] -> [B, m, d], any value where a token leaves.

        Args:
            output: the MLP's; a tuple if experts return their routing too.

        Raises:
            ValueError: the output is not one row for each row of the input.
        """
        if self._leaving is None:
            return output
        if isinstance(output, tuple):  # experts may return their routing too
            return (self.after_mlp(output[0]), *output[1:])
        index, _ = self._leaving
        if output.ndim != 3:
            raise ValueError(
                f"a layer's MLP returns {list(output.shape)} for rows {list(index.shape)}: the decoder is not of the "
                "common shape, and cannot be pruned"
            )
        return untake(output, index, self.kept.shape[1])

    def after_layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Drop the rows that leave; after the last layer, put the others back into their columns."""
        hidden = self._drop(hidden)
        self._hidden = None
        self._after.append(self.kept)
        if number < len(self.inputs.adapted.layers) - 1:
            return hidden
        call = self.inputs.call
        return to_columns(hidden, self.kept if self._packed else None, call.own_valid, call.length)

    def _drop(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop the rows that leave, if any: [B, m, d] -> [B, m', d]."""
        if self._leaving is None:
            return hidden
        (index, self.kept), self._leaving = self._leaving, None
        hidden = take(hidden, index)
        index = index.to(self.image.device)
        self.image = self.image.gather(1, index).masked_fill(self.kept.to(index.device) < 0, -1)
        self.question = self.question.gather(1, index)
        self._packed = True
        self._previous = None
        self.inputs.rows_have_left()
        return hidden
