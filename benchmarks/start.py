"""Time what a user waits for before any work: import, help of each command, and ten budgets from full-size statistics.

    python benchmarks/start.py

Prints medians in seconds; one JSON document last. The statistics are synthetic: 655 samples x 32 layers x 576 tokens,
the size of the authors' calibration for LLaVA-1.5-7B.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import torch

from fitprune import AttentionStats
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter

COMMANDS = ([], ["measure"], ["fit"], ["cost"], ["generate"], ["evaluate"], ["demo"])


def wall(command: list[str], repeats: int = 7) -> float:
    """Median seconds of a whole command."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    figures = {"python": wall([sys.executable, "-c", "pass"])}
    figures["import fitprune"] = wall([sys.executable, "-c", "import fitprune"])
    for command in COMMANDS:
        run = "import sys; from fitprune.cli.main import main; main(sys.argv[1:])"
        figures[" ".join(["fitprune", *command, "--help"])] = wall([sys.executable, "-c", run, *command, "--help"])

    shape = ModelFingerprint("llava", DecoderSizes(32, 4096, 11008, 32, 32, 128))
    draws = torch.randn(2, 32, 655 * 576, generator=torch.Generator().manual_seed(0)).mul_(1.5).exp_()
    names = tuple(map(str, range(655)))
    stats = AttentionStats(draws[0], draws[1], (576,) * 655, (60,) * 655, names, shape)
    started = time.perf_counter()
    fitter = Fitter(stats)
    for budget in range(5, 100, 10):
        fitter.fit(checked_budget("flops_reduction", min(budget / 100, 0.95)))
    figures["fit ten budgets"] = time.perf_counter() - started
    for name, seconds in figures.items():
        print(f"{name:28} {seconds:7.3f} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
