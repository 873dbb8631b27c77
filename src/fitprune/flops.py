"""What a decoder costs when its visual tokens change in number from layer to layer.

Pure Python: knows shapes and counts, no model. Two accountings, never mixed:

* the paper's: multiply-accumulates of the visual tokens alone (`visual_macs`), which is what `flops_reduction` and the
  published percentages mean;
* the real prefill: floating point operations (two per multiply-accumulate) of everything that runs, as
  `torch.utils.flop_counter` counts them (`prefill_flops`).

Symbols: n visual tokens that enter a layer, k that leave in it, d hidden size, m MLP width, q and v widths of all
query heads and of all key/value heads.

Tokens leave in two places: `removed[l]` of them inside layer l, between its attention and its MLP, and `before[l]`
(none if not given) between the layer before it, or the embeddings, and layer l.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

SCORE_BLOCK = 64  # query rows scored at a time; `attention` works in these blocks, and the cost of scoring follows them


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder. `vocab` only prices the output head and does not distinguish models."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self) -> None:
        _require_sizes(self, may_be_zero="vocab")

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class VisionShape:
    """Sizes of a ViT tower with a two-layer projector, for one image (or one crop) of fixed size."""

    layers: int
    hidden: int
    intermediate: int
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        _require_sizes(self)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be at least patch_size={self.patch_size}")

    @property
    def patches(self) -> int:
        """Patches of one crop."""
        return (self.image_size // self.patch_size) ** 2

    def flops(self, decoder_hidden: int) -> int:
        """FLOPs of tower and projector for one crop."""
        d, m, n = self.hidden, self.intermediate, self.patches + 1  # one class token
        embed = 2 * self.patches * d * 3 * self.patch_size**2
        tower = self.layers * (8 * n * d * d + 4 * n * n * d + 4 * n * d * m)
        projector = 2 * self.patches * (d * decoder_hidden + decoder_hidden**2)
        return embed + tower + projector


def _require_sizes(shape: DecoderShape | VisionShape, may_be_zero: str = "") -> None:
    """Refuse sizes that no model has, so that a damaged file fails where it is read."""
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if type(value) is not int or value < (0 if field.name == may_be_zero else 1):
            raise ValueError(f"{field.name}={value!r}: must be an integer of at least 1")


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a recipe or statistics must agree with before they are used on a model: type and decoder sizes."""

    model_type: str
    decoder: DecoderShape
    vision: VisionShape | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelShape:
        """Read `to_dict`'s data.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            if not isinstance(data["model_type"], str):
                raise ValueError(f"model_type={data['model_type']!r}: must be a string")
            vision = data.get("vision")
            rest = {key: value for key, value in data.items() if key not in ("decoder", "vision")}
            return cls(
                decoder=DecoderShape(**data["decoder"]),
                vision=None if vision is None else VisionShape(**vision),
                **rest,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"model={data!r}: not a model shape ({error}); fit or measure again") from None

    def require_same(self, other: ModelShape, *, what: str) -> None:
        """Refuse `what` (made for `self`) on a model of shape `other`.

        Raises:
            ValueError: the shapes differ; the message names each difference.
        """
        mine, theirs = ({"model_type": s.model_type, **dataclasses.asdict(s.decoder)} for s in (self, other))
        differing = [f"{k} {mine[k]} there, {theirs[k]} here" for k in mine if k != "vocab" and mine[k] != theirs[k]]
        if differing:
            raise ValueError(f"{what} is of another model: {', '.join(differing)}; make one from this model")


def visual_macs(
    decoder: DecoderShape, visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None
) -> int:
    """Count the multiply-accumulates of the visual tokens through the decoder, in the paper's accounting.

    A layer costs n d (q + 2 v) + 2 n^2 q before its removal and (n - k) d q + 3 (n - k) d m after it.

    Args:
        decoder: sizes of the decoder.
        visual_tokens: visual tokens of the prompt.
        removed: tokens that leave inside each layer.
        before: tokens that leave before each layer.

    Source: arXiv:2409.10197 (the authors' `statistical_analysis.py`), generalised to grouped queries.
    """
    total = 0
    for n, count in zip(entering_counts(visual_tokens, removed, before), removed, strict=True):
        total += n * decoder.hidden * (decoder.q_width + 2 * decoder.kv_width) + 2 * n * n * decoder.q_width
        left = n - count
        total += left * decoder.hidden * decoder.q_width + 3 * left * decoder.hidden * decoder.intermediate
    return total


def ahead_macs(decoder: DecoderShape, visual_tokens: int) -> int:
    """Count what it costs to look at a layer's attention before it: queries, keys and values, computed ahead."""
    return visual_tokens * decoder.hidden * (decoder.q_width + 2 * decoder.kv_width)


def visual_flops_reduction(
    decoder: DecoderShape, visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None
) -> float:
    """Give the fraction of `visual_macs` that the removals save."""
    dense = visual_macs(decoder, visual_tokens, [0] * decoder.layers)
    return 1 - visual_macs(decoder, visual_tokens, removed, before) / dense if dense else 0.0


def entering_counts(visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None) -> list[int]:
    """Count the visual tokens that enter each layer, which are those that its KV cache holds."""
    counts, n = [], visual_tokens
    for inside, between in zip(removed, before or [0] * len(removed), strict=True):
        n -= between
        counts.append(n)
        n -= inside
    return counts


def kv_bytes(
    decoder: DecoderShape,
    visual_tokens: int,
    removed: Sequence[int],
    before: Sequence[int] | None = None,
    *,
    text_tokens: int = 0,
    value_bytes: int = 2,
) -> int:
    """Count the bytes of one sample's KV cache after prefill, all layers; `value_bytes` is 2 for 16-bit types."""
    held = sum(n + text_tokens for n in entering_counts(visual_tokens, removed, before))
    return 2 * held * decoder.kv_width * value_bytes


def mean_visual_tokens(visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None) -> float:
    """Average, over layers, the visual tokens that enter the layer."""
    return sum(entering_counts(visual_tokens, removed, before)) / len(removed)


def scoring_flops(decoder: DecoderShape, visual_tokens: int, text_before: int, text_after: int) -> int:
    """Count the FLOPs of recomputing the query-key products that score one layer's visual tokens.

    Rows are the visual tokens and the text after them, SCORE_BLOCK at a time, each block against the keys up to its
    last row.
    """
    first, rows = text_before, visual_tokens + text_after
    blocks, rest = divmod(rows, SCORE_BLOCK)
    pairs = SCORE_BLOCK * blocks * first + SCORE_BLOCK**2 * blocks * (blocks + 1) // 2 + rest * (first + rows)
    return 2 * decoder.q_width * pairs


@dataclasses.dataclass(frozen=True)
class PrefillFlops:
    """FLOPs of one sample's prefill, by part."""

    vision: int
    decoder: int
    scoring: int
    head: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.vision + self.decoder + self.scoring + self.head


def prefill_flops(
    model: ModelShape,
    visual_tokens: int,
    removed: Sequence[int],
    before: Sequence[int] | None = None,
    *,
    text_before: int = 0,
    text_after: int = 64,
    crops: int = 1,
    logits: int = 1,
) -> PrefillFlops:
    """Count the FLOPs that a prefill of one sample executes.

    Attention is counted over all query-key pairs, as `FlopCounterMode` does; a causal kernel may skip half of it. The
    output projection runs for leaving tokens too (they leave after it, see docs/design.md), which the paper's
    accounting does not charge. Scoring is FitPrune's, at each layer that removes; what scores before a layer is not
    counted.

    Args:
        model: sizes; without a vision shape, the tower counts nothing.
        visual_tokens: visual tokens of the prompt.
        removed: tokens that leave inside each layer; all zeros is the dense model.
        before: tokens that leave before each layer.
        text_before: text tokens before the image.
        text_after: text tokens after the image.
        crops: image crops that the tower sees (AnyRes has several).
        logits: positions that the output head is applied to.
    """
    shape, text = model.decoder, text_before + text_after
    decoder = scoring = 0
    for n, count in zip(entering_counts(visual_tokens, removed, before), removed, strict=True):
        tokens = n + text
        decoder += 2 * tokens * shape.hidden * (2 * shape.q_width + 2 * shape.kv_width)
        decoder += 4 * tokens * tokens * shape.q_width
        if count:
            scoring += scoring_flops(shape, n, text_before, text_after)
        decoder += 6 * (n - count + text) * shape.hidden * shape.intermediate
    vision = crops * model.vision.flops(shape.hidden) if model.vision else 0
    return PrefillFlops(vision=vision, decoder=decoder, scoring=scoring, head=2 * logits * shape.hidden * shape.vocab)
