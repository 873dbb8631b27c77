"""ScienceQA, test: questions with lettered choices, half of them about a picture; accuracy, first of those.

Source: model_vqa_science.py, eval_science_qa.py and scripts/v1_5/eval/sqa.sh of LLaVA; evaluate_acc.py of ScienceQA's
authors for the groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune._support.messages import short
from fitprune.benchmarks.base import LETTER, LONG, Benchmark, Needed
from fitprune.benchmarks.measure import Array, Measure, mean_by_group
from fitprune.benchmarks.reading import field, read_json, read_list
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

LETTERS = ("A", "B", "C", "D", "E")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = {f"grade{year}": "G1-6" if year <= 6 else "G7-12" for year in range(1, 13)}


def read(paths: Mapping[str, Path]) -> list[Sample]:
    """Read the questions, each with its letter; those of text alone have no image.

    Args:
        paths: role -> path; with ScienceQA's own "problems" the questions have the groups of its authors.

    Raises:
        BadSample: a question has no letter, or the two files differ.
    """
    problems = read_json(paths["problems"]) if "problems" in paths else None
    questions = []
    for where, entry in read_list(paths["questions"]):
        number, turns = field(entry, "id", where, (str, int)), field(entry, "conversations", where, list)
        values = [turn["value"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
        if len(values) < 2:
            raise BadSample(f"{where}: 'conversations' is {short(turns, 80)}, must be a question and its letter")
        question, letter = values[0].replace("<image>", "").strip(), values[1]
        if letter not in LETTERS:
            raise BadSample(f"{where}: the answer is {short(letter, 80)}, must be one of {', '.join(LETTERS)}")
        groups: tuple[str, ...] = ()
        if problems is not None:
            at = f"{paths['problems']}, problem {number}"
            problem = field(problems, str(number), str(paths["problems"]), dict)
            groups = groups_of(problem, at)
            if field(problem, "answer", at, int) != LETTERS.index(letter):
                raise BadSample(f"{at}: 'answer' is {problem['answer']}, {where} has {letter}: one is of another state")
        picture = field(entry, "image", where) if "image" in entry else None
        image = paths["images"] / picture if picture and "images" in paths else None
        text = question + LETTER
        facts = {"prompt": f"<image>\n{text}" if picture else text, "groups": groups}
        questions.append(Sample(number, text, image, (letter,), "images" if picture else "text", where, facts))
    return questions


def groups_of(problem: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Name the columns of the authors' tables that a problem counts in.

    TXT is for a hint in text, with an image or not; NO is for neither. Their IMG is "images".
    """
    hint, image = problem.get("hint"), problem.get("image")
    subject, grade = (field(problem, name, where) for name in ("subject", "grade"))
    return SUBJECTS.get(subject, ""), GRADES.get(grade, ""), "TXT" if hint else "" if image else "NO"


def answer_of(text: str) -> str:
    """Read the letter of an answer, "" where there is none.

    It is the answer itself, or begins it as in "A. ...", or there is one "The answer is A.". Quirks, kept: spaces and
    line breaks around it are not forgiven, nor is "a"; any character may stand for that last full stop, as in "The
    answer is Apples", but one must.

    The script then refuses letters beyond the choices. They are wrong here too, as no right one is.
    """
    if text[:1] in LETTERS and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    letters = re.findall("The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else ""


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is read as the right letter."""
    return float(answer_of(text) == sample.answers[0])


def measure(samples: Sequence[Sample]) -> Measure:
    """Average over the questions with an image, over all, over those of text alone, and over the authors' groups."""
    mean = mean_by_group(samples, name="all", groups_of=lambda sample: (sample.kind, *sample.facts["groups"]))

    def figures(totals: Array) -> dict[str, Array]:
        every = mean.figures(totals)
        return {**{name: every[name] for name in ("images", "all", "text") if name in every}, **every}

    return Measure(mean.counts, figures)


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA test",
    metric="accuracy of questions with an image",
    needs=(
        Needed("questions", ("scienceqa/llava_test_CQM-A.json",)),
        Needed("problems", ("scienceqa/problems.json",), optional=True),
        Needed("images", ("scienceqa/images/test", "scienceqa/test")),
    ),
    read=read,
    score=score,
    measure=measure,
    max_new_tokens=LONG,
    aliases=("sqa", "scienceqa-img", "sqa-img"),
)
