"""DocVQA: questions about scanned pages; ANLS, which is one minus the edit distance's share of an answer's length.

LLaVA has no prompt for it: its own for short answers is used, as in lmms-eval.

Source: the evaluation of the Robust Reading Competition, as lmms-eval's metric `anls` has it.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed, Upload
from fitprune.benchmarks.measure import mean_by_group
from fitprune.benchmarks.reading import field, read_list
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

THRESHOLD = 0.5


def read(paths: Mapping[str, Path], *, answered: bool) -> list[Sample]:
    """Read the questions; `kind` is a question's types, with commas between, where the file has them.

    Args:
        paths: role -> path.
        answered: whether the file has the answers.

    Raises:
        BadSample: a question has no answer, or something else than text as one.
    """
    questions = []
    for where, entry in read_list(paths["questions"], "data"):
        number, text = field(entry, "questionId", where, (int, str)), field(entry, "question", where) + ONE_WORD
        answers = field(entry, "answers", where, list) if answered else []
        if answered and not (answers and all(isinstance(answer, str) for answer in answers)):
            raise BadSample(f"{where}: 'answers' is {answers}, must be a list of one text or more")
        kinds = field(entry, "question_types", where, list) if "question_types" in entry else []
        page = PurePosixPath(field(entry, "image", where)).name
        image = paths["images"] / page if "images" in paths else None
        questions.append(Sample(number, text, image, tuple(answers), ", ".join(map(str, kinds)), where))
    return questions


def distance(one: str, other: str) -> int:
    """Count the letters that must be put in, taken out or replaced to make one text of another."""
    before = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        row = [number]
        for (replaced, above), own in zip(itertools.pairwise(before), other, strict=True):
            row.append(min(above + 1, row[-1] + 1, replaced + (letter != own)))
        before = row
    return before[-1]


def score(text: str, sample: Sample) -> float:
    """Compute ANLS: the similarity to the most similar answer; 0 below one half.

    Quirks, kept: what is compared is in lower case with single blanks, but the length that the distance is divided by
    is that of the texts as they are, in upper case, so more blanks around an answer make it more similar.
    """
    best = 0.0
    for answer in sample.answers:
        one, other = (" ".join(each.lower().split()) for each in (text, answer))
        length = max(len(text.upper()), len(answer.upper()), 1)
        if 1 - abs(len(one) - len(other)) / length >= max(best, THRESHOLD):  # no more similar than the lengths are
            best = max(best, 1 - distance(one, other) / length)
    return best if best >= THRESHOLD else 0.0


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write what the server takes."""
    pairs = zip(samples, answers, strict=True)
    path.write_text(json.dumps([{"questionId": sample.id, "answer": text} for sample, text in pairs]))


UPLOAD = Upload(".json", write, "the Robust Reading Competition's server, DocVQA, task 1")
FOLDERS = ("docvqa/documents", "docvqa/spdocvqa_images")
DOCVQA = Benchmark(
    name="docvqa",
    title="DocVQA validation",
    metric="ANLS",
    needs=(
        Needed(
            "questions",
            tuple(
                f"docvqa/{folder}val_v1.0{types}.json"
                for types in ("_withQT", "")
                for folder in ("", "spdocvqa_qas/", "val/")
            ),
        ),
        Needed("images", (*FOLDERS, "docvqa/val/documents")),
    ),
    read=functools.partial(read, answered=True),
    score=score,
    measure=functools.partial(mean_by_group, name="ANLS", groups_of=lambda sample: sample.kind.split(", ")),
    upload=UPLOAD,
    aliases=("docvqa-val",),
)
DOCVQA_TEST = Benchmark(
    name="docvqa-test",
    title="DocVQA test",
    metric="ANLS",
    needs=(
        Needed("questions", tuple(f"docvqa/{folder}test_v1.0.json" for folder in ("", "spdocvqa_qas/", "test/"))),
        Needed("images", (*FOLDERS, "docvqa/test/documents")),
    ),
    read=functools.partial(read, answered=False),
    score=None,
    upload=UPLOAD,
)
