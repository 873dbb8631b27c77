"""Calibration and test data as users have it.

Reads the FitPrune authors' question JSONL, LLaVA's instruction JSON and Hugging Face datasets; every bad entry is named
with its line. Values are read by what they mean: 3.0 is "3", and null, NaN and a missing key are one. Knows no models.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import random
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fitprune._support import assets
from fitprune.calibration.pictures import BadPicture, InDataset, load_picture, located, shown

logger = logging.getLogger(__name__)

_NO_IMAGE = "'image' is {}, must be one file name (or 'file_name')"


class BadSample(ValueError):
    """One entry of the data that cannot be used; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with one question.

    Attributes:
        id: `question_id`, `id` or where the entry is; a whole number stays one, as files of answers need it.
        text: the question, without image token and without prompt format.
        image: path of the image file; whatever else `fitprune.calibration.pictures.load_picture` reads.
        answers: accepted answers; empty where the data has none.
        kind: a label that results are grouped by ("" where the data has none).
        where: file and line, for messages.
    """

    id: str | int
    text: str
    image: Path | str | bytes | InDataset | Image.Image | np.ndarray[Any, Any]
    answers: tuple[str, ...] = ()
    kind: str = ""
    where: str = ""

    def load_image(self) -> Image.Image:
        """Decode the image as RGB, as a viewer shows it (`fitprune.calibration.pictures` has the rules).

        Raises:
            BadSample: the file is missing, no image, truncated, animated, a single pixel, or a decompression bomb.
        """
        try:
            return load_picture(self.image)
        except BadPicture as error:
            of_data = self.where and not self.where.startswith("--")  # an option names its image itself
            hint = "; check --image-folder" if of_data and "does not exist" in str(error) else ""
            raise BadSample(f"{self.where}: {error}{hint}".removeprefix(": ")) from None


def load_samples(
    data: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> list[Sample]:
    """Read samples from a file, a folder or a Hugging Face dataset.

    Formats, told apart by content: JSONL with a question a line (`question_id`, `image` or `file_name`, `text`, and
    optionally `answer` (string or list), `kind`); LLaVA's instruction JSON (a list of `id`, `image`, `conversations`;
    the first question and its answer are used, and entries of text alone are left out, with a count); a folder or hub
    name that `datasets` loads (columns `image` and `text` or `question`, optionally `answer` or `answers`), with its
    split as `name:split`. docs/data.md has all keys and what may stand in them.

    Args:
        data: the file, folder or name, also of embedded data.
        image_folder: where relative image paths begin; by default the data file's folder.
        samples: take so many, drawn without replacement; all by default, in the data's order.
        seed: seed of the draw.
        skip_bad: leave bad entries out, with a warning and a count, instead of raising. Images are decoded to see: all
            of them, or those of a draw, where others are drawn for bad ones.

    Raises:
        FileNotFoundError: there is no such file.
        BadSample: an entry is broken, with its file and line; not with `skip_bad`.
        ValueError: no sample is left, there is no such split, `samples` is below 1 or more than there are, or an
            argument is of another type.
    """
    if not isinstance(data, (str, os.PathLike)) or not os.fspath(data):
        raise ValueError(f"data={shown(repr(data))}: must be the name of a file, a folder or a dataset")
    if samples is not None:
        require_whole("samples", samples, 1)
    require_whole("seed", seed)
    path, entries = _entries(os.fspath(data))
    folder = Path(image_folder) if image_folder is not None else path.parent if os.path.isfile(path) else path
    if not (image_folder is None or os.path.isdir(folder)):
        raise FileNotFoundError(2, f"image folder {folder} does not exist")

    found: list[Sample] = []
    without: list[str] = []  # where entries of text alone are
    bad = 0

    def skip(error: BadSample) -> None:
        nonlocal bad
        if not skip_bad:
            raise error
        logger.warning("skipped: %s", error)
        bad += 1

    def usable(sample: Sample) -> bool:
        try:
            sample.load_image()
        except BadSample as error:
            skip(error)
            return False
        return True

    for where, entry in entries:
        if _is_text_alone(entry):
            without.append(where)
            continue
        try:
            found.append(_sample(entry, folder, where))
        except BadSample as error:
            skip(error)
    if without and not found and not bad:
        skip(BadSample(f"{without[0]}: {_NO_IMAGE.format(None)}; no entry has an image"))
    elif without:
        total = len(without) + len(found) + bad
        logger.warning("%d of %d entries of %s have no image: left out", len(without), total, data)

    total = len(found) + bad
    if samples is None or samples <= len(found):
        places = range(len(found)) if samples is None else _drawn(len(found), samples, seed)
        good = (place for place in places if not skip_bad or usable(found[place]))
        found = [found[place] for place in sorted(itertools.islice(good, samples))]
    if bad:
        logger.warning("%d of %d entries of %s skipped", bad, total, data)
    if not found:
        raise ValueError(f"{data}: no usable sample in it ({bad} skipped); there must be at least one")
    if samples is not None and samples > len(found):
        raise ValueError(
            f"samples={samples}: {data} has only {len(found)} usable ones; ask for fewer, or leave it out for all"
        )
    return found


def require_whole(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse an argument that is not a whole number, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        rule = "must be a whole number" if math.isinf(least) else f"must be at least {least:g}, a whole number"
        raise ValueError(f"{name}={shown(repr(value))}: {rule}")


def _drawn(total: int, count: int, seed: int) -> Iterable[int]:
    """Draw `count` places without replacement, and after them the others, in random order, to stand in for bad ones."""
    draw = random.Random(seed)
    first = draw.sample(range(total), count)
    yield from first
    others = sorted(set(range(total)).difference(first))
    draw.shuffle(others)
    yield from others


def recombined(samples: Sequence[Sample], times: int, *, seed: int = 0) -> list[Sample]:
    """Ask every image `times` questions: its own, and then those of other samples, drawn without repetition.

    The new samples have no accepted answers: they are for what needs none, such as `fitprune.search`, which
    compares a pruned model with the dense one. So a small calibration set says more.

    Args:
        samples: the samples; they stay the first of the result.
        times: questions for each image, at most as many as there are samples.
        seed: of the draw.

    Raises:
        ValueError: `times` is below 1.
    """
    if times < 1:
        raise ValueError(f"times={times}: must be at least 1")
    found, count = list(samples), len(samples)
    for shift in random.Random(seed).sample(range(1, count), max(0, min(times, count) - 1)):
        for number, sample in enumerate(samples):
            asks = samples[(number + shift) % count]
            found.append(
                dataclasses.replace(sample, id=f"{sample.id} {asks.id}", text=asks.text, kind=asks.kind, answers=())
            )
    return found


def _entries(name: str) -> tuple[Path, Iterable[tuple[str, Any]]]:
    """Give the file or folder of the data, and (where, entry) for each entry; a broken line is one, as an exception."""
    split = ""
    # A slice or a sum of splits is no split's name, and is answered as one that is not there.
    named = re.fullmatch(r"(.+):([\w.-]+)", name) or re.fullmatch(r"(.+?):([\w.+:%\[\]-]+)", name)
    if named and not os.path.exists(name):
        name, split = named.groups()
    if "://" in name:
        raise ValueError(f"{shown(name)}: is a URL, must be a file, a folder or a hub name; download it")
    path = Path(assets.resolve(name))
    if split and os.path.isfile(path / split / "metadata.jsonl"):
        path, split = path / split, ""
    if os.path.isfile(path / "metadata.jsonl"):
        path = path / "metadata.jsonl"  # an image folder in the datasets sense reads without datasets too
    if not os.path.isfile(path):
        return path, _dataset_entries(path, name, split)
    if split:
        raise ValueError(f"{name}:{split}: {path.name} has no splits; name {name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; must be JSONL or JSON") from None
    start = _skip_space(text, 0)
    if path.suffix.lower() in (".tsv", ".csv") and text[start : start + 1] not in ("[", "{"):
        raise ValueError(f"{path}: is {path.suffix[1:].upper()}, must be JSONL or JSON; convert it, a line an object")
    return path, _list_entries(path, text, start + 1) if text[start : start + 1] == "[" else _line_entries(path, text)


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    """Make a JSON object; one that has a key twice is an exception, for whoever asks for it."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    return BadSample(f"has the key {shown(max(names, key=names.count))!r} twice, must have it once")


_LONGEST_NUMBER = 400  # digits; Python refuses thousands of them, in the middle of the parse
_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=lambda text: int(text) if len(text) < _LONGEST_NUMBER else math.inf
)


_SPACE = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _parsed(text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    """Parse one JSON value; gives it and where it ends. Lines count from the text's first, which is `line`."""
    try:
        return _JSON.raw_decode(text, _skip_space(text, at))
    except json.JSONDecodeError as error:
        raise BadSample(f"{path}:{line - 1 + error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise BadSample(f"{path}:{line + text.count(chr(10), 0, at)}: nested too deeply, must be an entry") from None


def _list_entries(path: Path, text: str, at: int) -> Iterator[tuple[str, Any]]:
    """Give the entries of a JSON list one by one: all of LLaVA's at once take several times their text's memory."""
    for number in itertools.count():
        at = _skip_space(text, at)
        if number == 0 and text[at : at + 1] == "]":
            return
        entry, at = _parsed(text, at, path, 1)
        yield f"{path}, entry {number}", entry
        at = _skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line = text.count("\n", 0, at) + 1
        raise BadSample(f"{path}:{line}: not JSON (after entry {number} there must be ',', or ']' and the file's end)")


def _line_entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Give the entries of JSONL, or of a file that is one object, whether it stands in one line or in many."""
    try:
        whole, end = _parsed(text, 0, path, 1)
        if not text[end:].strip():
            yield f"{path}:1", _require_entry(whole)
            return
    except BadSample:
        pass  # it is named below, with its line
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry, end = _parsed(line, 0, path, number)
            if line[end:].strip():
                entry = BadSample("not JSON (Extra data)")
            yield f"{path}:{number}", entry
        except BadSample as error:
            yield f"{path}:{number}", error


def _require_entry(whole: Any) -> Any:
    """Say what a file is that holds one object and no entry, as TextVQA's and VizWiz's do."""
    if not isinstance(whole, dict) or {"image", "file_name", "text", "question", "conversations"} & set(whole):
        return whole
    lists = [
        name for name, value in whole.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)
    ]
    remedy = f"; save its list {shown(lists[0], 20)!r} as a file of its own" if lists else ""
    if {"columns", "data"} <= set(whole):
        remedy = "; with pandas: to_json(..., orient='records')"
    keys = shown(", ".join(repr(shown(name, 20)) for name in whole))
    return BadSample(
        f"the file is one JSON object with {f'keys {keys}' if whole else 'no keys'}, must be a list of entries or "
        f"JSONL{remedy}"
    )


def _dataset_entries(path: Path, name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Give (where, row) of a Hugging Face dataset: saved to disk, an image folder, or a hub name, split or not."""
    if not os.path.isdir(path) and (path.suffix or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(2, f"{name}: no such file or folder")
    if os.path.isfile(path / "config.json"):
        raise ValueError(f"{name}: is a model's folder, must be data; embedded are {', '.join(assets.DATA)}")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: reading a dataset needs the datasets package: pip install datasets") from None
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except Exception as error:  # datasets raises many kinds; all mean that the name does not load
        reason = "it has no rows" if isinstance(error, IndexError) else " ".join(str(error).split())
        raise ValueError(
            f"{name}: datasets cannot load it ({shown(reason, 300)}); give a JSONL file, a folder or a hub name"
        ) from None
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or ""): loaded}
    if not split and len(splits) > 1:
        first, other, *_ = splits
        logger.warning("%s has splits %s: %r is used; name another as %s:%s", name, [*splits], first, name, other)
    if split and split not in splits:
        names = ", ".join(filter(None, splits))
        rule = f"no such split; there are {names}" if names else f"the dataset has no splits; name {name}"
        raise ValueError(f"{name}:{split}: {rule}")
    rows = (splits[split] if split else next(iter(splits.values()))).with_format("arrow")
    # No picture is read here: one that nobody asks for costs nothing, and a bad one is named where it is asked for.
    number = itertools.count()
    classes = {column: kind for column, kind in rows.features.items() if "ClassLabel" in repr(kind)}
    for table in rows.iter(batch_size=1000):
        heavy = [c.name for c in table.schema if c.name in ("image", "file_name") and not _is_text(c.type)]
        there = {column: table[column].is_valid().to_pylist() for column in heavy}
        for offset, row in enumerate(table.drop_columns(heavy).to_pylist()):
            place = next(number)
            held = {c: InDataset(rows, place, c) if there[c][offset] else None for c in heavy}
            words = {column: _with_class_names(row.get(column), kind) for column, kind in classes.items()}
            yield f"{name}, row {place}", {**row, **words, **held}


def _with_class_names(value: Any, kind: Any) -> Any:
    """Put a ClassLabel's name for its number, also inside of lists and dicts; -1 stands for no class."""
    if value is None:
        return None
    if isinstance(kind, dict):
        return {key: _with_class_names(value[key], inner) for key, inner in kind.items()}
    if (inner := kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)) is not None:
        return [_with_class_names(each, inner) for each in value]
    if hasattr(kind, "int2str"):
        return kind.int2str(value) if value >= 0 else None
    return value


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "null")


def _meant(value: Any) -> Any:
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
    value = _meant(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def _first(entry: dict[str, Any], *names: str) -> Any:
    """Give the value of the first of the keys that has one; of several empty ones the first, to be shown."""
    values = [value for name in names if (value := _meant(entry.get(name))) is not None]
    return next((value for value in values if not _is_empty(value)), values[0] if values else None)


def _word(value: Any) -> str | None:
    """Write text or a number as people do, a whole float without its point; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return str(value + 0.0).removesuffix(".0")  # -0.0 is 0
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _is_text_alone(entry: Any) -> bool:
    """Whether it is an entry of LLaVA's instruction JSON that has no image, as ShareGPT's in the mix of 665k."""
    return (
        isinstance(entry, dict)
        and _first(entry, "conversations") is not None
        and _is_empty(_first(entry, "image", "file_name"))
    )


def _sample(entry: Any, folder: Path, where: str) -> Sample:
    """Make a sample of one entry in any of the formats."""
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
        raise BadSample(f"{where}: 'text' is {_shown(text)}, must be a question (or 'question', or 'conversations')")
    kind, number = _first(entry, "kind", "category"), _first(entry, "question_id", "id")
    found = Sample(
        where if _is_empty(number) else _id(number, where),
        question,
        _image(entry, folder, where),
        _accepted(answer, where),
        "" if _is_empty(kind) else _required(_word(kind), where, "kind", kind),
        where,
    )
    parts = [str(found.id), found.text, found.kind, *found.answers]
    if not _encodable("".join(parts)):
        part = next(part for part in parts if not _encodable(part))
        raise BadSample(f"{where}: {_shown(part)} holds half of a surrogate pair, must be text; write it as UTF-8")
    return found


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
        raise BadSample(f"{where}: {_NO_IMAGE.format(_shown(value))}")
    return image


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
    there = ["" if _is_empty(value, 0) else value for value in map(_meant, answers)]
    return tuple(_required(_word(value), where, "answer", answer) for value in there)


def _id(number: Any, where: str) -> str | int:
    word = _required(_word(number), where, "question_id", number)
    return word if isinstance(number, str) or not word.removeprefix("-").isdecimal() else int(word)


def _required(word: str | None, where: str, name: str, value: Any) -> str:
    if word is None:
        several = " or a list of strings" if name == "answer" else ""
        raise BadSample(f"{where}: {name!r} is {_shown(value)}, must be a string or a finite number{several}")
    return word


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """Write a value of the data for a message; reprlib goes neither deep nor far."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return shown(short.repr(value), 80)


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
