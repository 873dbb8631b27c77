"""Time pruned against dense, fairly: in turn, in one run, on the same inputs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Makes the block in which a method works; a null context is the dense model.
Block = Callable[[], contextlib.AbstractContextManager[Any]]


def prefill_seconds(
    model: Any, inputs: Mapping[str, Any], blocks: Sequence[Block], *, repeats: int = 5
) -> list[list[float]]:
    """Time the prefill of one batch in each block.

    The blocks take turns within every repeat, so that a drift of the machine meets all of them; one round before the
    first is thrown away; a CUDA device is synchronised.

    Args:
        model: a supported model.
        inputs: one batch, on the model's device.
        blocks: what is compared.
        repeats: rounds.

    Returns:
        For each block, seconds of each round.
    """

    def prefill() -> float:
        started = _now(model)
        model(**inputs, logits_to_keep=1)
        return _now(model) - started

    return _in_turn(prefill, blocks, repeats)


def decode_seconds(
    model: Any, inputs: Mapping[str, Any], blocks: Sequence[Block], *, steps: int = 16, repeats: int = 3
) -> list[list[float]]:
    """Time a step of decoding after the prefill of one batch in each block; arguments as for `prefill_seconds`.

    Args:
        steps: decoding steps timed in a row, of which the mean is taken.

    Returns:
        For each block, seconds a step of each round.
    """

    def decode() -> float:
        made = model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        position = mask.long().sum(1, keepdim=True)
        started = _now(model)
        for step in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            made = model(
                input_ids=made.logits[:, -1:].argmax(-1),
                attention_mask=mask,
                position_ids=position + step,
                past_key_values=made.past_key_values,
                use_cache=True,
            )
        return (_now(model) - started) / steps

    return _in_turn(decode, blocks, repeats)


def _in_turn(timed: Callable[[], float], blocks: Sequence[Block], repeats: int) -> list[list[float]]:
    """Run `timed` in every block, round after round; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in blocks]
    for turn in range(repeats + 1):
        for block, kept in zip(blocks, seconds, strict=True):
            with torch.inference_mode(), block():
                spent = timed()
            if turn:
                kept.append(spent)
    return seconds


def time_ratios(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Give each entry's time as a ratio to the first's: the median over rounds of the ratio within the round."""
    return [statistics.median(b / a for a, b in zip(seconds[0], row, strict=True)) for row in seconds]


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
