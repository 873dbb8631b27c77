"""ChartQA: questions about charts, by people or made from their summaries; accuracy with 5% off allowed in numbers.

LLaVA has no prompt for it: its own for short answers is used. (lmms-eval's ends "Answer the question with a single
word.") The files have no ids either: a question's id is its part and its place there, "human-0".

Source: relaxed_correctness of Pix2Struct's metrics, and of lmms-eval's task `chartqa`, which is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed
from fitprune.benchmarks.reading import field, read_list
from fitprune.calibration.samples import Sample

PARTS = ("human", "augmented")
FOLDERS = ("chartqa/test", "chartqa/ChartQA Dataset/test")


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions of both parts.

    Args:
        paths: role -> path.
    """
    questions = []
    for part in PARTS:
        for number, (where, entry) in enumerate(read_list(paths[part])):
            text, picture = field(entry, "query", where) + ONE_WORD, field(entry, "imgname", where)
            image = paths["images"] / picture if "images" in paths else None
            questions.append(Sample(f"{part}-{number}", text, image, (field(entry, "label", where),), part, where))
    return questions


def number_of(text: str) -> float | None:
    """Read a number: 12, 1e3, " 7 ", 1_000, nan, or 12% as 0.12; None for other text, such as 1,000 or $5."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score(text: str, sample: Sample) -> float:
    """Return 1 if a number is at most 5% off, or other text is the same but for its case.

    Quirks, kept: "12%" is not "12"; where the label is 0, or the answer no number, the texts are compared, blanks too.
    """
    label = sample.answers[0]
    value, target = number_of(text), number_of(label)
    if value is not None and target:
        return float(abs(value - target) / abs(target) <= 0.05)
    return float(text.lower() == label.lower())


CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA test",
    metric="relaxed accuracy",
    needs=(
        *(Needed(part, tuple(f"{folder}/test_{part}.json" for folder in FOLDERS)) for part in PARTS),
        Needed("images", tuple(f"{folder}/png" for folder in FOLDERS)),
    ),
    read=read,
    score=score,
    aliases=("chartqa-test",),
)
