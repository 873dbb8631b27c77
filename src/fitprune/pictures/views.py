"""Where grids of visual tokens lie in a picture of a size, and how their scores rank. Draws nothing."""

from __future__ import annotations

import dataclasses

import torch

from fitprune.families.grids import Grid
from fitprune.families.planes import Box
from fitprune.pictures.kept import KeptImage, placed

_SLACK = 0.01  # of a picture's side, by which a grid may reach over its edge and yet count as inside
_OVERLAP = 0.05  # of the smaller of two grids, that may lie on the other one


@dataclasses.dataclass(frozen=True)
class View:
    """One look at a picture, with grids that do not cover each other: tiles are one view, a thumbnail another.

    All views of a picture have its own coordinates, with (0, 0) at its upper left corner.

    Attributes:
        grids: the grids, each with its box.
        extent: the box that holds picture and grids; it is larger than the picture where the processor pads.
        name: of the first grid, if it is the only one; else "n tiles".
    """

    grids: tuple[tuple[Grid, Box], ...]
    extent: Box
    name: str

    @property
    def is_covered(self) -> bool:
        """Whether the grids cover all of it."""
        own, *covered = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (self.extent, *(box for _, box in self.grids)))
        return sum(covered) > 0.98 * own

    def at(self, values: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Give the values, [tokens] bool, of the tokens at places x [columns], y [rows]; False where there is none."""
        result = torch.zeros(len(y), len(x), dtype=torch.bool)
        for grid, (left, top, right, bottom) in reversed(self.grids):
            rows, columns = grid.tokens.shape
            row, column = ((y - top) / (bottom - top) * rows).floor(), ((x - left) / (right - left) * columns).floor()
            down, across = (row >= 0) & (row < rows), (column >= 0) & (column < columns)
            tokens = grid.tokens[row[down].long()[:, None], column[across].long()]
            result[down.nonzero(), across.nonzero()[:, 0]] = values[tokens]
        return result


def views_of(kept: KeptImage, width: float, height: float) -> list[View]:
    """Sort an image's grids into views of a picture of this size.

    Args:
        kept: the image.
        width: of its picture.
        height: of its picture.

    Raises:
        ValueError: a grid's place in the picture is not known.
    """
    groups: list[list[tuple[Grid, Box]]] = []
    for grid in kept.grids:
        box = _scaled(placed(grid), width, height)
        group = next((group for group in groups if not any(_overlap(box, other) for _, other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append((grid, box))
    views = []
    for group in groups:
        sides = zip((0, 0, width, height), zip(*(box for _, box in group), strict=True), strict=True)
        left, top, right, bottom = ([own, *others] for own, others in sides)
        extent = (
            _outermost(min(left), 0, width), _outermost(min(top), 0, height),
            _outermost(max(right), width, width), _outermost(max(bottom), height, height),
        )  # fmt: skip
        views.append(View(tuple(group), extent, group[0][0].name if len(group) == 1 else f"{len(group)} tiles"))
    return views


def _scaled(box: Box, width: float, height: float) -> Box:
    left, top, right, bottom = box
    return left * width, top * height, right * width, bottom * height


def _outermost(value: float, edge: float, side: float) -> float:
    """Take the picture's own edge unless a grid reaches well over it."""
    return edge if abs(value - edge) <= _SLACK * side else value


def _overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than a strip at their edges."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width > 0 and height > 0 and width * height > _OVERLAP * smaller


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank the scores of one layer: [tokens], from 0 for the lowest to 1 for the highest; NaN stays."""
    values = scores[~scores.isnan()].sort().values
    below, upto = (torch.searchsorted(values, scores, side=side) for side in ("left", "right"))
    return ((below + upto - 1) / 2 / max(len(values) - 1, 1)).masked_fill(scores.isnan(), torch.nan)


def chosen_layers(kept: KeptImage, most: int) -> list[int]:
    """Choose layers that show how tokens leave: the first, the last, and others whose counts differ most from theirs.

    Args:
        kept: the image.
        most: layers to choose, at least 2; fewer where fewer differ.
    """
    counts, layers = kept.counts, {0, kept.layers - 1}
    while len(layers) < most:
        away = [min(abs(count - counts[other]) for other in layers) for count in counts]
        if not max(away):
            break
        layers.add(away.index(max(away)))
    return sorted(layers)
