"""All benchmarks by name."""

from __future__ import annotations

import re

from fitprune.benchmarks.base import Benchmark
from fitprune.benchmarks.chartqa import CHARTQA
from fitprune.benchmarks.docvqa import DOCVQA, DOCVQA_TEST
from fitprune.benchmarks.gqa import GQA
from fitprune.benchmarks.mmbench import MMBENCH, MMBENCH_CN, MMBENCH_CN_TEST, MMBENCH_TEST
from fitprune.benchmarks.mme import MME
from fitprune.benchmarks.mmvet import MMVET
from fitprune.benchmarks.ocrbench import OCRBENCH
from fitprune.benchmarks.pope import POPE
from fitprune.benchmarks.scienceqa import SCIENCEQA
from fitprune.benchmarks.seed import SEED
from fitprune.benchmarks.textvqa import TEXTVQA
from fitprune.benchmarks.vizwiz import VIZWIZ, VIZWIZ_VAL
from fitprune.benchmarks.vqav2 import VQAV2, VQAV2_VAL

# The paper's ten, then others, and other splits last.
_ALL = (
    *(TEXTVQA, GQA, VQAV2, VIZWIZ, SCIENCEQA, POPE, MMVET, MMBENCH, MMBENCH_CN, MME),
    *(SEED, CHARTQA, DOCVQA, OCRBENCH),
    *(VQAV2_VAL, VIZWIZ_VAL, MMBENCH_TEST, MMBENCH_CN_TEST, DOCVQA_TEST),
)
BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in _ALL}


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
