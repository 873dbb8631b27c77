"""What attention looks like: how much each layer gives, on how few tokens, where they lie, and whether layers agree.

Shapes: L layers, S samples, N visual tokens of a sample, B samples of a block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from fitprune.analysis.spread import Row, Spread, blocks, shares_of, spread_of
from fitprune.fitting.stats import AttentionStats

TOP_FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
KINDS = ("self", "cross", "score")  # score: self x cross, by which inference ranks tokens


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAttention:
    """Attention that all visual tokens of a sample receive together, [L], spread over samples."""

    self_attention: Spread
    cross_attention: Spread

    COLUMNS: ClassVar = ("kind", "layer", *Spread.COLUMNS)

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for kind, spread in zip(KINDS, (self.self_attention, self.cross_attention), strict=False):
            for layer in range(len(spread.mean)):
                yield kind, layer, *spread.cells(layer)


@dataclasses.dataclass(frozen=True, eq=False)
class TopShare:
    """Share of a sample's received attention that its most attended tokens hold, [fractions, L], over samples.

    Attributes:
        fractions: of the sample's visual tokens. Uniform attention gives each fraction itself.
        self_attention: share of received self attention.
        cross_attention: share of received cross attention.
    """

    fractions: tuple[float, ...]
    self_attention: Spread
    cross_attention: Spread

    COLUMNS: ClassVar = ("kind", "fraction", "layer", *Spread.COLUMNS)

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for kind, spread in zip(KINDS, (self.self_attention, self.cross_attention), strict=False):
            for number, fraction in enumerate(self.fractions):
                for layer in range(spread.mean.shape[1]):
                    yield kind, fraction, layer, *spread.cells((number, layer))


@dataclasses.dataclass(frozen=True, eq=False)
class RankAgreement:
    """Spearman's correlation of token scores between layers, mean over samples.

    Attributes:
        matrix: [L, L]; NaN where no sample has differing scores in both layers.
        samples: samples that count, those with two tokens or more.
    """

    matrix: torch.Tensor
    samples: int

    COLUMNS: ClassVar = ("layer", "other_layer", "spearman")

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for layer, row in enumerate(self.matrix):
            for other, value in enumerate(row):
                yield layer, other, value


@dataclasses.dataclass(frozen=True, eq=False)
class PositionBias:
    """Where on the image attention lies: each sample divided by its mean over tokens, then the mean over samples.

    Attributes:
        side: the grid is side x side tokens.
        samples: samples of this grid; others do not count.
        by_row: for each of KINDS, [L, side]; 1 where a row receives as much as the mean token.
        by_column: the same by image column.
        grid: for each of KINDS, [side, side], mean over layers.
    """

    side: int
    samples: int
    by_row: dict[str, torch.Tensor]
    by_column: dict[str, torch.Tensor]
    grid: dict[str, torch.Tensor]

    COLUMNS: ClassVar = ("kind", "axis", "layer", "position", "relative_attention")

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for axis, by_kind in (("row", self.by_row), ("column", self.by_column)):
            for kind, by_layer in by_kind.items():
                for layer, values in enumerate(by_layer):
                    for position, value in enumerate(values):
                        yield kind, axis, layer, position, value


def attention_per_layer(stats: AttentionStats) -> LayerAttention:
    """Sum what the visual tokens of each sample receive, layer by layer.

    A token's attention is a maximum over heads, so the sum may exceed 1.
    """
    totals = torch.empty(2, len(stats), stats.model.decoder.layers, dtype=torch.float64)
    for samples, received in blocks(stats):
        totals[:, samples] = received.sum(3).transpose(1, 2)
    return LayerAttention(spread_of(totals[0]), spread_of(totals[1]))


def top_share(stats: AttentionStats, fractions: Sequence[float] = TOP_FRACTIONS) -> TopShare:
    """Find the share of received attention that the most attended fraction of a sample's tokens holds.

    Between whole tokens the share is interpolated. A sample that receives none at all in a layer counts as uniform.

    Args:
        stats: from `measure`.
        fractions: of a sample's visual tokens.

    Raises:
        ValueError: a fraction is not above 0 and at most 1.
    """
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ValueError(f"fractions holds {wrong[0]}: must be above 0 and at most 1")
    share = torch.empty(2, len(stats), len(fractions), stats.model.decoder.layers, dtype=torch.float64)
    for samples, received in blocks(stats):
        count = received.shape[-1]
        of_first = shares_of(received).sort(dim=3, descending=True).values.cumsum(3)
        of_first = torch.cat([torch.zeros_like(of_first[..., :1]), of_first], 3)  # of the first 0, 1, ... tokens
        for number, fraction in enumerate(fractions):
            below = min(math.floor(fraction * count), count - 1)
            part = fraction * count - below
            top = of_first[..., below] + part * (of_first[..., below + 1] - of_first[..., below])
            share[:, samples, number] = top.transpose(1, 2)
    return TopShare(tuple(fractions), spread_of(share[0]), spread_of(share[1]))


def rank_agreement(stats: AttentionStats) -> RankAgreement | None:
    """Correlate the ranks of a sample's token scores between layers (Spearman, equal scores share their mean rank)."""
    layers = stats.model.decoder.layers
    total, defined = torch.zeros(layers, layers, dtype=torch.float64), torch.zeros(layers, layers)
    counted = 0
    for samples, received in blocks(stats):
        if received.shape[-1] < 2:
            continue
        score = (received[0] * received[1]).transpose(0, 1).contiguous()  # [B, L, N]
        ordered = score.sort(dim=2).values
        rank = torch.searchsorted(ordered, score) + torch.searchsorted(ordered, score, right=True)
        centred = rank.double() - rank.double().mean(2, keepdim=True)
        norm = centred.norm(dim=2, keepdim=True)
        unit = torch.where(norm > 0, centred / norm, torch.zeros_like(centred))
        total += (unit @ unit.transpose(1, 2)).sum(0)
        varies = (norm[..., 0] > 0).float()
        defined += varies.T @ varies
        counted += len(samples)
    return RankAgreement(total / defined, counted) if counted else None


def position_bias(stats: AttentionStats) -> PositionBias | None:
    """Average attention by image row and column, where the usual token count is a square grid; else None.

    Statistics do not say how tokens lie on images: several images whose tokens add up to a square look like one.
    """
    count = stats.usual_visual_tokens
    side = math.isqrt(count)
    if side * side != count or side < 2:
        return None
    layers, samples = stats.model.decoder.layers, stats.visual_tokens.count(count)
    total = torch.zeros(3, layers, side, side, dtype=torch.float64)
    for _, received in blocks(stats):
        if received.shape[-1] == count:
            kinds = torch.cat([received, (received[0] * received[1])[None]])
            total += (shares_of(kinds) * count).sum(2).view(3, layers, side, side)
    mean = dict(zip(KINDS, total / samples, strict=True))
    return PositionBias(
        side=side,
        samples=samples,
        by_row={kind: grid.mean(2) for kind, grid in mean.items()},
        by_column={kind: grid.mean(1) for kind, grid in mean.items()},
        grid={kind: grid.mean(0) for kind, grid in mean.items()},
    )
