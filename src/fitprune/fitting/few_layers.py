"""Fewer layers that remove: the schedule of at most so many removals that loses the least attention at equal budget.

A fitted recipe removes a few tokens at nearly every layer, and each such layer costs time: its tokens are scored and
gathered. `merge_layers` chooses the layers that go on removing and how many tokens are left after each, exactly up to
the rounding of costs, by dynamic programming over saved statistics.

Symbols: P layers that tokens may leave (`DecoderSizes.prunable`), L layers, n visual tokens, S samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from fitprune.fitting.stats import AttentionStats
from fitprune.recipes import rounding

LEVELS = 64  # counts that a layer may leave; what lies between them is spent token by token afterwards
BUCKETS = 1000  # steps that the budget is counted in, each removal's cost rounded up
_CHUNK = 32  # samples looked at together: their working set stays in the processor's cache


@dataclasses.dataclass(frozen=True)
class Prices:
    """A budget as a sum over layers: what all entering and all left tokens cost may not exceed the limit.

    Attributes:
        entering: from a layer and the tokens that enter it to a cost, 0 for none.
        left: from a layer and the tokens that are left after it to a cost, 0 for none.
        limit: the most that all layers may cost together.
    """

    entering: Callable[[int, int], float]
    left: Callable[[int, int], float]
    limit: float


def lost_attention(stats: AttentionStats, visual_tokens: int) -> torch.Tensor:
    """Look up what a layer loses when an earlier one chose who stays.

    Returns:
        [P, L, n + 1] fp32: the share of layer l's received attention that falls on tokens outside of the c that the
        p-th prunable layer ranks highest, the larger one of self and cross, mean over samples; 0 before that layer.
        Counts c are of n = `visual_tokens`, each sample keeping its own share.
    """
    starts, longest = stats.model.decoder.prunable, max(stats.visual_tokens)
    lost = torch.zeros(len(starts), stats.model.decoder.layers, visual_tokens + 1, dtype=torch.float64)
    fractions = [count / visual_tokens for count in range(visual_tokens + 1)]
    counts = {n: torch.tensor(rounding.kept_counts(fractions, n)) for n in set(stats.visual_tokens)}
    first = 0
    for sizes in (stats.visual_tokens[i : i + _CHUNK] for i in range(0, len(stats), _CHUNK)):
        present = torch.arange(longest) < torch.tensor(sizes)[:, None]  # [chunk, longest]
        own = slice(first, first := first + sum(sizes))
        self_attention, cross_attention = (
            torch.zeros(lost.shape[1], *present.shape).masked_scatter_(
                present.expand(lost.shape[1], -1, -1), attention[:, own].float()
            )
            for attention in (stats.self_attention, stats.cross_attention)
        )
        score = torch.where(present, self_attention * cross_attention, -1)  # `scoring.self_times_cross`
        # Of equal scores the later token stays, as in inference: mirrored, a stable sort puts it first.
        order = longest - 1 - score.flip(2).argsort(dim=2, descending=True, stable=True)
        kept = torch.stack([counts[n] for n in sizes])
        for p, start in enumerate(starts):
            worst = torch.zeros(())
            for attention in (self_attention[start:], cross_attention[start:]):
                held = attention.gather(2, order[start].expand_as(attention)).cumsum(2)
                total = held[..., -1:]
                held = torch.cat([torch.zeros_like(total), held], 2).gather(2, kept.expand(len(held), -1, -1))
                # A layer that measured no attention (a linear one) loses none.
                worst = torch.maximum(worst, torch.where(total > 0, 1 - held / total, 0))
            lost[p, start:] += worst.sum(1)
    return (lost / len(stats)).float()


def merge_layers(
    kept: Sequence[int],
    lost: torch.Tensor,
    prices: Prices,
    starts: Sequence[int],
    at_most: int,
    *,
    levels: int = LEVELS,
    buckets: int = BUCKETS,
) -> tuple[list[int], float]:
    """Choose at most `at_most` layers that remove, and their counts, at the least extra loss of attention.

    What a removal leaves stays up to the next one. Extra loss is what a layer then loses beyond what it would lose with
    `kept`, by its own ranking; summed over layers. The best schedule over some counts is found exactly, with the cost
    of what lies between two removals rounded up to buckets, so the budget is met and a little of it is left.

    Args:
        kept: tokens left after each layer, all removals as fitted.
        lost: [P, L, n + 1], from `lost_attention`.
        prices: the budget; everything removed at the first of `starts` must meet it.
        starts: [P] the layers that tokens may leave, rising.
        at_most: layers that may remove, at least 1.
        levels: counts tried, about; those of `kept` are always among them.
        buckets: steps that the budget is counted in.

    Returns:
        Tokens left after each layer, and the sum of extra losses.
    """
    layers, n = lost.shape[1], lost.shape[2] - 1
    count = _levels(kept, n, levels)
    own = torch.zeros(layers)  # what `kept` loses at each layer
    for p, layer in enumerate(starts):
        own[layer] = lost[p, layer, kept[layer]]
    extra = (lost[:, :, count] - own[:, None]).clamp_(min=0)
    loss = _sums_before(extra, 1)  # [P, layers + 1, levels], of all layers before one

    # A count costs from the layer that leaves it up to the next that removes, which it enters: one sum has both.
    entering = [[prices.entering(layer, c) for c in (*count, n)] for layer in range(layers)]
    left = [[prices.left(layer, c) for c in (*count, n)] for layer in range(layers)]
    cost = _sums_before(torch.tensor(left, dtype=torch.float64), 0)
    cost += torch.tensor([*entering, [0.0] * (len(count) + 1)], dtype=torch.float64).cumsum(0)
    cost, dense = cost[:, :-1], cost[:, -1]
    slack = max(prices.limit - float(dense[starts[0]]), 0.0)  # up to the first removal nothing can be saved
    unit = max(slack, 1e-30) / buckets

    def used(spent: torch.Tensor) -> torch.Tensor:
        return torch.ceil(spent / unit - 1e-11).clamp_(max=buckets + 1).long()

    # best[j, p, i, 1 + b]: least loss of the layers before starts[p], which is the removal after j others and leaves
    # count[i], at a cost of at most b. Place 0 is what costs too much.
    best = torch.full((min(at_most, len(starts)), len(starts), len(count), buckets + 2), torch.inf)
    places = torch.arange(1, buckets + 2)
    for p, layer in enumerate(starts):
        best[0, p, :, 1:] = torch.where(places > used(dense[layer] - dense[starts[0]]), 0.0, torch.inf)
        came = torch.full((len(best) - 1, len(count), buckets + 1), torch.inf)
        for before in range(p):
            spent = used(cost[layer] - cost[starts[before]])
            at = (places - spent[:, None]).clamp_(min=0)
            reach = came[: before + 1]  # the p-th prunable layer has at most p removals before it
            moved = best[: len(reach), before].gather(2, at.expand(len(reach), -1, -1))
            torch.minimum(reach, moved.add_(loss[before, layer, :, None]), out=reach)
        best[1:, p, 1:, 1:] = came.cummin(1).values[:, :-1]  # counts fall: the one before was any larger one

    def through(j: int, layer: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, levels]: the least loss before `layer` with j removals before the last, and places before that."""
        spent = used((cost[layer] - cost[torch.tensor(starts)]).clamp_(min=0))
        at = (place - spent).clamp_(min=0)
        return best[j].gather(2, at[..., None])[..., 0] + loss[:, layer], at

    ends = [through(j, layers, buckets + 1)[0] for j in range(len(best))]
    j = min(range(len(best)), key=lambda j: float(ends[j].min()))
    total = float(ends[j].min())
    merged, end, place, lower = [n] * layers, layers, buckets + 1, len(count)
    while j >= 0:
        losses, at = through(j, end, place)
        allowed = losses[: sum(start < end for start in starts), :lower]
        p, lower = divmod(int(allowed.argmin()), allowed.shape[1])
        merged[starts[p] : end] = [count[lower]] * (end - starts[p])
        end, place, j = starts[p], int(at[p, lower]), j - 1
    return merged, total


def _sums_before(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum along a dimension, from none of the values to all of them."""
    return torch.cat([torch.zeros_like(values.narrow(dim, 0, 1)), values], dim).cumsum(dim)


def _levels(kept: Sequence[int], n: int, levels: int) -> list[int]:
    """Choose counts below n, falling: those that `kept` has, 0, and others spread evenly."""
    fitted = {count for count in kept if count < n} | {0}
    spread = min(max(levels - len(fitted), 0), n)
    return sorted(fitted | {i * n // spread for i in range(spread)}, reverse=True)
