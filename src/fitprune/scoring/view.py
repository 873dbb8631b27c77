"""What a scorer may look at: one place of a running prefill where tokens leave. What costs is computed when asked for.

Shapes: B batch, Q columns of the prompt (the past excluded), m rows present, d hidden size, H query heads, G key/value
heads, D head size, P keys of the past.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable

import torch

from fitprune.scoring.by_head import head_attention
from fitprune.scoring.received import Attention, ReceivedAttention, received_attention


@dataclasses.dataclass
class Prompt:
    """The whole prefill that layers are views of.

    Attributes:
        ids: [B, Q] int64; None where the call gave embeddings.
        valid: [B, Q] bool, False at padding, and at what is no prompt: a draft, a given answer.
        vision: gives [B, Q], the attention that the vision tower's [CLS] token pays to each visual token; 0 for text.
        images: [B, Q] int64, number of the image that each column belongs to, -1 for text and padding.
        norm: the decoder's final norm.
        received: [B, Q] fp32, cross attention that each token received in all layers so far, mean over heads; kept for
            scorers that ask for it, None for others.
    """

    ids: torch.Tensor | None
    valid: torch.Tensor
    vision: Callable[[], torch.Tensor]
    images: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    received: torch.Tensor | None = None

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """[B, Q] place of each column in its own sample's prompt, from 0, whatever the padding."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    def accumulate(self, view: LayerView) -> None:
        """Add to `received` what a layer's visual tokens receive."""
        seen = view.by_head("mean")["mean"].mean(1)
        if self.received is None:
            self.received = seen.new_zeros(view.image.shape[0], self.valid.shape[1])
        self.received = self.received.to(seen.device).scatter_add(1, view.column.clamp(min=0), seen)

    @functools.cached_property
    def numbers(self) -> list[int]:
        """For each sample a number that its prompt's ids alone decide, for scorers that draw at random.

        Raises:
            ValueError: the call gave embeddings instead of ids.
        """
        if self.ids is None:
            raise ValueError(
                "scorer 'random' tells samples apart by input_ids, but inputs_embeds are given: pass input_ids"
            )
        rows = zip(self.ids.cpu(), self.valid.cpu(), strict=True)
        return [zlib.crc32(ids[valid].numpy().tobytes()) for ids, valid in rows]

    @functools.cached_property
    def cls_attention(self) -> torch.Tensor:
        """[B, Q] attention that the vision tower's [CLS] token pays to each visual token; 0 for text."""
        return self.vision()


@dataclasses.dataclass
class LayerView:
    """One place where tokens leave: inside a layer, after its attention, or before it.

    Attributes:
        layer: number of the decoder layer.
        before: whether the tokens leave before the layer instead of inside it.
        image: [B, m] int64, number of the image that each row belongs to, -1 for text and padding.
        question: [B, m] bool, rows of the question; none where the scorer reads no question.
        column: [B, m] int64, column of each row in the prompt; -1 at padding.
        hidden: [B, m, d], the layer's input; before the first layer, the embeddings.
        prompt: the whole prefill.
        attention: gives the layer's queries and keys; before the layer they are computed ahead, without the past.
        previous: the view inside the layer before, where tokens leave before this one and it had the same rows.
        group: [B, m] int64, as `image`, but all images of a sample are one where they compete with each other.
        left: [B, groups] int64, tokens that each group is to keep.
    """

    layer: int
    before: bool
    image: torch.Tensor
    question: torch.Tensor
    column: torch.Tensor
    hidden: torch.Tensor
    prompt: Prompt
    attention: Callable[[], Attention]
    previous: LayerView | None = None
    group: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    left: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _by_head: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def states(self) -> Attention:
        """The layer's queries and keys."""
        return self.attention()

    @functools.cached_property
    def received(self) -> ReceivedAttention:
        """Attention that the visual tokens receive in this layer, maximum over heads."""
        at = self.states
        return received_attention(at.query, at.key, self.image, self.question, at.softmax, at.lse)

    @property
    def self_attention(self) -> torch.Tensor:
        """[B, m] received self attention; see `ReceivedAttention`."""
        return self.received.self_attention

    @property
    def cross_attention(self) -> torch.Tensor:
        """[B, m] received cross attention; see `ReceivedAttention`."""
        return self.received.cross_attention

    def by_head(self, *kinds: str) -> dict[str, torch.Tensor]:
        """Attention that the visual tokens receive from each head: kind -> [B, H, m]; see `head_attention`."""
        missing = [kind for kind in kinds if kind not in self._by_head]
        if missing:
            at = self.states
            self._by_head |= head_attention(at.query, at.key, self.image, self.question, at.softmax, missing)
        return {kind: self._by_head[kind] for kind in kinds}

    @functools.cached_property
    def last_attention(self) -> torch.Tensor:
        """[B, m] attention that the question's last row pays to each visual token, mean over heads."""
        return self.by_head("last")["last"].mean(1)

    @property
    def value_norms(self) -> torch.Tensor:
        """[B, H, m] Euclidean norm of each row's value, as each query head sees it."""
        at = self.states
        norms: torch.Tensor = at.value[:, :, at.value.shape[2] - self.image.shape[1] :].float().norm(dim=-1)
        return norms.repeat_interleave(at.query.shape[1] // norms.shape[1], 1)

    @property
    def keys(self) -> torch.Tensor:
        """[B, m, G * D] keys of the rows present, after rotary embedding, heads joined."""
        key = self.states.key
        return key[:, :, key.shape[2] - self.image.shape[1] :].transpose(1, 2).flatten(2)

    @property
    def place(self) -> torch.Tensor:
        """[B, m] place of each row in its own sample's prompt, from 0, whatever the padding."""
        return self._at_columns(self.prompt.places)

    @property
    def cls_attention(self) -> torch.Tensor:
        """[B, m] attention that the vision tower's [CLS] token pays to each visual token, mean over heads."""
        return self._at_columns(self.prompt.cls_attention)

    def _at_columns(self, values: torch.Tensor) -> torch.Tensor:
        """Take each row's value of [B, Q]; what padding gets means nothing."""
        return values.to(self.column.device).gather(1, self.column.clamp(min=0))
