"""What the keys of one entry mean: image, question, accepted answers, id and kind, in any of the formats.

Values are read by what they mean: 3.0 is "3", and null, NaN and a missing key are one.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fitprune._support.messages import short
from fitprune.calibration.pictures import BadPicture, InDataset, located


class BadSample(ValueError):
    """One entry of the data that cannot be used; the message names file and line."""


def fields_of(entry: Any, folder: Path, where: str) -> dict[str, Any]:
    """Read the fields of a `Sample` from an entry in any of the formats.

    Args:
        entry: what was parsed, a `BadSample` where that failed.
        folder: where relative image paths begin.
        where: file and line, for messages.

    Raises:
        BadSample: the entry is no object, or a value is missing or of another type.
    """
    if isinstance(entry, BadSample):
        raise entry if str(entry).startswith(where) else BadSample(f"{where}: {entry}")
    if not isinstance(entry, dict):
        raise BadSample(f"{where}: is a JSON {type(entry).__name__}, must be an object with an image and a text")
    # POPE's; a number is a class, and a list something else.
    words = {key: value for key in ("label", "category") if isinstance(value := entry.get(key), str)}
    entry = {**entry, "label": None, "category": None, **words}
    text, answer = _first(entry, "text", "question"), _first(entry, "answer", "answers", "label")
    if (turns := _first(entry, "conversations")) is not None:
        text, answer = _first_exchange(turns, where)
    question = text.replace("<image>", "").strip() if isinstance(text, str) else ""
    if not question:
        raise BadSample(f"{where}: 'text' is {short(text, 80)}, must be a question (or 'question', or 'conversations')")
    kind, number = _first(entry, "kind", "category"), _first(entry, "question_id", "id")
    fields = {
        "id": where if _is_empty(number) else _id(number, where),
        "text": question,
        "image": _image(entry, folder, where),
        "answers": _accepted(answer, where),
        "kind": "" if _is_empty(kind) else _required(_word(kind), where, "kind", kind),
        "where": where,
    }
    for part in (str(fields["id"]), question, fields["kind"], *fields["answers"]):
        if not _is_encodable(part):
            raise BadSample(
                f"{where}: {short(part, 80)} holds half of a surrogate pair, must be text; write it as UTF-8"
            )
    return fields


def is_text_alone(entry: Any) -> bool:
    """Whether it is an entry of LLaVA's instruction JSON without an image, such as ShareGPT's in the mix of 665k."""
    return (
        isinstance(entry, dict)
        and _first(entry, "conversations") is not None
        and _is_empty(_first(entry, "image", "file_name"))
    )


def no_image(value: Any) -> str:
    """Say what an entry has in place of an image, and what it must have."""
    return f"'image' is {value}, must be one file name (or 'file_name')"


def _image(entry: dict[str, Any], folder: Path, where: str) -> Any:
    """Give what `load_picture` reads: a path under the folder, or the image where the entry holds it itself."""
    image = value = _first(entry, "image", "file_name")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):  # how datasets holds an image that is not decoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        try:
            return located(image, folder)
        except BadPicture as error:
            raise BadSample(f"{where}: {error}") from None
    if isinstance(image, InDataset):
        return dataclasses.replace(image, folder=folder)
    if not isinstance(image, (bytes, Image.Image)):
        raise BadSample(f"{where}: {no_image(short(value, 80))}")
    return image


def _first_exchange(conversations: Any, where: str) -> tuple[str, Any]:
    """Take the first question and its answer from LLaVA's conversation form."""
    try:
        question = next(turn["value"] for turn in conversations if turn["from"] == "human")
        answer = next((turn["value"] for turn in conversations if turn["from"] == "gpt"), None)
        if isinstance(question, str):
            return question, answer
    except (TypeError, KeyError, StopIteration):
        pass
    raise BadSample(f"{where}: 'conversations' must be a list of {{'from': 'human'|'gpt', 'value': text}}")


def _accepted(answer: Any, where: str) -> tuple[str, ...]:
    """Give the accepted answers: of text or a number, or of several, also as VQA has them, {"answer": ...} for each.

    A blank one among others stays, as "": it is an annotator who said nothing, and is counted.
    """
    if _is_empty(answer):
        return ()
    answers = answer if isinstance(answer, list) else [answer]
    answers = [value["answer"] if isinstance(value, dict) and "answer" in value else value for value in answers]
    if len(answers) == 1 and isinstance(answers[0], list):
        answers = answers[0]
    words = ["" if _is_empty(value, 0) else value for value in map(_present, answers)]
    return tuple(_required(_word(value), where, "answer", answer) for value in words)


def _id(number: Any, where: str) -> str | int:
    word = _required(_word(number), where, "question_id", number)
    return word if isinstance(number, str) or not word.removeprefix("-").isdecimal() else int(word)


def _required(word: str | None, where: str, name: str, value: Any) -> str:
    if word is None:
        several = " or a list of strings" if name == "answer" else ""
        raise BadSample(f"{where}: {name!r} is {short(value, 80)}, must be a string or a finite number{several}")
    return word


def _present(value: Any) -> Any:
    """Give a plain value, None for what stands for a missing one: null, NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_empty(value: Any, levels: int = 3) -> bool:
    """Whether nothing is in it: missing, blank, or a list or dict of such; VQA's dicts by their answer."""
    if isinstance(value, dict):
        value = [value["answer"]] if "answer" in value else list(value.values())
    if isinstance(value, list):
        return levels > 0 and all(_is_empty(each, levels - 1) for each in value)
    value = _present(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def _first(entry: dict[str, Any], *names: str) -> Any:
    """Give the value of the first of the keys that has one; of several empty ones the first, to be shown."""
    values = [value for name in names if (value := _present(entry.get(name))) is not None]
    return next((value for value in values if not _is_empty(value)), values[0] if values else None)


def _word(value: Any) -> str | None:
    """Write text or a number as people do, a whole float without its point; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return str(value + 0.0).removesuffix(".0")  # -0.0 is 0
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
