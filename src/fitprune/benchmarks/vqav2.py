"""VQAv2: open questions about COCO's pictures; VQA's soft accuracy, also by type of answer.

An answer is normalised twice: by EvalAI's rule before it is sent in, as LLaVA does, and by VQA's evaluation.

Source: convert_vqav2_for_submission.py and scripts/v1_5/eval/vqav2.sh of LLaVA, vqaEval.py of the VQA authors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed, Upload
from fitprune.benchmarks.evalai import evalai
from fitprune.benchmarks.reading import (
    annotation,
    annotators,
    field,
    index,
    question,
    read_jsonl,
    read_list,
    read_questions,
)
from fitprune.benchmarks.soft_accuracy import vqa_accuracy
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

FILE = "v2_mscoco_val2014_annotations.json"


def read_test(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions of test-dev; `facts["split"]` is the file of all that the server wants an answer to.

    Args:
        paths: role -> path.
    """
    split = paths.get("split")
    return [dataclasses.replace(each, facts={**each.facts, "split": split}) for each in read_questions(paths)]


def read_val(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions of val, LLaVA's or the official ones, each with its annotators' answers.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question has no annotation, or no annotator.
    """
    path = paths["annotations"]
    annotations = index(
        read_list(path, "annotations"), lambda entry, where: str(field(entry, "question_id", where, (int, str)))
    )
    questions = []
    for sample in read_questions(paths) if paths["questions"].suffix == ".jsonl" else official(paths):
        where, entry = annotation(annotations, str(sample.id), sample, path, FILE)
        people, kind = annotators(entry, where), field(entry, "answer_type", where)
        questions.append(dataclasses.replace(sample, answers=people, kind=kind))
    return questions


def official(paths: Mapping[str, Path]) -> Iterator[Sample]:
    """Yield the questions of the VQA authors' file, with LLaVA's instruction."""
    for where, entry in read_list(paths["questions"], "questions"):
        number, image = field(entry, "question_id", where, int), field(entry, "image_id", where, int)
        text = field(entry, "question", where) + ONE_WORD
        yield question(paths, where, number, text, f"COCO_val2014_{image:012d}.jpg")


def score(text: str, sample: Sample) -> float:
    """Score the answer that would be sent in, as the server does."""
    return vqa_accuracy(evalai(text), sample.answers)


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write what the server takes; questions of the whole split that were not asked have an empty answer.

    Args:
        samples: the questions.
        answers: [questions].
        path: the file.

    Raises:
        BadSample: a question is not of the split.
    """
    texts = {str(sample.id): evalai(text) for sample, text in zip(samples, answers, strict=True)}
    numbers, split = [sample.id for sample in samples], samples[0].facts.get("split") if samples else None
    if split:
        numbers = [field(entry, "question_id", where, (int, str)) for where, entry in read_jsonl(split)]
        if absent := texts.keys() - map(str, numbers):
            raise BadSample(
                f"{split}: has no question {min(absent)}, which was answered ({len(absent):,} of {len(texts):,} are "
                "missing): it is of another state than the questions; copy both again"
            )
    path.write_text(json.dumps([{"question_id": name, "answer": texts.get(str(name), "")} for name in numbers]))


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2 test-dev",
    metric="soft accuracy",
    needs=(
        Needed("questions", ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",)),
        Needed("split", ("vqav2/llava_vqav2_mscoco_test2015.jsonl",), optional=True),
        Needed("images", ("vqav2/test2015", "vqav2/images/test2015", "coco/test2015")),
    ),
    read=read_test,
    score=None,
    upload=Upload(".json", write, "the VQA challenge on eval.ai (830), test-dev"),
    aliases=("vqav2-testdev",),
)
VQAV2_VAL = Benchmark(
    name="vqav2-val",
    title="VQAv2 val",
    metric="soft accuracy",
    needs=(
        Needed(
            "questions",
            ("vqav2/llava_vqav2_mscoco_val2014.jsonl", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"),
        ),
        Needed("annotations", (f"vqav2/{FILE}",)),
        Needed("images", ("vqav2/val2014", "vqav2/images/val2014", "coco/val2014", "pope/val2014")),
    ),
    read=read_val,
    score=score,
    upload=Upload(".json", write, "vqaEval.py of the VQA authors"),
)
