"""Whether accuracy measures the wording of answers, or nothing, as the dense model's answers show. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fitprune._support.journal import Record
from fitprune.evaluation import metrics
from fitprune.evaluation.summary import ALMOST_NOTHING, DENSE

SEVERAL = 6  # different questions; if they all get one answer, a warning says so
MANY_NEAR = 0.1  # share of the questions in which dense is wrong by words around alone that is worth a warning


def check_wording(judged: Sequence[Record], dense: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Compute the dense model's accuracy, and whether it measures the wording: how often, and an example."""
    accuracy = round(float(dense.mean()), 6)
    wrong = [record for record, score in zip(judged, dense, strict=True) if score == 0]
    near = [record for record in wrong if metrics.is_near(record["said"][DENSE], record["accepted"])]
    task = {"dense": accuracy, "near": len(near)}
    if accuracy >= ALMOST_NOTHING and len(near) <= MANY_NEAR * len(judged):
        return task
    example = [*near, *wrong][0]
    return {**task, "mismatch": (next(filter(str.strip, example["accepted"])), example["said"][DENSE])}


def one_answer(records: Sequence[Record]) -> str | None:
    """Find the dense model's answer to all questions, if it has only one, they are several, and not all accept it."""
    answers = {record["said"][DENSE] for record in records}
    questions = {(record["question"], *record["accepted"]) for record in records}
    accepts = all(metrics.normalized(record["said"][DENSE], record["accepted"]) for record in records)
    return answers.pop() if len(answers) == 1 and len(questions) >= SEVERAL and not accepts else None
