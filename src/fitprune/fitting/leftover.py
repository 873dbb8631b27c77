"""Spend what a budget leaves over: keep as many tokens more as it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fitprune.costs.sizes import DecoderSizes
from fitprune.fitting.budget import Budget


def between(
    budget: Budget, decoder: DecoderSizes, visual_tokens: int, feasible: list[int], infeasible: list[int]
) -> list[int]:
    """Move all layers together from the feasible counts towards the infeasible ones while the budget is met."""
    low, high, best = 0.0, 1.0, feasible
    for _ in range(12):
        share = (low + high) / 2
        mixed = [math.floor(a + share * (b - a) + 0.5) for a, b in zip(feasible, infeasible, strict=True)]
        if budget.met_by(budget.measured(decoder, visual_tokens, mixed)):
            low, best = share, mixed
        else:
            high = share
    return best


def give_back(
    budget: Budget,
    decoder: DecoderSizes,
    visual_tokens: int,
    kept: Sequence[int],
    starts: Sequence[int] | None = None,
) -> list[int]:
    """Raise kept counts, first layer first, while the budget is still met.

    Afterwards no layer that tokens may leave can keep one more without missing the budget. Where only some layers,
    `starts`, may remove, those up to the next of them are raised together.
    """
    kept = list(kept)
    starts = decoder.prunable if starts is None else starts
    # What a layer keeps, those up to the next that tokens may leave keep too.
    spans = list(zip(starts, [*starts[1:], decoder.layers], strict=True))

    def raised(span: tuple[int, int], more: int) -> list[int]:
        first, end = span
        return [*kept[:first], *(count + more for count in kept[first:end]), *kept[end:]]

    def fits(span: tuple[int, int], more: int) -> bool:
        ceiling = kept[span[0] - 1] if span[0] else visual_tokens
        tried = raised(span, more)
        return tried[span[0]] <= ceiling and budget.met_by(budget.measured(decoder, visual_tokens, tried))

    changed = True
    while changed:
        changed = False
        for span in spans:
            step = 0
            while fits(span, step + 1):  # tokens given back at one layer are few: the tolerance is fine already
                step += 1
            kept = raised(span, step)
            changed |= step > 0
    return kept
