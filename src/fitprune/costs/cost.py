"""What a schedule of counts costs for one sample, beside what the dense model costs. Pure Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fitprune._support import checked
from fitprune.costs import flops
from fitprune.costs.counts import Counts
from fitprune.costs.sizes import MOST_TOKENS, ModelFingerprint


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a recipe costs for one sample, with the dense figure beside each.

    Attributes:
        visual_tokens: visual tokens of the prompt.
        text_tokens: text tokens of the prompt.
        kept: visual tokens present after each layer.
        flops_reduction: fraction of visual-token FLOPs removed (the paper's accounting).
        kv_cache_reduction: fraction of the visual tokens' KV bytes removed.
        mean_visual_tokens: mean over layers of the visual tokens that enter the layer.
        prefill_flops: FLOPs of the real prefill; text, scoring, tower, projector and head included.
        dense_prefill_flops: the same without pruning.
        kv_bytes: bytes of the KV cache after prefill, text included.
        dense_kv_bytes: the same without pruning.
    """

    visual_tokens: int
    text_tokens: int
    kept: tuple[int, ...]
    flops_reduction: float
    kv_cache_reduction: float
    mean_visual_tokens: float
    prefill_flops: int
    dense_prefill_flops: int
    kv_bytes: int
    dense_kv_bytes: int


def cost_of(
    model: ModelFingerprint,
    counts: Counts,
    *,
    text_before: int,
    text_tokens: int,
    crops: int | None,
    value_bytes: int,
) -> Cost:
    """Price the counts of one sample; the keywords are those of `PruningRecipe.cost`."""
    n, decoder = counts.visual_tokens, model.decoder
    checked.whole("text_tokens", text_tokens, 0, MOST_TOKENS)
    checked.whole("value_bytes", value_bytes, 1, 16)
    if not 0 <= text_before <= text_tokens:
        raise ValueError(f"text_before={text_before}: must be between 0 and text_tokens={text_tokens}")
    if crops is None:
        crops = -(-n // model.vision.patches) if model.vision else 1
    checked.whole("crops", crops, 1, MOST_TOKENS)

    def prefill(removed: Sequence[int], before: Sequence[int] | None) -> int:
        after = text_tokens - text_before
        text = {"text_before": text_before, "text_after": after}
        return flops.prefill_flops(model, n, removed, before, **text, crops=crops, value_bytes=value_bytes).total

    def cache(removed: Sequence[int], before: Sequence[int] | None, text: int) -> int:
        return flops.kv_bytes(decoder, n, removed, before, text_tokens=text, value_bytes=value_bytes)

    pruned, dense = (counts.removed, counts.before), ([0] * decoder.layers, None)
    return Cost(
        visual_tokens=n,
        text_tokens=text_tokens,
        kept=counts.kept,
        flops_reduction=flops.visual_flops_reduction(decoder, n, *pruned),
        kv_cache_reduction=1 - cache(*pruned, 0) / cache(*dense, 0),
        mean_visual_tokens=flops.mean_visual_tokens(n, *pruned),
        prefill_flops=prefill(*pruned),
        dense_prefill_flops=prefill(*dense),
        kv_bytes=cache(*pruned, text_tokens),
        dense_kv_bytes=cache(*dense, text_tokens),
    )
