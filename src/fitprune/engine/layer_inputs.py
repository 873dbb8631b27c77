"""What a layer of a pruned model gets besides its input: masks and positions of the tokens that are present.

A layer's own mask of rows and keys is cut to those present, whatever it hides or shows (windows, later tokens of an
image). Where the attention implementation has no such mask, one is made by transformers' own function.

Shapes: B batch, P columns of the past, Q columns of this call, m rows present at a layer (Q until tokens leave), d
hidden size, `keys` keys present.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fitprune._support import host
from fitprune.engine.arguments import Call
from fitprune.engine.cache import PrunedLayer
from fitprune.engine.masks import cut_mask, mask_of_rows, require_plain_mask
from fitprune.engine.rows import take_positions
from fitprune.families.adapter import AdaptedModel


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What layers share that see the same rows and hold the same columns of the past.

    Attributes:
        replaced: keyword arguments of the layer.
        keys_valid: as in `LayerInputs`.
        expected: arguments of `PrunedLayer.expect`.
    """

    replaced: dict[str, Any]
    keys_valid: torch.Tensor | None
    expected: tuple[torch.Tensor, int, bool]


class LayerInputs:
    """Makes the arguments of each layer in one call of the model.

    Args:
        adapted: the model.
        call: the call.

    Attributes:
        adapted: the model.
        call: the call.
        keys_valid: [B, keys] bool, False at keys of the present layer that are padding; None where there is none.
    """

    def __init__(self, adapted: AdaptedModel, call: Call) -> None:
        self.adapted = adapted
        self.call = call
        self.keys_valid: torch.Tensor | None = None
        self._config = adapted.decoder.config
        # By the identity of what they are made of, which is kept beside them so that no other tensor gets its id.
        self._cached: dict[tuple[int, ...], tuple[Any, _Inputs]] = {}

    def rows_have_left(self) -> None:
        """Make the inputs of later layers again, for the rows that are still present."""
        self._cached.clear()

    def of(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any], kept: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Cut a layer's positions and mask to the rows present and the keys in its cache.

        Args:
            number: the layer's.
            hidden: [B, m, d], its input.
            kwargs: its keyword arguments in the dense model.
            kept: [B, m] columns, within this call, of the rows present, -1 at padding; None if no row has left.

        Returns:
            The keyword arguments to call it with.

        Raises:
            ValueError: no mask can be made for the attention implementation.
        """
        cache = host.cache_of(self.adapted.layers[number], kwargs)
        layer = None if cache is None else cache.layers[number]
        layer = layer if isinstance(layer, PrunedLayer) else None
        columns = None if layer is None else layer.columns
        if kept is None and columns is None:
            self.keys_valid = self.call.valid
            return kwargs
        mask, embeddings = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        sources = (columns, mask, embeddings, self.adapted.attentions[number] is None)
        key = tuple(id(source) for source in sources)
        if key not in self._cached:
            self._cached[key] = (sources, self._make(number, layer or PrunedLayer(), hidden, kwargs, kept))
        inputs = self._cached[key][1]
        self.keys_valid = inputs.keys_valid
        if layer is not None:
            layer.expect(*inputs.expected)
        return {**kwargs, **inputs.replaced}

    def _make(
        self, number: int, layer: PrunedLayer, hidden: torch.Tensor, kwargs: dict[str, Any], kept: torch.Tensor | None
    ) -> _Inputs:
        """Choose the case, by the layer's attention and mask, and by the rows present."""
        kept = None if kept is None else kept.to(hidden.device)
        if self.adapted.attentions[number] is None:
            assert kept is not None
            return self._without_attention(kwargs, kept)
        whole = mask_of_rows(kwargs.get("attention_mask"))
        if whole is None:
            require_plain_mask(self.adapted, number, kwargs.get("attention_mask"), self.call.total)
        if kept is None and hidden.shape[1] == 1 and self.adapted.windows[number] is None:
            return self._one_token(layer, hidden)
        columns, expected = self._columns(layer, hidden, kept)
        positions = {} if kept is None else self._positions(kwargs, kept)
        if whole is not None:
            self._require_whole_mask(number, whole)
            return _Inputs({**positions, "attention_mask": cut_mask(whole, kept, columns)}, None, expected)
        mask, keys_valid = self._new_mask(columns, hidden)
        return _Inputs({**positions, "attention_mask": mask}, keys_valid, expected)

    def _without_attention(self, kwargs: dict[str, Any], kept: torch.Tensor) -> _Inputs:
        """A layer that runs over the rows in order: padding must not change its state."""
        valid = kept >= 0
        mask = None if bool(valid.all()) else valid
        return _Inputs({**self._positions(kwargs, kept), "attention_mask": mask}, None, (kept, 0, False))

    def _one_token(self, layer: PrunedLayer, hidden: torch.Tensor) -> _Inputs:
        """A step of decoding that sees all keys but padding, with as few operations as possible."""
        assert layer.columns is not None
        expected = (layer.columns, layer.covered, layer.padded)
        if self.call.valid is None and not layer.padded:  # nothing is hidden
            return _Inputs({"attention_mask": None}, None, expected)
        recorded = layer.columns >= 0
        if self.call.valid is None:
            tail = recorded.new_ones(len(recorded), self.call.total - layer.covered)
        else:
            valid = self.call.valid.to(recorded.device)
            recorded = recorded & valid.gather(1, layer.columns.clamp(min=0))
            tail = valid[:, layer.covered :]
        present = torch.cat([recorded, tail], 1)
        if host.attention_implementation(self._config) == "sdpa":
            return _Inputs({"attention_mask": present[:, None, None]}, present, expected)
        return _Inputs({"attention_mask": host.causal_mask(present, hidden, self._config)}, present, expected)

    def _columns(
        self, layer: PrunedLayer, hidden: torch.Tensor, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, int, bool]]:
        """The columns of all keys that a layer will hold, [B, keys], and what its cache is to expect."""
        batch, past, total = len(hidden), self.call.past, self.call.total
        if kept is not None:
            new = torch.where(kept < 0, -1, kept + past)
        else:
            new = torch.arange(past, total, device=hidden.device).expand(batch, -1)
        columns = torch.cat([layer.all_columns(past, batch, hidden.device), new], 1)
        if kept is None and layer.columns is not None:
            return columns, (layer.columns, layer.covered, layer.padded)
        return columns, (columns, total, not bool((columns >= 0).all()))

    def _require_whole_mask(self, number: int, mask: torch.Tensor) -> None:
        if mask.shape[-1] != self.call.total:
            raise ValueError(
                f"layer {number}'s attention mask covers {mask.shape[-1]} keys: must cover the sequence's "
                f"{self.call.total}; use a DynamicCache"
            )

    def _new_mask(self, columns: torch.Tensor, hidden: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """A causal mask for keys of these columns [B, keys], and `keys_valid`."""
        present = columns >= 0
        if self.call.valid is not None:
            present = present & self.call.valid.to(present.device).expand(len(hidden), -1).gather(
                1, columns.clamp(min=0)
            )
        everything = bool(present.all())
        square = present.shape[1] == hidden.shape[1]
        if everything and square and host.attention_implementation(self._config) == "sdpa":
            return None, None  # what transformers' function returns too, after many small operations
        return host.causal_mask(present, hidden, self._config), None if everything else present

    def _positions(self, kwargs: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
        """Cut position embeddings and position ids to the rows [B, m].

        FlashAttention takes gaps in the ids for the beginnings of packed sequences: beside embeddings it gets no ids.
        """
        kept = kept.clamp(min=0)
        embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        cut: dict[str, Any] = {}
        if isinstance(embeddings, tuple):
            cut["position_embeddings"] = tuple(take_positions(part, kept) for part in embeddings)
        elif embeddings is not None:
            cut["position_embeddings"] = take_positions(embeddings, kept)
        if ids is not None:
            drop = embeddings is not None and "flash" in host.attention_implementation(self._config)
            cut["position_ids"] = None if drop else take_positions(ids[..., None], kept)[..., 0]
        return cut

    def ahead(
        self, number: int, kwargs: dict[str, Any], kept: torch.Tensor, packed: bool
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Make the arguments by which a layer's queries and keys are computed before it runs; the past is left out.

        Args:
            number: the layer's.
            kwargs: its keyword arguments in the dense model.
            kept: [B, m], as for `of`.
            packed: whether rows have left.

        Returns:
            The keyword arguments, and [B, m] bool, False at rows that are padding; None where there is none, or where
            the mask hides it.
        """
        whole = mask_of_rows(kwargs.get("attention_mask"))
        cut = host.without_cache(self.adapted.layers[number], kwargs)
        if packed:
            cut |= self._positions(cut, kept)
        if whole is not None:
            cut["attention_mask"] = cut_mask(whole, kept, torch.where(kept < 0, -1, kept + self.call.past))
            return cut, None
        cut["attention_mask"] = None
        present = kept >= 0
        if self.call.own_valid is not None:
            present = present & self.call.own_valid.to(kept.device).gather(1, kept.clamp(min=0))
        return cut, None if bool(present.all()) else present
