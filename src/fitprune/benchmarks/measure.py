"""How scores of questions become a benchmark's figures, so that a bootstrap can draw them again. Pure numpy.

Every figure is computed from sums over units that are drawn together: a question, or all questions of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from fitprune.calibration.samples import Sample

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure and its groups.

    Attributes:
        counts: from scores [questions] to what is added up, [units, columns].
        figures: from sums [..., columns] to name -> figure [...], as published; the first is the benchmark's.
    """

    counts: Callable[[Array], Array]
    figures: Callable[[Array], dict[str, Array]]

    def of(self, scores: Sequence[float] | Array) -> dict[str, float]:
        """Compute the figures of scores [questions]."""
        totals = self.counts(np.asarray(scores, dtype=np.float64)).sum(0)
        return {name: float(value) for name, value in self.figures(totals).items()}


def mean_by_group(
    samples: Sequence[Sample],
    *,
    name: str = "accuracy",
    scale: float = 100,
    groups_of: Callable[[Sample], Collection[str]] = lambda sample: (sample.kind,),
) -> Measure:
    """Average over all questions, and over those of each group.

    Args:
        samples: the questions.
        name: of the figure over all.
        scale: what a score of 1 is worth.
        groups_of: the groups of a question; by default its kind.
    """
    kinds = [groups_of(sample) for sample in samples]
    groups = sorted({group for own in kinds for group in own} - {""})
    member = np.array([[True, *(group in own for group in groups)] for own in kinds], dtype=np.float64)

    def counts(scores: Array) -> Array:
        return np.concatenate([scores[:, None] * member, member], 1)

    def figures(totals: Array) -> dict[str, Array]:
        means = scale * share(*np.split(totals, 2, -1))
        return {each: means[..., column] for column, each in enumerate([name, *groups])}

    return Measure(counts, figures)


def share(part: Array, whole: Array) -> Array:
    """Divide sums; 0 where there is nothing to divide by, as in a draw without a question of a group."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
