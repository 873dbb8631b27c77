"""Read the entries of a data file: question JSONL or a JSON list, with the line of each entry; or a dataset's rows."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fitprune._support import assets, messages
from fitprune.calibration.dataset_rows import read_rows
from fitprune.calibration.entry import BadSample

_LONGEST_NUMBER = 400  # digits; Python refuses thousands of them, in the middle of the parse
_SPACE = re.compile(r"[ \t\n\r]*")


def read_entries(name: str) -> tuple[Path, Iterable[tuple[str, Any]]]:
    """Find the data and read it; a broken line of JSONL is an entry too: a `BadSample`.

    Args:
        name: a file, a folder, bundled data or a hub name, with `:split` or not.

    Returns:
        The file or folder, and (where, entry) for each entry.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is a URL, the file is of another format, or as `read_rows`.
    """
    split = ""
    # A slice or a sum of splits is no split's name; the message says that there is no such split.
    parts = re.fullmatch(r"(.+):([\w.-]+)", name) or re.fullmatch(r"(.+?):([\w.+:%\[\]-]+)", name)
    if parts and not os.path.exists(name):
        name, split = parts.groups()
    if "://" in name:
        raise ValueError(f"{messages.line(name)}: is a URL, must be a file, a folder or a hub name; download it")
    path = Path(assets.resolve(name))
    if split and os.path.isfile(path / split / "metadata.jsonl"):
        path, split = path / split, ""
    if os.path.isfile(path / "metadata.jsonl"):
        path = path / "metadata.jsonl"  # an image folder in the datasets sense reads without datasets too
    if not os.path.isfile(path):
        return path, read_rows(path, name, split)
    if split:
        raise ValueError(f"{name}:{split}: {path.name} has no splits; name {name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; must be JSONL or JSON") from None
    start = _skip_space(text, 0)
    if path.suffix.lower() in (".tsv", ".csv") and text[start : start + 1] not in ("[", "{"):
        raise ValueError(f"{path}: is {path.suffix[1:].upper()}, must be JSONL or JSON; convert it, a line an object")
    return path, _read_list(path, text, start + 1) if text[start : start + 1] == "[" else _read_lines(path, text)


def _read_list(path: Path, text: str, at: int) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a JSON list one by one: all of LLaVA's at once take several times their text's memory."""
    for number in itertools.count():
        at = _skip_space(text, at)
        if number == 0 and text[at : at + 1] == "]":
            return
        entry, at = _parse(text, at, path, 1)
        yield f"{path}, entry {number}", entry
        at = _skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line = text.count("\n", 0, at) + 1
        raise BadSample(f"{path}:{line}: not JSON (after entry {number} there must be ',', or ']' and the file's end)")


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of JSONL, or of a file that is one object, on one line or on many."""
    try:
        whole, end = _parse(text, 0, path, 1)
        if not text[end:].strip():
            yield f"{path}:1", _require_entry(whole)
            return
    except BadSample:
        pass  # it is named below, with its line
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry, end = _parse(line, 0, path, number)
            if line[end:].strip():
                entry = BadSample("not JSON (Extra data)")
            yield f"{path}:{number}", entry
        except BadSample as error:
            yield f"{path}:{number}", error


def _require_entry(whole: Any) -> Any:
    """Replace one object that is no entry, as TextVQA's and VizWiz's files are, by an error that says what it is."""
    if not isinstance(whole, dict) or {"image", "file_name", "text", "question", "conversations"} & set(whole):
        return whole
    lists = [
        name for name, value in whole.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)
    ]
    remedy = f"; save its list {messages.line(lists[0], 20)!r} as a file of its own" if lists else ""
    if {"columns", "data"} <= set(whole):
        remedy = "; with pandas: to_json(..., orient='records')"
    keys = messages.line(", ".join(repr(messages.line(name, 20)) for name in whole))
    return BadSample(
        f"the file is one JSON object with {f'keys {keys}' if whole else 'no keys'}, must be a list of entries or "
        f"JSONL{remedy}"
    )


def _parse(text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    """Parse one JSON value; returns it and where it ends. The text's first line has the number `line`."""
    try:
        return _JSON.raw_decode(text, _skip_space(text, at))
    except json.JSONDecodeError as error:
        raise BadSample(f"{path}:{line - 1 + error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise BadSample(f"{path}:{line + text.count(chr(10), 0, at)}: nested too deeply, must be an entry") from None


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space
    return space.end()


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    """Make a JSON object; where a key is repeated, the exception that says so."""
    entry = dict(pairs)
    if len(entry) == len(pairs):
        return entry
    names = [name for name, _ in pairs]
    return BadSample(f"has the key {messages.line(max(names, key=names.count))!r} twice, must have it once")


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=lambda text: int(text) if len(text) < _LONGEST_NUMBER else math.inf
)
