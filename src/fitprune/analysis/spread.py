"""Samples a few at a time, and how a figure spreads over samples or draws.

Shapes: L layers, N visual tokens of a sample, B samples of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from fitprune.fitting.stats import AttentionStats

Row = tuple[Any, ...]  # of a CSV

INTERVAL = (0.05, 0.95)  # quantiles that a spread gives
_BLOCK = 16  # samples worked on at a time: so few that torch does not split an operation over threads, which costs more


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Mean, standard deviation, and INTERVAL's quantiles, over samples or over resamples; tensors of one shape."""

    COLUMNS: ClassVar = ("mean", "deviation", "low", "high")

    mean: torch.Tensor
    deviation: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def cells(self, at: Any) -> list[torch.Tensor]:
        """Give the COLUMNS of one entry, by its index."""
        return [getattr(self, name)[at] for name in self.COLUMNS]


def spread_of(values: torch.Tensor) -> Spread:
    """Summarise over the first dimension."""
    values = values.double()
    low, high = torch.quantile(values, torch.tensor(INTERVAL, dtype=torch.float64), dim=0)
    return Spread(values.mean(0), values.std(0, correction=0), low, high)


def blocks(stats: AttentionStats) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Give the samples a few at a time, of one token count each: indices, and self and cross [2, L, B, N] fp64."""
    ends = torch.tensor(stats.visual_tokens).cumsum(0)
    for count in sorted(set(stats.visual_tokens)):
        members = [index for index, own in enumerate(stats.visual_tokens) if own == count]
        for start in range(0, len(members), _BLOCK):
            samples = members[start : start + _BLOCK]
            columns = (ends[samples, None] - count + torch.arange(count)).flatten()
            both = torch.stack([stats.self_attention[:, columns], stats.cross_attention[:, columns]])
            yield samples, both.double().view(2, -1, len(samples), count)


def shares_of(values: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the last dimension; uniform where that is zero."""
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total, 1 / values.shape[-1])
