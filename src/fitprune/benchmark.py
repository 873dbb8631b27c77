"""Time pruned against dense prefill, fairly: in turn, in one run, on the same inputs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune.pruning import prune
from fitprune.recipe import PruningRecipe


def prefill_seconds(
    model: Any, inputs: Mapping[str, Any], recipes: Sequence[PruningRecipe | None], *, repeats: int = 5
) -> list[list[float]]:
    """Time the prefill of one batch with each recipe.

    The recipes take turns within every repeat, so that a drift of the machine meets all of them; one round before the
    first is thrown away; a CUDA device is synchronised.

    Args:
        model: a supported model.
        inputs: one batch, on the model's device.
        recipes: None stands for the dense model.
        repeats: rounds.

    Returns:
        For each recipe, seconds of each round.
    """
    seconds: list[list[float]] = [[] for _ in recipes]
    for turn in range(repeats + 1):
        for recipe, kept in zip(recipes, seconds, strict=True):
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if recipe is not None:
                    stack.enter_context(prune(model, recipe))
                _synchronize(model)
                started = time.perf_counter()
                model(**inputs, logits_to_keep=1)
                _synchronize(model)
                if turn:
                    kept.append(time.perf_counter() - started)
    return seconds


def time_ratios(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Give each entry's time as a ratio to the first's: the median over rounds of the ratio within the round."""
    return [statistics.median(b / a for a, b in zip(seconds[0], row, strict=True)) for row in seconds]


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
