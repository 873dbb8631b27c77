"""Measured times of an evaluation: prefill and decoding of each method, as ratios to the dense model's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tqdm import tqdm

from fitprune.evaluation.entries import firsts
from fitprune.evaluation.run import Run
from fitprune.evaluation.summary import DENSE
from fitprune.speed import in_turn


def time_methods(run: Run, batches: int, *, progress: bool = False) -> dict[str, Any]:
    """Time prefill and decoding of each method in turn.

    Args:
        run: the evaluation.
        batches: number of batches, the first of each task; 0 for none.
        progress: show a progress bar.

    Returns:
        Ratios for each method and budget, with the dense model's seconds; empty without batches or images.
    """
    if not batches or all(sample.image is None for samples in run.tasks.values() for sample in samples):
        return {}
    entries = firsts(run.entries)
    prefill: list[list[float]] = [[] for _ in [None, *entries]]
    decode: list[list[float]] = [[] for _ in prefill]
    chosen = [
        (task, samples[start : start + run.batch_size])
        for task, all_samples in run.tasks.items()
        for samples in [[sample for sample in all_samples if sample.image is not None]]
        for start in range(0, min(batches * run.batch_size, len(samples)), run.batch_size)
    ]
    rounds = len(chosen) * (in_turn.PREFILLS + in_turn.DECODES + 2) * len(prefill)
    with tqdm(desc="time", total=rounds, unit="run", disable=not progress or None) as bar:
        for task, samples in chosen:
            inputs = run.inputs(task, samples)
            places = range(len(inputs["input_ids"]))
            blocks = [functools.partial(run.pruned, entry, places) for entry in [None, *entries]]
            for seconds, measured in (
                (prefill, in_turn.prefill_seconds(run.model, inputs, blocks, step=bar.update)),
                (decode, in_turn.decode_seconds(run.model, inputs, blocks, step=bar.update)),
            ):
                for row, new in zip(seconds, measured, strict=True):
                    row += new
    ratios = zip(in_turn.time_ratios(prefill), in_turn.time_ratios(decode), strict=True)
    methods = [(DENSE, None), *((entry.name, entry.budget) for entry in entries)]
    return {
        "batch_size": run.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(run.model.device),
        "dense_prefill_seconds": min(prefill[0]),
        "dense_decode_seconds_per_token": min(decode[0]),
        "rows": [
            {"method": name, "budget": budget, "prefill_ratio": round(p, 4), "decode_ratio": round(d, 4)}
            for (name, budget), (p, d) in zip(methods, ratios, strict=True)
        ],
    }
