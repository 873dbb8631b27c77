"""What a decoder costs when its visual tokens change in number from layer to layer.

Pure Python: knows sizes and counts, no model. Two accountings, never mixed:

* the paper's: multiply-accumulates of the visual tokens alone (`visual_macs`), which is what `flops_reduction` and the
  published percentages mean;
* the real prefill: floating point operations (two per multiply-accumulate) of everything that runs, as
  `torch.utils.flop_counter` counts them (`prefill_flops`).

Symbols: n visual tokens that enter a layer, k that leave in it, d hidden size, m MLP width, q and v widths of all
query heads and of all key/value heads.

Tokens leave in two places: `removed[l]` of them inside layer l, between its attention and its MLP, and `before[l]`
(by default none) between layer l and the layer before it, or the embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fitprune.costs.counts import entering_counts
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint

SCORE_BLOCK = 320  # query rows scored at a time; `attention` works in these, and the cost of scoring follows them
LSE_COLUMNS = 2  # columns of the log-sum-exp after a query's: the rounding of two 8-bit numbers vanishes in a product's


def visual_macs(
    decoder: DecoderSizes, visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None
) -> int:
    """Count the multiply-accumulates of the visual tokens through the decoder, in the paper's accounting.

    A layer costs n d (q + 2 v) + 2 n^2 q before its removal and (n - k) d q + 3 (n - k) d m after it.

    Args:
        decoder: sizes of the decoder.
        visual_tokens: visual tokens of the prompt.
        removed: tokens that leave inside each layer.
        before: tokens that leave before each layer.

    Source: arXiv:2409.10197 (the authors' `statistical_analysis.py`), generalised to
    grouped queries, experts and linear layers.
    """
    total = 0
    for layer, (n, count) in enumerate(zip(entering_counts(visual_tokens, removed, before), removed, strict=True)):
        left = n - count
        total += decoder.mixer_macs(layer, n, projected=left) + left * decoder.mlp_macs(layer)
    return total


def ahead_macs(decoder: DecoderSizes, visual_tokens: int) -> int:
    """Count what it costs to look at a layer's attention before it: queries, keys and values, computed ahead."""
    return visual_tokens * decoder.input_macs


def visual_flops_reduction(
    decoder: DecoderSizes, visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None
) -> float:
    """Give the fraction of `visual_macs` that the removals save."""
    dense = visual_macs(decoder, visual_tokens, [0] * decoder.layers)
    return 1 - visual_macs(decoder, visual_tokens, removed, before) / dense if dense else 0.0


def kv_bytes(
    decoder: DecoderSizes,
    visual_tokens: int,
    removed: Sequence[int],
    before: Sequence[int] | None = None,
    *,
    text_tokens: int = 0,
    value_bytes: int = 2,
) -> int:
    """Count the bytes of one sample's KV cache after prefill, all layers; `value_bytes` is 2 for 16-bit types."""
    entering = entering_counts(visual_tokens, removed, before)
    cached = sum(entering[layer] + text_tokens for layer in decoder.attention_layers)
    return 2 * cached * decoder.kv_width * value_bytes


def mean_visual_tokens(visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None) -> float:
    """Average, over layers, the visual tokens that enter the layer."""
    return sum(entering_counts(visual_tokens, removed, before)) / len(removed)


def balanced(rows: int, most: int) -> int:
    """Choose the block size: as few blocks as possible of at most `most` rows, all about equally large."""
    return max(1, -(-rows // max(1, -(-rows // most))))


def score_width(head_dim: int, value_bytes: int = 2) -> int:
    """Count the columns of the products that score: the head's, and those of the log-sum-exp.

    In 32 bits the log-sum-exp is added afterwards. Shorter numbers take LSE_COLUMNS for it, rounded up to 32 columns,
    which matrix units prefer.
    """
    if not LSE_COLUMNS or value_bytes >= 4:
        return head_dim
    return -(-(head_dim + LSE_COLUMNS) // 32) * 32


def scoring_flops(
    decoder: DecoderSizes, visual_tokens: int, text_before: int, text_after: int, value_bytes: int = 2
) -> int:
    """Count the FLOPs of recomputing the query-key products that score one layer's visual tokens.

    Rows are the visual tokens and the text after them, in blocks of at most SCORE_BLOCK (see `balanced`), each against
    the visual keys up to its last row; in a bidirectional decoder against all visual keys. A product has `score_width`
    columns. Where attention returns no log-sum-exp (LSE_COLUMNS 0), a softmax needs the keys of text too.
    """
    rows = visual_tokens + text_after
    keys, first = (visual_tokens, 0) if LSE_COLUMNS else (text_before + rows, text_before)
    width = decoder.heads * score_width(decoder.head_dim, value_bytes)
    if decoder.bidirectional:
        return 2 * width * rows * keys
    size = balanced(rows, SCORE_BLOCK)
    blocks = max(rows - 1, 0) // size  # without the last one
    partly = min(max((keys - first) // size, 0), blocks)  # those of them that do not look at all keys
    pairs = size * (partly * first + size * partly * (partly + 1) // 2 + (blocks - partly) * keys)
    pairs += (rows - blocks * size) * min(first + rows, keys)
    return 2 * width * pairs


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
    model: ModelFingerprint,
    visual_tokens: int,
    removed: Sequence[int],
    before: Sequence[int] | None = None,
    *,
    text_before: int = 0,
    text_after: int = 64,
    crops: int = 1,
    logits: int = 1,
    value_bytes: int = 2,
) -> PrefillFlops:
    """Count the FLOPs that a prefill of one sample executes.

    Attention is counted over all query-key pairs, as `FlopCounterMode` does; a causal kernel may skip half of it. The
    output projection runs for leaving tokens too (they leave after it, see docs/design.md), which the paper's
    accounting does not charge. Scoring is FitPrune's, at each layer that removes; what scores before a layer is not
    counted.

    Args:
        model: sizes; without those of a vision tower, the tower counts nothing.
        visual_tokens: visual tokens of the prompt.
        removed: tokens that leave inside each layer; all zeros is the dense model.
        before: tokens that leave before each layer.
        text_before: text tokens before the image.
        text_after: text tokens after the image.
        crops: image crops that the tower sees (AnyRes has several).
        logits: positions that the output head is applied to.
        value_bytes: of the model's dtype; scoring has fewer columns where it is 4.
    """
    sizes, text = model.decoder, text_before + text_after
    decoder = scoring = 0
    for layer, (n, count) in enumerate(zip(entering_counts(visual_tokens, removed, before), removed, strict=True)):
        decoder += 2 * sizes.mixer_macs(layer, n + text)
        if count:
            scoring += scoring_flops(sizes, n, text_before, text_after, value_bytes)
        decoder += 2 * (n - count + text) * sizes.mlp_macs(layer)
    vision = crops * model.vision.flops(sizes.hidden) if model.vision else 0
    return PrefillFlops(vision=vision, decoder=decoder, scoring=scoring, head=2 * logits * sizes.hidden * sizes.vocab)
