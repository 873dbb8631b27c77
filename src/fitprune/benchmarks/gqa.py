"""GQA, test-dev balanced: compositional questions about scenes; exact match, also by structural type.

Source: convert_gqa_for_eval.py and scripts/v1_5/eval/gqa.sh of LLaVA, eval.py of GQA.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fitprune.benchmarks.base import Benchmark, Needed, Upload
from fitprune.benchmarks.reading import annotation, field, read_json, read_questions
from fitprune.calibration.samples import Sample

FILE = "testdev_balanced_questions.json"


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions, each with its answer and its structural type (query, verify, choose, logical, compare).

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question has no annotation.
    """
    path = paths["annotations"]
    annotations = read_json(path)
    questions = []
    for sample in read_questions(paths):
        entry = annotation(annotations, str(sample.id), sample, path, FILE)
        where = f"{path}, question {sample.id}"
        answer = field(entry if isinstance(entry, dict) else {}, "answer", where)
        types = entry.get("types")
        kind = field(types, "structural", where) if isinstance(types, dict) and "structural" in types else ""
        questions.append(dataclasses.replace(sample, answers=(answer,), kind=kind))
    return questions


def answer_of(text: str) -> str:
    """Read an answer: in lower case, without full stops at its end. Quirk, kept: spaces and other marks stay."""
    return text.rstrip(".").lower()


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is the annotated one, letter by letter."""
    return float(answer_of(text) == sample.answers[0])


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write what GQA's eval.py reads."""
    pairs = zip(samples, answers, strict=True)
    path.write_text(json.dumps([{"questionId": sample.id, "prediction": answer_of(text)} for sample, text in pairs]))


GQA = Benchmark(
    name="gqa",
    title="GQA test-dev balanced",
    metric="accuracy",
    needs=(
        Needed("questions", ("gqa/llava_gqa_testdev_balanced.jsonl",)),
        Needed(
            "annotations",
            tuple(
                f"gqa/{folder}{FILE}"
                for folder in ("data/", "data/questions1.2/", "data/questions/", "questions1.2/", "")
            ),
        ),
        Needed("images", ("gqa/data/images", "gqa/images")),
    ),
    read=read,
    score=score,
    upload=Upload(".json", write, "eval.py of GQA, as testdev_balanced_predictions.json"),
)
