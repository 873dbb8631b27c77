"""PyramidDrop (arXiv:2410.17247): three removals along the depth, each to the same share of what is there.

Differs from the authors' code: their stages (1/4, 2/4, 3/4 of the depth) and share (0.5) give one budget only. Here
the share is solved for, and the stages move together, earlier or later, to where it is nearest to 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

from fitprune.baselines.base import Counts, Solution, Target, baseline, fits, largest
from fitprune.fitting.budget import Budget, OutOfReach


@baseline(
    scorer="last",
    source="PyramidDrop, arXiv:2410.17247",
    shift="layers by which the stages move from 1/4, 2/4 and 3/4 of the depth",
)
def pyramiddrop(target: Target, budget: Budget, *, shift: int | None = None) -> Solution:
    """Three removals, before the layers at 1/4, 2/4 and 3/4 of the depth, moved by `shift`."""
    layers = target.model.decoder.layers
    authors = [round(layers * part / 4) for part in (1, 2, 3)]
    possible = range(-authors[0], layers - authors[-1])
    if shift is not None and shift not in possible:
        raise ValueError(f"pyramiddrop:shift={shift}: must be from {possible[0]} to {possible[-1]}")
    solved = []
    for moved in possible if shift is None else [shift]:
        stages = [stage + moved for stage in authors]
        if (share := _share(target, budget, stages)) is not None:
            solved.append((abs(share - 0.5), moved, stages, share))
    if not solved:
        raise OutOfReach(
            f"pyramiddrop cannot meet {budget.kind}={budget.value} with stages before layers "
            f"{[stage + (shift or 0) for stage in authors]} of {layers}: ask for less, or for an earlier shift"
        )
    _, moved, stages, share = min(solved)
    left, _ = _counts(target, stages, share)
    room = left[stages[-1] - 1] - left[-1]
    last = largest(lambda more: fits(target, budget, _counts(target, stages, share, more)), room) or 0
    return _counts(target, stages, share, last), {"stages": stages, "share": round(share, 4), "shift": moved}


def _counts(target: Target, stages: Sequence[int], share: float, last: int = 0) -> Counts:
    """Each stage keeps `share` of what is there, rounded down; the last stage `last` tokens more."""
    n = target.visual_tokens
    left = [int(n * share ** sum(layer >= stage for stage in stages)) for layer in range(target.model.decoder.layers)]
    left = [count + (last if layer >= stages[-1] else 0) for layer, count in enumerate(left)]
    return left, left


def _share(target: Target, budget: Budget, stages: Sequence[int]) -> float | None:
    """The largest share that meets the budget; None if not even 0 does."""
    if not fits(target, budget, _counts(target, stages, 0.0)):
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(target, budget, _counts(target, stages, middle)) else (low, middle)
    return low
