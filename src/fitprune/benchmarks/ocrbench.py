"""OCRBench: a thousand questions about text in images; a point for each answer that holds the right one.

The prompt is the one of the authors' LLaVA1_5.py, which adds LLaVA's instruction for short answers. Ids are unique in
a data set only: a question's id is both, "IIIT5K-2843".

Source: example.py and LLaVA1_5.py of the OCRBench authors. Differs from lmms-eval, which makes full-width letters plain
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed
from fitprune.benchmarks.measure import Array, Measure, share
from fitprune.benchmarks.reading import field, read_list
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

FORMULAS = "HME100k"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions; `facts["dataset"]` is the data set that one is from.

    Args:
        paths: role -> path.

    Raises:
        BadSample: an answer is no text.
    """
    questions = []
    for where, entry in read_list(paths["questions"]):
        dataset, number = field(entry, "dataset_name", where), field(entry, "id", where, (int, str))
        answers = field(entry, "answers", where, (str, list))
        answers = [answers] if isinstance(answers, str) else answers
        if not all(isinstance(answer, str) for answer in answers):
            raise BadSample(f"{where}: 'answers' is {answers}, must be text or a list of texts")
        text, kind = field(entry, "question", where), field(entry, "type", where)
        picture = field(entry, "image_path", where)
        image = paths["images"] / picture if "images" in paths else None
        facts = {"dataset": dataset}
        questions.append(Sample(f"{dataset}-{number}", text + ONE_WORD, image, tuple(answers), kind, where, facts))
    return questions


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer holds a right one, in any case; formulas without regard to blanks, but to case.

    Quirk, kept: the right one may be part of a word, so "cat" is in "concatenate".
    """

    def plain(text: str) -> str:
        if sample.facts["dataset"] == FORMULAS:
            return text.strip().replace("\n", "").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return float(any(plain(answer) in plain(text) for answer in sample.answers))


def measure(samples: Sequence[Sample]) -> Measure:
    """Count points of 1,000 questions; those of the types add up to the figure, and six of them to "Text Recognition".

    With fewer questions they are what the same share of right answers would give.
    """
    kinds = dict.fromkeys(sample.kind for sample in samples)
    names = ["points", "Text Recognition", *kinds]
    member = np.array([[True, each.kind in RECOGNITION, *(each.kind == kind for kind in kinds)] for each in samples])

    def counts(scores: Array) -> Array:
        return np.column_stack([scores[:, None] * member, np.ones(len(member))])

    def figures(totals: Array) -> dict[str, Array]:
        points = 1000 * share(totals[..., :-1], totals[..., -1:])
        return {name: points[..., column] for column, name in enumerate(names)}

    return Measure(counts, figures)


OCRBENCH = Benchmark(
    name="ocrbench",
    title="OCRBench",
    metric="points of 1,000",
    needs=(
        Needed("questions", ("ocrbench/OCRBench.json",)),
        Needed("images", ("ocrbench/OCRBench_Images",)),
    ),
    read=read,
    score=score,
    measure=measure,
    maximum=1000,
)
