"""Measured times of an evaluation: prefill and decoding of each method, as ratios to the dense model's."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fitprune.evaluation.entries import firsts
from fitprune.evaluation.run import Run
from fitprune.evaluation.summary import DENSE
from fitprune.speed.in_turn import decode_seconds, prefill_seconds, time_ratios


def time_methods(run: Run, batches: int) -> dict[str, Any]:
    """Time prefill and decoding of each method in turn.

    Args:
        run: the evaluation.
        batches: number of batches, the first of each task; 0 for none.

    Returns:
        Ratios for each method and budget, with the dense model's seconds; empty without batches or images.
    """
    if not batches or all(sample.image is None for samples in run.tasks.values() for sample in samples):
        return {}
    entries = firsts(run.entries)
    prefill: list[list[float]] = [[] for _ in [None, *entries]]
    decode: list[list[float]] = [[] for _ in prefill]
    for task, all_samples in run.tasks.items():
        samples = [sample for sample in all_samples if sample.image is not None]
        for start in range(0, min(batches * run.batch_size, len(samples)), run.batch_size):
            inputs = run.inputs(task, samples[start : start + run.batch_size])
            places = range(len(inputs["input_ids"]))
            blocks = [functools.partial(run.pruned, entry, places) for entry in [None, *entries]]
            for seconds, measured in (
                (prefill, prefill_seconds(run.model, inputs, blocks)),
                (decode, decode_seconds(run.model, inputs, blocks)),
            ):
                for row, new in zip(seconds, measured, strict=True):
                    row += new
    methods = [(DENSE, None), *((entry.name, entry.budget) for entry in entries)]
    return {
        "batch_size": run.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(run.model.device),
        "dense_prefill_seconds": min(prefill[0]),
        "dense_decode_seconds_per_token": min(decode[0]),
        "rows": [
            {"method": name, "budget": budget, "prefill_ratio": round(p, 4), "decode_ratio": round(d, 4)}
            for (name, budget), p, d in zip(methods, time_ratios(prefill), time_ratios(decode), strict=True)
        ],
    }
