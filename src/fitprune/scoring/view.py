"""What a scorer may look at: one place in a running prefill where tokens may leave. Costly values are computed lazily.

Shapes: B batch, Q columns of the prompt (the past excluded), m rows present, d hidden size, H query heads, G key/value
heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable

import torch

from fitprune.scoring.by_head import HEAD_KINDS, head_attention
from fitprune.scoring.received import Attention, ReceivedAttention, received_attention


@dataclasses.dataclass(frozen=True)
class Quotas:
    """How many visual tokens each image of a prefill may keep, at each place where tokens may leave.

    The places of layer l are 2 * l, before the layer, and 2 * l + 1, inside it.

    Attributes:
        counts: [2 * layers + 1, B, images] int64, tokens in the prompt, then after each place.
        pool_images: whether the images of a sample share one count and compete for it: then they are one group.
    """

    counts: torch.Tensor
    pool_images: bool = False

    @functools.cached_property
    def last(self) -> int:
        """The last place where tokens leave; -1 if none do."""
        pairs = zip(self.counts[:-1], self.counts[1:], strict=True)
        return max((place for place, (now, after) in enumerate(pairs) if not torch.equal(now, after)), default=-1)

    def group(self, image: torch.Tensor) -> torch.Tensor:
        """Number the group that each token belongs to, by the number of its image; -1 stays."""
        return image.clamp(max=0) if self.pool_images else image


@dataclasses.dataclass
class Prompt:
    """The whole prefill that the layers are views of.

    Attributes:
        ids: [B, Q] int64; None where the call has embeddings in their place.
        valid: [B, Q] bool, False at padding and at what is not prompt: a draft, an answer that labels hold.
        vision: returns [B, Q], the attention that the vision tower's [CLS] token pays to each visual token; 0 for text.
        images: [B, Q] int64, number of the image that each column belongs to; -1 for text and padding.
        norm: the decoder's final norm.
        quotas: how many tokens each image may keep; None where what leaves is not chosen by number.
    """

    ids: torch.Tensor | None
    valid: torch.Tensor
    vision: Callable[[], torch.Tensor]
    images: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    quotas: Quotas | None = None
    _received: torch.Tensor | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """[B, Q] position of each column in its own sample's prompt, from 0, padding not counted."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    @property
    def received(self) -> torch.Tensor:
        """[B, Q] fp32, cross attention that each token received in all layers so far, mean over heads.

        Raises:
            ValueError: no layer has run yet.
        """
        if self._received is None:
            raise ValueError("no layer has run before layer 0: with 'accumulated', remove inside it or later")
        return self._received

    def accumulate(self, view: LayerView) -> None:
        """Add what the visual tokens receive in a layer to `received`."""
        attention = view.by_head("mean")["mean"].mean(1)
        total = self._received
        if total is None:
            total = attention.new_zeros(view.image.shape[0], self.valid.shape[1])
        self._received = total.to(attention.device).scatter_add(1, view.column.clamp(min=0), attention)

    @functools.cached_property
    def numbers(self) -> list[int]:
        """For each sample a number that depends on its prompt's ids alone, for scorers that draw at random.

        Raises:
            ValueError: the call has embeddings instead of ids.
        """
        if self.ids is None:
            raise ValueError(
                "scorer 'random' tells samples apart by input_ids, and the call has inputs_embeds: pass input_ids"
            )
        rows = zip(self.ids.cpu(), self.valid.cpu(), strict=True)
        return [zlib.crc32(ids[valid].numpy().tobytes()) for ids, valid in rows]

    @functools.cached_property
    def cls_attention(self) -> torch.Tensor:
        """[B, Q] attention that the vision tower's [CLS] token pays to each visual token; 0 for text."""
        return self.vision()


@dataclasses.dataclass
class LayerView:
    """One place where tokens may leave: inside a layer, after its attention, or before it.

    Attributes:
        layer: number of the decoder layer.
        before: whether the tokens leave before the layer instead of inside it.
        image: [B, m] int64, number of the image that each row belongs to; -1 for text and padding.
        question: [B, m] bool, rows of the question; all False where the scorer reads no question.
        column: [B, m] int64, column of each row in the prompt; -1 at padding.
        hidden: [B, m, d], the layer's input; before the first layer, the embeddings.
        prompt: the whole prefill.
        attention: returns the layer's queries and keys; before the layer they are computed ahead, without the past.
        previous: before a layer, the view inside the layer before it; None if rows have left since.
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
    _by_head: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def number(self) -> int:
        """Number of this place among all places of the decoder; see `Quotas`."""
        return 2 * self.layer + (0 if self.before else 1)

    @property
    def quotas(self) -> Quotas:
        """How many tokens each image may keep, at each place.

        Raises:
            ValueError: what leaves is not chosen by number.
        """
        if self.prompt.quotas is None:
            raise ValueError("the scorer reads how many tokens are to be kept, which is not known: prune by a recipe")
        return self.prompt.quotas

    @functools.cached_property
    def group(self) -> torch.Tensor:
        """[B, m] int64, as `image`, but all images of a sample are one where they compete with each other."""
        return self.quotas.group(self.image)

    @functools.cached_property
    def left(self) -> torch.Tensor:
        """[B, groups] int64, number of tokens that each group keeps."""
        return self.quotas.counts[self.number + 1].to(self.image.device)

    @functools.cached_property
    def states(self) -> Attention:
        """The layer's queries and keys."""
        return self.attention()

    @functools.cached_property
    def received(self) -> ReceivedAttention:
        """Attention that the visual tokens receive in this layer, maximum over heads."""
        at = self.states
        return received_attention(at.query, at.key, self.image, self.question, at.softmax, at.lse, at.ranks)

    @property
    def self_attention(self) -> torch.Tensor:
        """[B, m] received self attention; see `ReceivedAttention`."""
        return self.received.self_attention

    @property
    def cross_attention(self) -> torch.Tensor:
        """[B, m] received cross attention; see `ReceivedAttention`."""
        return self.received.cross_attention

    def by_head(self, *kinds: str) -> dict[str, torch.Tensor]:
        """Attention that the visual tokens receive from each head: kind -> [B, H, m]; see `head_attention`.

        Args:
            *kinds: of `HEAD_KINDS`.

        Raises:
            ValueError: there is no such kind.
        """
        if wrong := [kind for kind in kinds if kind not in HEAD_KINDS]:
            raise ValueError(f"by_head({wrong[0]!r}): must be among {', '.join(HEAD_KINDS)}")
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
        """[B, m] position of each row in its own sample's prompt, from 0, padding not counted."""
        return self._at_columns(self.prompt.places)

    @property
    def cls_attention(self) -> torch.Tensor:
        """[B, m] attention that the vision tower's [CLS] token pays to each visual token, mean over heads."""
        return self._at_columns(self.prompt.cls_attention)

    def _at_columns(self, values: torch.Tensor) -> torch.Tensor:
        """Take each row's value of [B, Q]; the values at padding have no meaning."""
        return values.to(self.column.device).gather(1, self.column.clamp(min=0))
