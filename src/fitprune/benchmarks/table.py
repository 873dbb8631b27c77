"""All benchmarks by name."""

from __future__ import annotations

import re

from fitprune.benchmarks.base import Benchmark
from fitprune.benchmarks.gqa import GQA
from fitprune.benchmarks.pope import POPE
from fitprune.benchmarks.textvqa import TEXTVQA
from fitprune.benchmarks.vizwiz import VIZWIZ, VIZWIZ_VAL
from fitprune.benchmarks.vqav2 import VQAV2, VQAV2_VAL

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each for each in (POPE, TEXTVQA, GQA, VQAV2, VQAV2_VAL, VIZWIZ, VIZWIZ_VAL)
}


def get_benchmark(name: str) -> Benchmark:
    """Find a benchmark by its name, whatever its case and hyphens: "MM-Vet" is "mmvet".

    Args:
        name: its name, or one of its aliases.

    Raises:
        ValueError: there is none of that name.
    """
    for benchmark in BENCHMARKS.values():
        if _plain(name) in map(_plain, (benchmark.name, *benchmark.aliases)):
            return benchmark
    raise ValueError(f"{name!r}: no such benchmark; there are {', '.join(BENCHMARKS)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
