"""Files of answers: written as LLaVA writes them, read from anybody, paired with a benchmark's questions, scored."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitprune._support import files
from fitprune._support.messages import line as one_line
from fitprune._support.messages import short
from fitprune.benchmarks.base import EXTRA, Benchmark, line_of
from fitprune.benchmarks.measure import Array
from fitprune.benchmarks.reading import field, read_lines_or_list
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

logger = logging.getLogger(__name__)

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # shortuuid's: none looks like another

Lines = list[tuple[str, dict[str, Any]]]  # (where, line) of each answer


def write_answers(path: str | os.PathLike[str], samples: Sequence[Sample], texts: Sequence[str], model_id: str) -> None:
    """Write an answers file as LLaVA's scripts do, whole or not at all; equal answers give equal bytes.

    Args:
        path: the file, JSON lines.
        samples: the questions; what `facts["more"]` holds goes into the lines too.
        texts: the answer to each.
        model_id: who answered.

    Raises:
        OSError: the file cannot be written.
    """
    lines = []
    for sample, text in zip(samples, texts, strict=True):
        more = dict(sample.facts.get("more", {}))  # MMBench's, in the order of its script: the round before the prompt
        first = {name: more.pop(name) for name in ("round_id",) if name in more}
        line = {"question_id": sample.id, **first, **line_of(sample, text), **more}
        name = _answer_id(json.dumps([line, model_id]))
        lines.append(json.dumps({**line, "answer_id": name, "model_id": model_id, "metadata": {}}) + "\n")
    files.write_text(path, "".join(lines))


def _answer_id(content: str) -> str:
    """Make an id that looks like shortuuid's, of 22 characters, from what it is the id of."""
    number = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=16).digest(), "big")
    return "".join(ALPHABET[number // len(ALPHABET) ** place % len(ALPHABET)] for place in range(22))


def read_answers(path: str | os.PathLike[str]) -> Lines:
    """Read an answers file: JSON lines, a JSON list, or the spreadsheet (.xlsx) that MMBench's server takes.

    Args:
        path: the file.

    Returns:
        (where, line) of each answer; a line has `question_id` and `text`, and what else the file holds.

    Raises:
        OSError: the file cannot be read.
        BadSample: a line is broken, or there is none.
        ImportError: it is a spreadsheet, and openpyxl is not installed.
    """
    path = Path(path)
    lines = list(_rows(path) if path.suffix.lower() == ".xlsx" else read_lines_or_list(path))
    if not lines:
        raise BadSample(f"{path}: holds no answer, must have a line for each question; was the run finished?")
    for where, line in lines:
        field(line, "question_id", where, (str, int))
        field(line, "text", where)
        field({"prompt": "", **line}, "prompt", where)
    return lines


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row by the names of columns) of a spreadsheet; an empty cell is an empty answer, 5 is "5"."""
    try:
        import openpyxl
    except ImportError:
        raise ImportError(f"{path}: openpyxl is needed to read it: {EXTRA}") from None
    with open(path, "rb") as file:
        try:
            sheet = openpyxl.load_workbook(file, read_only=True).worksheets[0]
            sheet.reset_dimensions()  # some programs write wrong ones, and cells beyond would be lost
            head, *rows = sheet.iter_rows(values_only=True)
        except Exception as error:  # whatever zip, XML and openpyxl raise
            raise BadSample(f"{path}: no spreadsheet with a row of names ({one_line(error)}); save it again") from None
    for name in ("index", "prediction"):
        if name not in head:
            raise BadSample(f"{path}:1: has no column {name!r}, must have index and prediction; is it another file?")
    for number, cells in enumerate(rows, 2):
        where, empty = f"{path}:{number}", [None] * len(head)
        row: dict[str, Any] = dict(zip(map(str, head), [*cells, *empty], strict=False))
        if any(cell not in (None, "") for cell in cells):
            text, name = row["prediction"], row["index"]
            if isinstance(name, float) and name.is_integer():  # as some programs write every number
                row["index"] = int(name)
            name = field(row, "index", where, (str, int))
            yield where, {**row, "question_id": name, "text": "" if text is None else str(text)}


def matched(
    benchmark: Benchmark, samples: Sequence[Sample], lines: Lines, *, partial: bool = False
) -> tuple[list[Sample], list[str]]:
    """Pair answers and questions, whatever the order of either.

    Args:
        benchmark: whose questions they are.
        samples: the questions.
        lines: what `read_answers` gives.
        partial: leave out questions without an answer instead of raising.

    Returns:
        The questions in their order, and the answer to each.

    Raises:
        BadSample: answers are for other questions, a question is answered twice, or one has no answer.
    """
    questions = {benchmark.key(line_of(sample)): sample for sample in samples}
    answers: dict[Hashable, tuple[str, dict[str, Any]]] = {}
    foreign, repeated = [], []
    for where, line in lines:
        key = _key(benchmark, where, line)
        if key not in questions:
            if not (benchmark.uncounted and benchmark.uncounted(line)):
                foreign.append((where, key if isinstance(key, tuple) else line["question_id"]))
        elif key in answers:
            repeated.append((where, line["question_id"], answers[key][0]))
        else:
            answers[key] = where, line
    if foreign:
        where, name = foreign[0]
        raise BadSample(
            f"{where}: question {short(name, 80)} is not one of {benchmark.title}'s; {len(foreign):,} of "
            f"{len(lines):,} answers are for none of them: pass the answers of this benchmark, split and state"
        )
    if repeated:
        where, name, first = repeated[0]
        raise BadSample(
            f"{where}: question {short(name, 80)} is answered already ({first}); {len(repeated):,} of {len(lines):,} "
            "answers are for one that is: leave one answer for each"
        )
    missing = [sample for key, sample in questions.items() if key not in answers]
    if missing and not (partial and answers):
        raise BadSample(
            f"{lines[-1][0]}: is the last answer, and {len(missing):,} of {len(questions):,} questions have no answer "
            f"(first: {short(missing[0].id, 80)}): finish the run, or pass --partial to score those that are answered"
        )
    if benchmark.by_lines and _differ_in_order(list(answers), questions):
        logger.warning(
            "%s: the answers are not in the questions' order: here each is paired with its question; %s, which pairs "
            "by lines, gives another figure", lines[0][0], benchmark.by_lines
        )  # fmt: skip
    strange = [
        where
        for key, (where, line) in answers.items()
        if line.get("prompt") and not _asks(line["prompt"], questions[key])
    ]
    if 2 * len(strange) > len(answers):
        logger.warning(
            "%s: has another prompt than its question, as %d of %d answers have: are they for another split, language "
            "or state of it?", strange[0], len(strange), len(answers)
        )  # fmt: skip
    pairs = [(sample, answers[key][1]["text"]) for key, sample in questions.items() if key in answers]
    return [sample for sample, _ in pairs], [text for _, text in pairs]


def _key(benchmark: Benchmark, where: str, line: dict[str, Any]) -> Hashable:
    try:
        return benchmark.key(line)
    except KeyError as error:
        raise BadSample(f"{where}: has no {error}, which tells {benchmark.title}'s questions apart; add it") from None


def _asks(prompt: str, sample: Sample) -> bool:
    """Whether a prompt holds the first line of a question."""
    return str(line_of(sample)["prompt"]).removeprefix("<image>\n").split("\n")[0] in prompt


def _differ_in_order(answers: Sequence[Hashable], questions: dict[Hashable, Sample]) -> bool:
    """Whether the n-th answer of a kind is of another question than the n-th of that kind."""
    orders: list[dict[str, list[Hashable]]] = []
    for keys in (answers, questions):
        orders.append(defaultdict(list))
        for key in keys:
            orders[-1][questions[key].kind].append(key)
    return any(keys != orders[1][kind][: len(keys)] for kind, keys in orders[0].items())


def scores(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str]) -> Array:
    """Score each answer.

    Args:
        benchmark: whose rule it is.
        samples: the questions.
        texts: the answer to each.

    Returns:
        0..1 for each [questions].

    Raises:
        ValueError: no answers are published.
    """
    if benchmark.score is None:
        raise ValueError(f"{benchmark.title}: no answers are published, so nothing can be scored here")
    return np.array([benchmark.score(text, sample) for sample, text in zip(samples, texts, strict=True)])


def scored(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Compute the figures of answers, as published; the first is the benchmark's.

    Args:
        benchmark: whose rule it is.
        samples: the questions.
        texts: the answer to each.

    Raises:
        ValueError: no answers are published.
    """
    return benchmark.measure(samples).of(scores(benchmark, samples, texts))
