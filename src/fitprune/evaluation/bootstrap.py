"""Bootstrap intervals of accuracies, over questions and seeds, and when a lead counts as one. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 2000
MOST_WEIGHTS = 1 << 22  # of units in draws at once
LEVEL = 0.95
FEWEST_AHEAD = 6  # questions; a lead of five is luck in one case of 16, even where none is lost (sign test)


def sums(counts: np.ndarray[Any, Any], seed: int = 0) -> np.ndarray[Any, Any]:
    """Draw as many units as there are, with replacement, RESAMPLES times, and add up what they count.

    Counts of all methods go side by side, so that a draw holds the same units for each: differences are paired.

    Args:
        counts: [units, columns].
        seed: seed of the draws.

    Returns:
        [RESAMPLES, columns].
    """
    units = len(counts)
    generator = np.random.default_rng(seed)
    block = max(2, min(RESAMPLES, MOST_WEIGHTS // units // 2 * 2))  # of draws, so that memory stays small
    totals = []
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = generator.integers(0, units, (rows, units), dtype=np.int32)
        places = drawn + units * np.arange(rows, dtype=np.int64)[:, None]
        weights = np.bincount(places.ravel(), minlength=rows * units).reshape(rows, units)
        totals.append(weights.astype(np.float64) @ counts)
    return np.concatenate(totals)


def over_seeds(draws: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Average a method's figure over its seeds, which are drawn too if there are several.

    Args:
        draws: of each seed, the figure of each draw [RESAMPLES].

    Returns:
        [RESAMPLES].
    """
    each = np.stack(draws, 1)
    if len(draws) == 1:
        return np.asarray(each[:, 0])
    # The seeds' draws have a generator of their own: the units' stay paired with every other figure's.
    drawn = np.random.default_rng(1).integers(0, len(draws), each.shape)
    return np.asarray(np.take_along_axis(each, drawn, 1).mean(1))


def interval(draws: np.ndarray[Any, Any]) -> Interval:
    """Compute the 95% percentile interval."""
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return round(float(low), 6), round(float(high), 6)


def is_sure(lead: float, spread: Interval, questions: int) -> bool:
    """Whether a lead in accuracy is beyond luck: its interval is above 0, and it is of enough questions.

    Args:
        lead: the difference of accuracies, above 0 or not.
        spread: its paired bootstrap interval, which is too narrow if few questions differ.
        questions: number of questions.
    """
    return spread[0] > 0 and round(lead * questions, 2) >= FEWEST_AHEAD
