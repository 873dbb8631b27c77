"""Compare seconds fairly: on the same inputs, in one run, in turn; ratios are taken within a round."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fitprune._support.host import cache_argument, cache_in
from fitprune.speed.clocks import now

# Makes the block in which a method works; a null context is the dense model.
Block = Callable[[], contextlib.AbstractContextManager[Any]]
PREFILLS, DECODES = 5, 3  # rounds that count


def prefill_seconds(
    model: Any,
    inputs: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    repeats: int = PREFILLS,
    step: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Time the prefill of one batch in each block.

    The blocks take turns within every repeat, so that a drift of the machine meets all of them; one round before the
    first is thrown away; a CUDA device is synchronised.

    Args:
        model: a supported model.
        inputs: one batch, on the model's device.
        blocks: what is compared.
        repeats: rounds.
        step: is called after each run, `repeats` + 1 for each block.

    Returns:
        For each block, seconds of each round.
    """

    def prefill() -> float:
        begin = now(model)
        model(**inputs, logits_to_keep=1)
        return now(model) - begin

    return _in_turn(prefill, blocks, repeats, step)


def decode_seconds(
    model: Any,
    inputs: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    steps: int = 16,
    repeats: int = DECODES,
    step: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Time a step of decoding after the prefill of one batch in each block, in turn like `prefill_seconds`.

    Args:
        model: a supported model.
        inputs: one batch, on the model's device.
        blocks: what is compared.
        steps: decoding steps timed in a row, of which the mean is taken.
        repeats: rounds.
        step: as for `prefill_seconds`.

    Returns:
        For each block, seconds of one step, of each round.
    """

    def decode() -> float:
        outputs = greedy_outputs(model, inputs)
        next(outputs)
        begin = now(model)
        for _ in range(steps):
            next(outputs)
        return (now(model) - begin) / steps

    return _in_turn(decode, blocks, repeats, step)


def greedy_outputs(model: Any, inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Decode one batch greedily and never end: the output of the prefill, then that of each step."""
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    position = mask.long().sum(1, keepdim=True)
    while True:
        yield output
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=output.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            position_ids=position,
            **cache_argument(model, cache_in(output)),
            use_cache=True,
        )
        position = position + 1


def _in_turn(
    timed: Callable[[], float], blocks: Sequence[Block], repeats: int, step: Callable[[], object]
) -> list[list[float]]:
    """Run `timed` in every block, round after round; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in blocks]
    for turn in range(repeats + 1):
        for block, counted in zip(blocks, seconds, strict=True):
            with torch.inference_mode(), block():
                spent = timed()
            if turn:
                counted.append(spent)
            step()
    return seconds


def time_ratios(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Give each entry's time as a ratio to the first's: the median over rounds of the ratio within the round."""
    return [statistics.median(b / a for a, b in zip(seconds[0], row, strict=True)) for row in seconds]
