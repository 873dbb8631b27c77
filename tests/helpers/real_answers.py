"""Real answers of LLaVA-1.5-13B: slices that lie in tests/data/benchmarks, and the whole files where somebody has them.

Questions, labels and answers are of LLaVA's evaluation files (haotian-liu/LLaVA at 32cebc38) and of AoiDragon/POPE at
e3e39262. FITPRUNE_REAL_ANSWERS names a folder with the whole ones, laid out as LLaVA's `playground/data/eval`.
"""

import os
from pathlib import Path

import pytest

from fitprune.benchmarks.answers import matched, read_answers, scores
from fitprune.benchmarks.reading import load_benchmark

SLICE = Path(__file__).parents[1] / "data/benchmarks"
ANSWERS = "answers/llava-v1.5-13b.jsonl"


def whole():
    """The folder of the whole files."""
    if folder := os.environ.get("FITPRUNE_REAL_ANSWERS"):
        return Path(folder)
    # 13 MB of other people's files, which the repository does not hold; the slices are tested everywhere.
    pytest.skip("FITPRUNE_REAL_ANSWERS names no folder with LLaVA's answers")


def figures(benchmark, root, answers):
    """The figures of an answers file, with the questions of a root, or, without one, those that the file holds."""
    lines = read_answers(answers)
    questions = load_benchmark(benchmark, root, images=False) if root else benchmark.rebuild(lines)
    samples, texts = matched(benchmark, questions, lines)
    return benchmark.measure(samples).of(scores(benchmark, samples, texts))
