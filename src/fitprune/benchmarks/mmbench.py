"""MMBench and MMBench-CN: up to four lettered choices, asked again with the choices rotated; circular accuracy.

A question is in the table once for each rotation; the rows of one question have the same index modulo a million.

Source: model_vqa_mmbench.py, convert_mmbench_for_submission.py and scripts/v1_5/eval/mmbench.sh of LLaVA;
matching_util.py and multiple_choice.py of VLMEvalKit, by the authors of MMBench, for the letter and for circles.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitprune._support.messages import short
from fitprune.benchmarks.base import LETTER, LONG, Benchmark, Needed, Upload
from fitprune.benchmarks.measure import Array, Measure, share
from fitprune.benchmarks.reading import field, read_table
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

LETTERS = ("A", "B", "C", "D")
LETTER_CN = "\n请直接回答选项字母。"
ROTATION = 1_000_000
# What pandas, by which LLaVA and VLMEvalKit read, takes for an empty cell.
EMPTY = {
    "",
    "None",
    "NULL",
    "null",
    "NaN",
    "nan",
    "-NaN",
    "-nan",
    "NA",
    "N/A",
    "n/a",
    "<NA>",
    "#NA",
    "#N/A",
    "#N/A N/A",
}
EMPTY |= {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
NOT_SENT = ("hint", "category", "source", "image", "comment", "l2-category")
OF_ANSWERS = ("prediction", "question_id", "text")  # beside the question, in the lines of an answers file
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read(paths: Mapping[str, Path], *, suffix: str, scored: bool) -> list[Sample]:
    """Read the questions, with their pictures.

    Args:
        paths: role -> path.
        suffix: what follows the choices.
        scored: whether the table has the answers.

    Raises:
        BadSample: a row has no index, question, choice, answer or picture.
    """
    return [
        question(row, where, suffix, scored=scored, image=picture(field(row, "image", where), where))
        for where, row in read_table(paths["questions"])
    ]


def rebuild(lines: Sequence[tuple[str, Mapping[str, Any]]], *, suffix: str, scored: bool) -> list[Sample]:
    """Make the questions of the rows of a spreadsheet of answers, which has no hints, categories and pictures.

    Args:
        lines: (where, row) of each.
        suffix: what follows the choices.
        scored: whether it has the right answers.

    Raises:
        BadSample: they are lines of another file, without the questions.
    """
    for where, line in lines:
        if "question" not in line:
            raise BadSample(f"{where}: has no 'question': only MMBench's spreadsheets hold them; pass --data-root")
    return [question(line, where, suffix, scored=scored) for where, line in lines]


def question(row: Mapping[str, Any], where: str, suffix: str, *, scored: bool, image: bytes | None = None) -> Sample:
    """Make a question of a row.

    Its choices end at the first empty one, or at "none" in any case, which LLaVA takes for one.

    Args:
        row: by the names of columns.
        where: file and row, for messages.
        suffix: what follows the choices.
        scored: whether there is a right answer.
        image: the picture.

    Raises:
        BadSample: a value is missing.
    """
    try:
        index = int(row["index"])
    except (KeyError, TypeError, ValueError):
        raise BadSample(f"{where}: 'index' is {short(row.get('index'), 80)}, must be a whole number") from None
    cells = {name: None if value is None or str(value) in EMPTY else str(value) for name, value in row.items()}
    options: list[str] = []
    for letter in LETTERS:
        option = cells.get(letter)
        if option is None or option.lower() in ("nan", "none"):
            break
        options.append(option)
    text, answer = cells.get("question"), cells.get("answer")
    if text is None or not options:
        raise BadSample(f"{where}: {'A' if text else 'question'!r} is empty, must be text; is it another file?")
    if scored and answer not in LETTERS:
        raise BadSample(f"{where}: 'answer' is {short(answer, 80)}, must be one of {', '.join(LETTERS)}")
    hint = cells.get("hint")
    lines = [text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    prompt = "\n".join(lines if hint is None or hint.lower() in ("nan", "none") else [hint, *lines])
    facts = {
        "prompt": prompt,
        "more": {"round_id": 0, "options": options, "option_char": list(LETTERS[: len(options)])},
        "choices": {letter: option for letter in LETTERS if (option := cells.get(letter)) is not None},
        "row": {
            **{name: value for name, value in cells.items() if name not in (*NOT_SENT, *OF_ANSWERS)},
            "index": index,
        },
    }
    accepted = (answer,) if answer and scored else ()
    return Sample(index, prompt + suffix, image, accepted, cells.get("category") or "", where, facts)


def picture(text: str, where: str) -> bytes:
    """Decode a picture's bytes."""
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise BadSample(f"{where}: 'image' is {short(text, 40)}, must be a picture in base64 ({error})") from None


def answer_of(text: str, choices: Mapping[str, str]) -> str:
    """Read the letter of an answer, "" where there is none, as VLMEvalKit does where no judge helps.

    Brackets and most marks are spaces. If one letter of a choice is a word, and first stands among the last four
    words, it is that. Else it is the letter that follows "answer is", in any case, stars before it or not. Else it is
    the only choice whose text is part of the answer, in any case, if the answer is not longer than all choices twice.

    Quirks, kept: "a" is no letter, but "The answer is blue" is B; "Z", or one of four sentences of models that
    refuse, is none, whatever else is said; the article "A" is a letter.

    Args:
        text: the answer.
        choices: letter -> text of each choice.
    """
    if any(refusal in text for refusal in REFUSALS):
        return ""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return ""
    stated = re.search(r"answer\s+is\s+\**([A-D])", text, re.IGNORECASE)
    if stated and stated[1].upper() in choices:
        return stated[1].upper()
    lowered = text.lower()
    inside = [letter for letter, choice in choices.items() if choice.lower() in lowered]
    fits = len(lowered) <= 2 * sum(map(len, choices.values()))
    return inside[0] if fits and len(inside) == 1 else ""


def score(text: str, sample: Sample) -> float:
    """Return 1 if the answer is read as the right letter."""
    return float(answer_of(text, sample.facts["choices"]) == sample.answers[0])


def unit(sample: Sample) -> int:
    """Give what all rows of a question share."""
    return int(sample.id) % ROTATION


def measure(samples: Sequence[Sample]) -> Measure:
    """Percent of questions that are right in all their rows, of rows, and of the questions of each category."""
    circles: dict[int, int] = {}
    place = np.array([circles.setdefault(unit(sample), len(circles)) for sample in samples])
    kinds = dict(zip(place.tolist(), (sample.kind for sample in samples), strict=True))
    names = sorted({*kinds.values()} - {""})
    member = np.array([[True, *(kinds[circle] == name for name in names)] for circle in range(len(circles))])
    rows = np.bincount(place)

    def counts(scores: Array) -> Array:
        right = np.bincount(place, weights=scores)
        whole = (right == rows)[:, None] & member
        return np.column_stack([right, whole, rows, member]).astype(np.float64)

    def figures(totals: Array) -> dict[str, Array]:
        row, circular, *others = np.moveaxis(100 * share(*np.split(totals, 2, -1)), -1, 0)
        return {"circular": circular, "rows": row, **dict(zip(names, others, strict=True))}

    return Measure(counts, figures)


def write(samples: Sequence[Sample], answers: Sequence[str], path: Path) -> None:
    """Write the spreadsheet that the server takes.

    Control characters, which no spreadsheet can hold, are left out, and "=..." stays text. The dates that openpyxl
    writes into the file are replaced, so that equal answers give equal bytes.

    Args:
        samples: the questions.
        answers: to each.
        path: of the file.
    """
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE as ILLEGAL

    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    head = list(samples[0].facts["row"])
    sheet.append([*head[:6], "prediction", *head[6:]])
    for sample, text in zip(samples, answers, strict=True):
        cells = list(sample.facts["row"].values())
        cells = [*cells[:6], text, *cells[6:]]
        sheet.append([ILLEGAL.sub("", cell) if isinstance(cell, str) else cell for cell in cells])
        for cell in sheet[sheet.max_row]:
            cell.data_type = "s" if cell.data_type == "f" else cell.data_type
    content = io.BytesIO()
    book.save(content)
    with zipfile.ZipFile(content) as dated, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in dated.namelist():
            part = re.sub(rb"(?<=W3CDTF\">)[^<]*", b"2000-01-01T00:00:00Z", dated.read(name))
            file.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED)


def _split(name: str, title: str, file: str, *, cn: bool, scored: bool, aliases: tuple[str, ...] = ()) -> Benchmark:
    facts: dict[str, Any] = {"suffix": LETTER_CN if cn else LETTER, "scored": scored}
    folders = ("mmbench_cn", "mmbench") if cn else ("mmbench",)
    return Benchmark(
        name=name,
        title=title,
        metric="circular accuracy",
        needs=(Needed("questions", tuple(f"{folder}/{file}" for folder in folders)),),
        read=functools.partial(read, **facts),
        score=score if scored else None,
        measure=measure,
        max_new_tokens=LONG,
        unit=unit,
        upload=Upload(".xlsx", write, "MMBench's server (opencompass.org.cn)", "openpyxl"),
        rebuild=functools.partial(rebuild, **facts),
        aliases=aliases,
    )


MMBENCH = _split(
    "mmbench", "MMBench dev", "mmbench_dev_20230712.tsv", cn=False, scored=True, aliases=("mmbench-en", "mmbench-dev")
)
MMBENCH_CN = _split(
    "mmbench-cn", "MMBench-CN dev", "mmbench_dev_cn_20231003.tsv", cn=True, scored=True, aliases=("mmbench-cn-dev",)
)
MMBENCH_TEST = _split("mmbench-test", "MMBench test", "mmbench_test_20230712.tsv", cn=False, scored=False)
MMBENCH_CN_TEST = _split("mmbench-cn-test", "MMBench-CN test", "mmbench_test_cn_20231003.tsv", cn=True, scored=False)
