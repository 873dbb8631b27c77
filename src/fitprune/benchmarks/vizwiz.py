"""VizWiz: what blind people asked of their own pictures, some of which cannot be answered; VQA's soft accuracy.

An answer is normalised twice: by EvalAI's rule before it is sent in, as LLaVA does, and by VizWiz's evaluation.

Source: convert_vizwiz_for_submission.py and scripts/v1_5/eval/vizwiz.sh of LLaVA, vqaEval.py of VizWiz's API (Qing Li).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed, Upload
from fitprune.benchmarks.evalai import evalai
from fitprune.benchmarks.reading import annotation, annotators, field, index, question, read_list, read_questions
from fitprune.benchmarks.soft_accuracy import vizwiz_accuracy
from fitprune.calibration.samples import Sample

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
ANNOTATIONS = ("vizwiz/val.json", "vizwiz/Annotations/val.json", "vizwiz/annotations/val.json")


def read_test(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions of test.

    Args:
        paths: role -> path.
    """
    return list(read_questions(paths))


def read_val(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions of val, in LLaVA's form or with its instructions, each with its annotators' answers.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question's picture has no annotation.
    """
    path = paths["annotations"]
    annotations = index(read_list(path), lambda entry, where: field(entry, "image", where))
    questions = []
    for sample in read_questions(paths) if paths["questions"].suffix == ".jsonl" else official(paths):
        where, entry = annotation(annotations, sample.facts["image"], sample, path, "VizWiz's val.json")
        kind = field(entry, "answer_type", where) if "answer_type" in entry else ""
        questions.append(dataclasses.replace(sample, answers=annotators(entry, where), kind=kind))
    return questions


def official(paths: Mapping[str, Path]) -> Iterator[Sample]:
    """Yield the questions of VizWiz's own file, with LLaVA's instructions; an id is the place in the file."""
    for number, (where, entry) in enumerate(read_list(paths["questions"])):
        text = field(entry, "question", where) + UNANSWERABLE + ONE_WORD
        yield question(paths, where, number, text, field(entry, "image", where))


def score(text: str, sample: Sample) -> float:
    """Score the answer that would be sent in, as the server does."""
    return vizwiz_accuracy(evalai(text), sample.answers)


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write what the server takes."""
    pairs = zip(samples, answers, strict=True)
    path.write_text(json.dumps([{"image": sample.facts["image"], "answer": evalai(text)} for sample, text in pairs]))


UPLOAD = Upload(".json", write, "the VizWiz challenge on eval.ai (2185)")
VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz test",
    metric="soft accuracy",
    needs=(
        Needed("questions", ("vizwiz/llava_test.jsonl",)),
        Needed("images", ("vizwiz/test", "vizwiz/images/test")),
    ),
    read=read_test,
    score=None,
    upload=UPLOAD,
    aliases=("vizwiz-test",),
)
VIZWIZ_VAL = Benchmark(
    name="vizwiz-val",
    title="VizWiz val",
    metric="soft accuracy",
    needs=(
        Needed("questions", ("vizwiz/llava_val.jsonl", *ANNOTATIONS)),
        Needed("annotations", ANNOTATIONS),
        Needed("images", ("vizwiz/val", "vizwiz/images/val")),
    ),
    read=read_val,
    score=score,
    upload=UPLOAD,
)
