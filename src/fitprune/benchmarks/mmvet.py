"""MM-Vet: open questions that need several abilities; GPT-4 grades the answers, so none is scored here.

Source: model_vqa.py, convert_mmvet_for_eval.py and scripts/v1_5/eval/mmvet.sh of LLaVA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fitprune.benchmarks.base import LONG, Benchmark, Needed, Upload
from fitprune.benchmarks.reading import read_questions
from fitprune.calibration.samples import Sample


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions.

    Args:
        paths: role -> path.
    """
    return list(read_questions(paths))


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write what the evaluator takes."""
    texts = {f"v1_{sample.id}": text for sample, text in zip(samples, answers, strict=True)}
    path.write_text(json.dumps(texts, indent=2))


FOLDERS = ("mm-vet", "mm-vet/mm-vet", "mmvet", "mmvet/mm-vet")  # the archive has a folder mm-vet of its own
MMVET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    metric="grade by GPT-4",
    needs=(
        Needed("questions", tuple(f"{folder}/llava-mm-vet.jsonl" for folder in FOLDERS)),
        Needed("images", tuple(f"{folder}/images" for folder in FOLDERS)),
    ),
    read=read,
    score=None,
    max_new_tokens=LONG,
    upload=Upload(".json", write, "MM-Vet's evaluator, which asks GPT-4"),
)
