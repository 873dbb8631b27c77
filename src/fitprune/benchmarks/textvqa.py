"""TextVQA: questions about text in the picture; VQA's soft accuracy.

Source: eval_textvqa.py, m4c_evaluator.py and scripts/v1_5/eval/textvqa.sh of LLaVA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitprune._support.messages import short
from fitprune.benchmarks.base import Benchmark, Needed
from fitprune.benchmarks.evalai import evalai
from fitprune.benchmarks.reading import annotation, field, index, read_list, read_questions
from fitprune.benchmarks.soft_accuracy import soft_accuracy
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

FILE = "TextVQA_0.5.1_val.json"
ANNOTATORS = 10


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions, each with the answers of ten annotators.

    A question's id is its image's, and not unique: image and question together are.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question is not among the annotations, or has not ten answers.
    """
    path = paths["annotations"]
    annotations = index(
        read_list(path, "data"),
        lambda entry, where: (field(entry, "image_id", where), field(entry, "question", where).lower()),
    )
    questions = []
    for sample in read_questions(paths):
        name = (str(sample.id), question_of(sample.text))
        where, entry = annotation(annotations, name, sample, path, FILE)
        people = field(entry, "answers", where, list)
        if len(people) != ANNOTATORS or not all(isinstance(person, str) for person in people):
            raise BadSample(f"{where}: 'answers' is {short(people, 80)}, must be a list of {ANNOTATORS} texts")
        questions.append(dataclasses.replace(sample, answers=tuple(people)))
    return questions


def question_of(prompt: str) -> str:
    """Find the question in a prompt, in lower case: it is the first line, also where no OCR tokens follow it.

    OCR tokens may come before it too: in the line before, or as "OCR tokens: ... Question: ... Short answer:".
    """
    if prompt.startswith("OCR tokens: ") and (inner := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)):
        return inner[1].lower()
    first, *others = prompt.split("\n")
    return (others[0] if others and first.startswith("Reference OCR token:") else first).lower()


def key(line: Mapping[str, Any]) -> tuple[str, str]:
    """Find the question of a line by its image and its words."""
    return str(line["question_id"]), question_of(line["prompt"])


def score(text: str, sample: Sample) -> float:
    """Score an answer by the annotators', all normalised as EvalAI does it."""
    return soft_accuracy(evalai(text), [evalai(person) for person in sample.answers])


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA val",
    metric="soft accuracy",
    needs=(
        Needed("questions", ("textvqa/llava_textvqa_val_v051_ocr.jsonl",)),
        Needed("annotations", (f"textvqa/{FILE}",)),
        Needed("images", ("textvqa/train_images", "textvqa/train_val_images/train_images")),
    ),
    read=read,
    score=score,
    key=key,
    aliases=("textvqa-val",),
)
