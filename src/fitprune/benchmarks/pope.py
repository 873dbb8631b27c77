"""POPE: is an object in the picture, yes or no; F1, the mean of three categories.

Source: eval_pope.py and scripts/v1_5/eval/pope.sh of LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fitprune.benchmarks.base import Benchmark, Needed
from fitprune.benchmarks.measure import Array, Measure, share
from fitprune.benchmarks.reading import field, read_jsonl
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

CATEGORIES = ("random", "popular", "adversarial")


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions, each with its label.

    Labels have ids of their own that say nothing: those of a category belong to its questions line by line. POPE's
    random file has 2,910 lines in the state that LLaVA's questions are of, and 3,000 others in newer ones.

    Args:
        paths: role -> path.

    Raises:
        BadSample: a label is of another question than the one in its place.
    """
    labels = {name: list(read_jsonl(paths[name])) for name in CATEGORIES}
    taken = dict.fromkeys(CATEGORIES, 0)
    questions = []
    for where, entry in read_jsonl(paths["questions"]):
        category = field(entry, "category", where)
        if category not in labels:
            raise BadSample(f"{where}: 'category' is {category!r}, must be one of {', '.join(CATEGORIES)}")
        picture, text = field(entry, "image", where), field(entry, "text", where)
        own, place = labels[category], taken[category]
        taken[category] += 1
        if place < len(own):
            at, label = own[place]
            same = label.get("image") == picture and str(label.get("text")).strip() == text.split("\n")[0].strip()
        else:
            at, same = f"{paths[category]}:{len(own)} (its end)", False
        if not same:
            raise BadSample(
                f"{at}: is not the label of {where}: the file is of another state than the questions, whose random one "
                "has 2,910 lines (AoiDragon/POPE at e3e39262)"
            )
        answer = field(label, "label", at).strip().lower()
        if answer not in ("yes", "no"):
            raise BadSample(f"{at}: 'label' is {answer!r}, must be yes or no")
        number = field(entry, "question_id", where, (int, str))
        image = paths["images"] / picture if "images" in paths else None
        questions.append(Sample(number, text, image, (answer,), category, where))
    for name, own in labels.items():
        if taken[name] and taken[name] != len(own):
            raise BadSample(f"{paths[name]}: has {len(own)} labels for {taken[name]} questions: it is of another state")
    return questions


def answer_of(text: str) -> str:
    """Read yes or no from an answer.

    Quirks, kept: only what is before the first full stop counts; commas go; "no" if a word is No, no or not (NO and
    "no," with another mark are not), else "yes", also for an empty answer.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is read as the label."""
    return float(answer_of(text) == sample.answers[0])


def measure(samples: Sequence[Sample]) -> Measure:
    """F1 of "yes" in each category, and their mean, in percent; accuracy and the share of "yes" of each category."""
    names = [name for name in CATEGORIES if any(sample.kind == name for sample in samples)]
    yes = np.array([sample.answers[0] == "yes" for sample in samples])
    member = np.array([[sample.kind == name for name in names] for sample in samples])

    def counts(scores: Array) -> Array:
        right = scores > 0
        kinds = (yes & right, ~yes & ~right, yes & ~right, ~yes & right)  # true and false yes, false and true no
        return np.concatenate([member & kind[:, None] for kind in kinds], 1).astype(np.float64)

    def figures(totals: Array) -> dict[str, Array]:
        true_yes, false_yes, false_no, true_no = np.split(totals, 4, -1)
        every = true_yes + false_yes + false_no + true_no
        parts = {
            "F1": share(2 * true_yes, 2 * true_yes + false_yes + false_no),
            "accuracy": share(true_yes + true_no, every),
            "yes": share(true_yes + false_yes, every),
        }
        each = {f"{name} {part}": 100 * of[..., i] for part, of in parts.items() for i, name in enumerate(names)}
        return {"F1": 100 * parts["F1"].mean(-1), **each}

    return Measure(counts, figures)


POPE = Benchmark(
    name="pope",
    title="POPE",
    metric="F1, mean of its categories",
    needs=(
        Needed("questions", ("pope/llava_pope_test.jsonl",)),
        *(Needed(name, (f"pope/coco/coco_pope_{name}.json",)) for name in CATEGORIES),
        Needed("images", ("pope/val2014",)),
    ),
    read=read,
    score=score,
    measure=measure,
    by_lines="LLaVA's eval_pope.py",
)
