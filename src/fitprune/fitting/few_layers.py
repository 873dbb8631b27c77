"""Fewer layers that remove: the schedule of at most n removals that loses the least attention at equal budget.

A fitted recipe removes a few tokens at nearly every layer, and each such layer costs time: its tokens are scored and
gathered. `merge_layers` chooses the layers that go on removing and how many tokens are left after each, exactly up to
the rounding of costs, by dynamic programming over saved statistics.

Legend: P layers that tokens may leave (`DecoderSizes.prunable`), L layers, n visual tokens, S samples, C counts tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from fitprune.costs import flops
from fitprune.costs.sizes import DecoderSizes
from fitprune.fitting.budget import Budget
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


def prices_of(budget: Budget, decoder: DecoderSizes, visual_tokens: int) -> Prices:
    """Write a budget as a sum over layers: `met_by(measured(...))` where no more than the limit is spent."""
    if budget.kind == "flops_reduction":
        dense = flops.visual_macs(decoder, visual_tokens, [0] * decoder.layers)
        return Prices(
            lambda layer, count: decoder.mixer_macs(layer, count, projected=0),
            lambda layer, count: decoder.mixer_macs(layer, 0, projected=count) + count * decoder.mlp_macs(layer),
            (1 - budget.value) * dense,
        )
    if (profile := budget.profile) is not None:
        text, seconds_at = profile.text_tokens, profile.seconds_at
        allowed = (1 - budget.value) * profile.dense_seconds(visual_tokens) - profile.outside_seconds
        return Prices(
            # What a layer takes for the text alone is in both, and cannot be saved.
            lambda _, count: seconds_at(profile.mixer_seconds, count + text),
            lambda _, count: seconds_at(profile.mlp_seconds, count + text),
            allowed,
        )
    if budget.kind == "kv_cache_reduction":
        caching = set(decoder.attention_layers)
        limit = (1 - budget.value) * len(caching) * visual_tokens
        return Prices(lambda layer, count: count if layer in caching else 0, lambda layer, count: 0, limit)
    return Prices(lambda layer, count: count, lambda layer, count: 0, budget.value * decoder.layers)


def lost_attention(stats: AttentionStats, visual_tokens: int) -> torch.Tensor:
    """Measure what a layer loses when an earlier one chose the tokens that stay.

    Args:
        stats: of the calibration samples.
        visual_tokens: n, the image size that counts are of; each sample keeps its own share.

    Returns:
        [P, L, n + 1] fp32: the share of layer l's received attention that falls on tokens outside of the c that the
        p-th prunable layer ranks highest, the larger one of self and cross, mean over samples; 0 before that layer.
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
                kept_share = attention.gather(2, order[start].expand_as(attention)).cumsum(2)
                total = kept_share[..., -1:]
                kept_share = torch.cat([torch.zeros_like(total), kept_share], 2)
                kept_share = kept_share.gather(2, kept.expand(len(kept_share), -1, -1))
                # A layer that measured no attention (a linear one) loses none.
                worst = torch.maximum(worst, torch.where(total > 0, 1 - kept_share / total, 0))
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
    problem = _Problem.of(kept, lost, prices, starts, levels, buckets)
    return _trace_back(problem, _least_losses(problem, at_most))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What removals lose and cost.

    Attributes:
        starts: [P] the layers that may remove.
        counts: [C] tokens that a removal may leave, falling.
        visual_tokens: n.
        loss_before: [P, L + 1, C] extra loss of all layers before one, where the p-th of `starts` leaves a count.
        cost_before: [L + 1, C] cost of all layers before one, with a count left from the first on.
        dense_before: [L + 1] the same where nothing is removed.
        unit: cost of a bucket.
        buckets: what may be spent in all.
    """

    starts: Sequence[int]
    counts: list[int]
    visual_tokens: int
    loss_before: torch.Tensor
    cost_before: torch.Tensor
    dense_before: torch.Tensor
    unit: float
    buckets: int

    @classmethod
    def of(
        cls, kept: Sequence[int], lost: torch.Tensor, prices: Prices, starts: Sequence[int], levels: int, buckets: int
    ) -> _Problem:
        layers, n = lost.shape[1], lost.shape[2] - 1
        counts = _levels(kept, n, levels)
        own_loss = torch.zeros(layers)  # of `kept`, at each layer
        for p, layer in enumerate(starts):
            own_loss[layer] = lost[p, layer, kept[layer]]
        extra = (lost[:, :, counts] - own_loss[:, None]).clamp_(min=0)
        # A count costs from the layer that leaves it up to the next that removes, which it enters: one sum has both.
        entering = [[prices.entering(layer, count) for count in (*counts, n)] for layer in range(layers)]
        left = [[prices.left(layer, count) for count in (*counts, n)] for layer in range(layers)]
        cost = _sums_before(torch.tensor(left, dtype=torch.float64), 0)
        cost += torch.tensor([*entering, [0.0] * (len(counts) + 1)], dtype=torch.float64).cumsum(0)
        cost, dense = cost[:, :-1], cost[:, -1]
        slack = max(prices.limit - float(dense[starts[0]]), 0.0)  # up to the first removal nothing can be saved
        return cls(starts, counts, n, _sums_before(extra, 1), cost, dense, max(slack, 1e-30) / buckets, buckets)

    def in_buckets(self, cost: torch.Tensor) -> torch.Tensor:
        """Round costs up to whole buckets; one more than there are for what is too much."""
        return torch.ceil(cost / self.unit - 1e-11).clamp_(max=self.buckets + 1).long()


def _least_losses(problem: _Problem, at_most: int) -> torch.Tensor:
    """Solve for every last removal.

    Args:
        problem: the problem.
        at_most: layers that may remove.

    Returns:
        [removals, P, C, 2 + buckets]: element [j, p, i, 1 + b] is the least loss of the layers before starts[p], which
        is the removal after j others and leaves counts[i], at a cost of at most b buckets. Place 0 is what costs too
        much.
    """
    starts, cost, dense = problem.starts, problem.cost_before, problem.dense_before
    least = torch.full((min(at_most, len(starts)), len(starts), cost.shape[1], problem.buckets + 2), torch.inf)
    places = torch.arange(1, problem.buckets + 2)
    for p, layer in enumerate(starts):
        dense_cost = problem.in_buckets(dense[layer] - dense[starts[0]])
        least[0, p, :, 1:] = torch.where(places > dense_cost, 0.0, torch.inf)
        by_last_count = torch.full((len(least) - 1, cost.shape[1], problem.buckets + 1), torch.inf)
        for last in range(p):  # the removal before
            spent = problem.in_buckets(cost[layer] - cost[starts[last]])
            places_before = (places - spent[:, None]).clamp_(min=0)
            best = by_last_count[: last + 1]  # the p-th layer that may remove has at most p removals before it
            through_last = least[: len(best), last].gather(2, places_before.expand(len(best), -1, -1))
            torch.minimum(best, through_last.add_(problem.loss_before[last, layer, :, None]), out=best)
        least[1:, p, 1:, 1:] = by_last_count.cummin(1).values[:, :-1]  # counts fall: the last was any larger one
    return least


def _trace_back(problem: _Problem, least: torch.Tensor) -> tuple[list[int], float]:
    """Follow the best schedule from its end; give the tokens left after each layer, and its loss."""
    starts, cost, layers = problem.starts, problem.cost_before, len(problem.cost_before) - 1

    def ending(others: int, end: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, C]: the least loss before layer `end` with a last removal after `others`, and the place before that."""
        spent = problem.in_buckets((cost[end] - cost[torch.tensor(starts)]).clamp_(min=0))
        places = (place - spent).clamp_(min=0)
        return least[others].gather(2, places[..., None])[..., 0] + problem.loss_before[:, end], places

    losses = [float(ending(others, layers, problem.buckets + 1)[0].min()) for others in range(len(least))]
    others = losses.index(min(losses))
    total = losses[others]
    kept, end, place, count = [problem.visual_tokens] * layers, layers, problem.buckets + 1, len(problem.counts)
    while others >= 0:
        candidates, places = ending(others, end, place)
        candidates = candidates[: sum(start < end for start in starts), :count]
        p, count = divmod(int(candidates.argmin()), candidates.shape[1])
        kept[starts[p] : end] = [problem.counts[count]] * (end - starts[p])
        end, place, others = starts[p], int(places[p, count]), others - 1
    return kept, total


def _sums_before(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum along a dimension, from none of the values to all of them."""
    return torch.cat([torch.zeros_like(values.narrow(dim, 0, 1)), values], dim).cumsum(dim)


def _levels(kept: Sequence[int], n: int, levels: int) -> list[int]:
    """Choose counts below n, falling: those that `kept` has, 0, and others spread evenly."""
    fitted = {count for count in kept if count < n} | {0}
    spread = min(max(levels - len(fitted), 0), n)
    return sorted(fitted | {i * n // spread for i in range(spread)}, reverse=True)
