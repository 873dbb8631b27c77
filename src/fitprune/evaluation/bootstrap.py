"""Bootstrap intervals of accuracies, over questions and seeds, and when a lead counts as one. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_AHEAD = 6  # questions; a lead of five is luck in one case of 16, even where none is lost (sign test)


class Bootstrap:
    """Draws of samples, the same for every figure of a task, so that differences are paired.

    Args:
        samples: number of samples.
        seed: seed of the draws.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.draws = np.random.default_rng(seed).integers(0, samples, (RESAMPLES, samples), dtype=np.int32)

    def means(self, hits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Average each draw: hits [seeds, samples] -> [RESAMPLES]; seeds are drawn too if there are several."""
        seeds = len(hits)
        if seeds == 1:
            return np.asarray(hits[0][self.draws].mean(1))
        # The seeds' draws have a generator of their own: the samples' stay paired with every other figure's.
        drawn = np.random.default_rng(1).integers(0, seeds, (RESAMPLES, seeds))
        each = np.stack([row[self.draws].mean(1) for row in hits], 1)  # [RESAMPLES, seeds]
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
