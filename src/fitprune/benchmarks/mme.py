"""MME: yes or no, two questions an image; perception, the sum of ten categories, and cognition, that of four others.

Source: convert_answer_to_mme.py and eval_tool/calculation.py of the MME authors, scripts/v1_5/eval/mme.sh of LLaVA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitprune._support.messages import short
from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed, Upload
from fitprune.benchmarks.measure import Array, Measure, share
from fitprune.benchmarks.reading import field, read_jsonl, read_lines
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
CATEGORIES = PERCEPTION + COGNITION
FOLDER = "MME/MME_Benchmark_release_version"


def bare(question: str) -> str:
    """Cut off LLaVA's instruction, or MME's own, which it replaces; one or two blanks are before MME's."""
    return question.replace(ONE_WORD.strip(), "").replace("Please answer yes or no.", "").strip()


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions, each with its answer, which is in a file of its image.

    A category's images and answers lie in folders of their own, or together; releases differ in which.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a question has no answer, or an image has not two questions, which calculation.py refuses.
    """
    labels: dict[Path, dict[str, tuple[str, str]]] = {}
    questions = []
    for where, entry in read_jsonl(paths["questions"]):
        name, text = field(entry, "question_id", where), field(entry, "text", where)
        category, file = name.split("/")[0], name.split("/")[-1]
        if category not in CATEGORIES:
            raise BadSample(f"{where}: 'question_id' is {short(name, 80)}, must begin with {', '.join(CATEGORIES)}")
        stem = file.split(".")[0] + ".txt"
        path = _one_of(paths["annotations"] / category, "questions_answers_YN", stem)
        if path not in labels:
            if not path.is_file():
                raise BadSample(f"{where}: the answers of its image are missing: {path} is not there")
            labels[path] = read_labels(path)
        if bare(text) not in labels[path]:
            raise BadSample(f"{where}: {short(bare(text), 120)} is not in {path}: one of the two is of another state")
        question, answer = labels[path][bare(text)]
        image = _one_of(paths["images"] / category, "images", file) if "images" in paths else None
        questions.append(Sample(name, text, image, (answer,), category, where, {"file": stem, "question": question}))
    number = Counter(sample.id for sample in questions)
    for sample in questions:
        if number[sample.id] != 2:
            raise BadSample(f"{sample.where}: image {sample.id} has {number[sample.id]} question(s), must have two")
    return questions


def read_labels(path: Path) -> dict[str, tuple[str, str]]:
    """Read what is asked about an image: bare question -> (question, answer).

    Args:
        path: lines of question and answer, with a tab between.

    Raises:
        BadSample: a line is something else.
    """
    labels = {}
    for where, line in read_lines(path):
        question, _, answer = line.strip().partition("\t")
        if answer.lower() not in ("yes", "no"):
            raise BadSample(f"{where}: is {short(line.strip(), 120)}, must be a question, a tab, and Yes or No")
        labels[bare(question)] = question, answer
    return labels


def _one_of(category: Path, folder: str, name: str) -> Path:
    """Find a file in a folder of a category, or in the category itself."""
    within = category / folder / name
    return within if within.parent.is_dir() else category / name


def answer_of(text: str) -> str:
    """Read yes or no from an answer.

    Quirks, kept: the first four characters count, and the word may be anywhere in them: "Not sure" is no, "Eyes" yes;
    what is neither is "other", which is wrong.
    """
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is read as the label."""
    return float(answer_of(text) == sample.answers[0].lower())


def measure(samples: Sequence[Sample]) -> Measure:
    """Sum up categories: 100 x the share of right answers + 100 x the share of images whose two answers are right.

    The authors take two lines that follow each other for an image; in LLaVA's file they are one.
    """
    names = [name for name in CATEGORIES if any(sample.kind == name for sample in samples)]
    kinds = {sample.id: sample.kind for sample in samples}
    place = {image: number for number, image in enumerate(kinds)}
    image_of = np.array([place[sample.id] for sample in samples])
    present = np.bincount(image_of)  # questions of each image
    member = np.array([[kind == name for name in names] for kind in kinds.values()])
    first = np.array([name in PERCEPTION for name in names])

    def counts(scores: Array) -> Array:
        right = np.bincount(image_of, scores)
        return np.concatenate([member * each[:, None] for each in (right, present, right == 2, present > 0)], 1)

    def figures(totals: Array) -> dict[str, Array]:
        right, every, both, images = np.split(totals, 4, -1)
        each = 100 * share(right, every) + 100 * share(both, images)
        sums = {"perception": each[..., first].sum(-1), "cognition": each[..., ~first].sum(-1)}
        return {**sums, **{name: each[..., column] for column, name in enumerate(names)}}

    return Measure(counts, figures)


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write a file for each category, as convert_answer_to_mme.py does; a tab or line's end in an answer is a blank.

    Args:
        samples: the questions.
        answers: [questions].
        path: the folder.
    """
    lines: dict[str, list[str]] = {}
    for sample, text in zip(samples, answers, strict=True):
        columns = (sample.facts["file"], sample.facts["question"], sample.answers[0], re.sub(r"[\t\n\r]", " ", text))
        lines.setdefault(sample.kind, []).append("\t".join(columns) + "\n")
    path.mkdir(parents=True, exist_ok=True)
    for category, own in lines.items():
        (path / f"{category}.txt").write_bytes("".join(own).encode(errors="replace"))  # half of a character is "?"


def key(line: Mapping[str, Any]) -> Hashable:
    """Find a question by its image and its words."""
    return str(line["question_id"]), bare(str(line["prompt"]))


MME = Benchmark(
    name="mme",
    title="MME",
    metric="perception, of 2,000 (cognition, of 800, apart)",
    needs=(
        Needed("questions", ("MME/llava_mme.jsonl",)),
        Needed("annotations", (FOLDER,)),
        Needed("images", (FOLDER,)),
    ),
    read=read,
    score=score,
    measure=measure,
    maximum=2000,
    key=key,
    unit=lambda sample: sample.id,
    upload=Upload("", write, "calculation.py of the MME authors"),
)
