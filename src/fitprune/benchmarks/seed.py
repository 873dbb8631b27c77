"""SEED-Bench, its image part: four lettered choices; accuracy, also by type of question.

Source: model_vqa_loader.py, convert_seed_for_submission.py and scripts/v1_5/eval/seed.sh of LLaVA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fitprune.benchmarks.base import Benchmark, Needed
from fitprune.benchmarks.reading import annotation, field, index, read_json, read_list, read_questions
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

FILE = "SEED-Bench.json"


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions about images, each with its letter and the name of its type; those about videos are left out.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question has no annotation, or an image's annotation has no question, which LLaVA counts as wrong.
    """
    path = paths["annotations"]
    types = field(read_json(path), "question_type", str(path), dict)
    names = {str(number): name for name, number in types.items()}
    annotations = index(
        read_list(path, "questions"), lambda entry, where: str(field(entry, "question_id", where, (str, int)))
    )
    wanted = {str(name) for name, (where, entry) in annotations.items() if field(entry, "data_type", where) == "image"}
    root = {"images": paths["images"].parent} if "images" in paths else {}  # names of pictures begin with the folder's
    questions = []
    for sample in read_questions({**paths, **root}):
        where, entry = annotation(annotations, str(sample.id), sample, path, FILE)
        if str(sample.id) in wanted:
            kind = names.get(str(field(entry, "question_type_id", where, int)), "")
            questions.append(dataclasses.replace(sample, answers=(field(entry, "answer", where),), kind=kind))
    if absent := sorted(wanted - {str(sample.id) for sample in questions}):
        raise BadSample(
            f"{paths['questions']}: has no question {absent[0]}, which is in {path} ({len(absent):,} of "
            f"{len(wanted):,} are missing): one of the two files is of another state"
        )
    return questions


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is the letter and nothing else. Quirk, kept: "A." and "a" are wrong."""
    return float(text == sample.answers[0])


SEED = Benchmark(
    name="seed",
    title="SEED-Bench, images",
    metric="accuracy",
    needs=(
        Needed("questions", ("seed_bench/llava-seed-bench.jsonl",)),
        Needed("annotations", (f"seed_bench/{FILE}",)),
        Needed("images", ("seed_bench/SEED-Bench-image",)),
    ),
    read=read,
    score=score,
    uncounted=lambda line: str(line["question_id"]).startswith("v"),  # of videos, which LLaVA's answers have too
    aliases=("seed-bench", "seed-img", "seed-image"),
)
