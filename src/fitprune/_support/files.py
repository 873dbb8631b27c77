"""Read files within bounds, say what a file is, and write files whole or not at all.

A file is written beside its place under a temporary name and renamed, so that a killed run or a full disk leaves the
old file, or none, never half of one. Files come from strangers too: JSON is read up to a size and a number of values,
so that no file takes more than a second and 200 MB before it is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fitprune._support import messages

MOST_BYTES = 4 << 20  # of a recipe or a latency profile; those that fits make have some thousands
MOST_RESULT_BYTES = 32 << 20  # results hold pictures, and what each method kept of them
MOST_VALUES = 2_500_000  # of a JSON text: a small number takes 8 bytes, an empty list 64

STATISTICS, RECIPE, RESULTS, PROFILE = "statistics", "a recipe", "results", "a latency profile"
TIMES, ANALYSIS, REPORT, JOURNAL = "times", "an analysis", "a report", "a journal of answers"
RESULT_TIMES, IMAGE = "times of an evaluation", "an image"
SCORES, UPLOAD = "scores of answers", "an upload file"
PICTURE, PICTURE_MARK = "a picture that fitprune drew", "fitprune show"  # the mark is in the file itself
_MAKERS = {STATISTICS: "measure", RECIPE: "fit", RESULTS: "evaluate", PROFILE: "profile"}
# As the writers of `fitprune.pictures` and `fitprune._support.page` put the mark: the words alone may be anybody's.
_MARKS = tuple(
    form % PICTURE_MARK.encode() for form in (b"tEXtSoftware\0%b", b"!\xfe\x0d%b\0", b"data\0\0\0\1\0\0\0\0%b")
)
_GENERATOR = b"<meta name=generator content='%b'>"
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def require_path(path: Any) -> None:
    """Refuse what names no file or folder.

    Args:
        path: what a caller passed as one.

    Raises:
        ValueError: it is neither text nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"the path is a {type(path).__name__}: must be the name of a file or folder, as text or Path")


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Read UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger, or no UTF-8.
    """
    with open(path, "rb") as file:
        read = file.read(most + 1)
    if len(read) > most:
        raise ValueError(f"too large: more than {most >> 20} MB")
    try:
        return read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no text: byte {error.start} is no UTF-8") from None


def parse_json(text: str, **hooks: Any) -> Any:
    """Parse JSON of at most MOST_VALUES values.

    Args:
        text: what to parse.
        **hooks: of `json.loads`.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds more.
    """
    # From above: what it takes in memory, in about that of a number in a list.
    if text.count(",") + 2 * text.count(":") + 8 * (text.count("[") + text.count("{")) > MOST_VALUES:
        raise ValueError(f"too large: more than {MOST_VALUES:,} values")
    try:
        return json.loads(text, **hooks)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def bounded_number(text: str) -> int | float:
    """Read a number of JSON that something is computed from, as a hook of `parse_json`.

    Args:
        text: the number, as the file has it.

    Raises:
        ValueError: it is not finite, or above 10**18.
    """
    if len(text) <= 40 and abs(value := float(text)) <= 1e18:
        return int(text) if text.lstrip("-").isdecimal() else value
    raise ValueError(f"a number is {messages.line(text, 23)}: must be finite, and at most 1e18")


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Say what a file is, by its content: statistics, a recipe, an image, ...; None where it is not known."""
    try:
        if not os.path.isfile(path):
            return "a folder" if os.path.isdir(path) else None
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            length = int.from_bytes(head[:8], "little")
            if head[8:9] == b"{" and 1 < length <= min(os.path.getsize(path), MOST_RESULT_BYTES):
                file.seek(8)
                metadata = parse_json(file.read(length).decode()).get("__metadata__") or {}
                ours = str(metadata.get("format")).startswith("fitprune-stats-")
                return STATISTICS if ours else "a safetensors file"
        if head.startswith(_IMAGES) or head[8:12] == b"WEBP" or head[4:8] == b"ftyp":
            return PICTURE if any(mark in head for mark in _MARKS) else IMAGE
        if head.startswith(b"<svg") and b"<metadata>%b</metadata>" % PICTURE_MARK.encode() in head[:600]:
            return PICTURE
        if head.startswith(b"<!doctype html>"):
            makers = {REPORT: b"fitprune", PICTURE: PICTURE_MARK.encode()}
            return next((kind for kind, maker in makers.items() if _GENERATOR % maker in head[:400]), None)
        if head.startswith(b'{"run": '):
            return JOURNAL
        return kind_of_data(parse_json(read_text(path, MOST_RESULT_BYTES)))
    except (OSError, ValueError, AttributeError):
        return None


def kind_of_data(data: Any) -> str | None:
    """Say what artefact a parsed JSON file is, by its keys."""
    if not isinstance(data, dict):
        return None
    if str(data.get("format")).startswith("fitprune-profile-"):
        return PROFILE
    if data.get("source") == "fitprune.analyze":
        return ANALYSIS
    keys = {
        RECIPE: {"schema", "model", "keep"},
        RESULTS: {"schema", "provenance", "rows", "best"},
        TIMES: {"model", "device", "torch", "timings"},
        RESULT_TIMES: {"results", "rows", "dense_prefill_seconds"},
        SCORES: {"benchmark", "metric", "maximum", "scores"},
    }
    return next((kind for kind, needed in keys.items() if needed <= set(data)), None)


def explained(path: str | os.PathLike[str], wanted: str, error: Exception) -> str:
    """Say why a file could not be read as the kind that is `wanted`: what it is, where that is known."""
    kind = kind_of(path)
    if kind in (None, wanted):
        return f"{path}: {error}"
    return f"{path} is {kind}: must be {wanted}, made by 'fitprune {_MAKERS[wanted]}'"


def missing(path: str | os.PathLike[str], kind: str) -> FileNotFoundError:
    """Make the error that says that a file of a kind is not there, and what makes it."""
    what = "not a regular file" if os.path.exists(path) else "no such file"
    return FileNotFoundError(2, f"{path}: {what}; make it with 'fitprune {_MAKERS[kind]}'")


def claim(path: str | os.PathLike[str], kind: str, *, overwrite: bool = False) -> str:
    """Find out before long work that its output can be written, and that it replaces nothing of another kind.

    Args:
        path: the file to be written; nothing is left there.
        kind: of what is to be written.
        overwrite: replace whatever file is there.

    Returns:
        ", which replaced the one there" for the line that says what was written, where a file is there; else "".

    Raises:
        ValueError: a file of another kind is there.
        OSError: as for `replacing`.
    """
    require_writable(path)
    if not os.path.exists(path) or not os.path.getsize(path):
        return ""
    if not overwrite and (present := kind_of(path)) != kind:
        raise ValueError(
            f"{path} is {present or 'no file of fitprune'}: choose another output for {kind}, or pass --overwrite"
        )
    return ", which replaced the one there"


def claim_folder(
    folder: str | os.PathLike[str], ours: Callable[[Path], bool], remedy: str, *, overwrite: bool = False
) -> None:
    """Find out that a folder is missing, or holds only what the command writes there.

    Args:
        folder: the output.
        ours: whether an entry is something that the command may stand beside, or replace.
        remedy: what else to do.
        overwrite: take it whatever it holds.

    Raises:
        ValueError: it is a file, or holds something else.
        OSError: it cannot be read.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    entries = [] if overwrite or not path.exists() else sorted(path.iterdir())
    if foreign := next((entry for entry in entries if not entry.name.startswith(".") and not ours(entry)), None):
        raise ValueError(f"{folder} holds other files, such as {foreign.name}: {remedy}, or pass --overwrite")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any exception it is removed.

    Args:
        path: the file; folders above it are made.

    Raises:
        OSError: the folder cannot be made or written to, or the disk is full; the message names `path`.
    """
    target, temporary = _open_beside(path)
    try:
        yield temporary
        make_readable(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8, whole or not at all.

    Args:
        path: the file.
        text: all of it.

    Raises:
        OSError: as for `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write data as JSON that people can read, whole or not at all; the same data gives the same bytes.

    Args:
        path: the file.
        data: what `json.dumps` takes.

    Raises:
        OSError: as for `replacing`.
        ValueError: the data holds a number that is not finite, which JSON has no word for.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work that its output can be written; nothing is left there.

    Args:
        path: of the output.

    Raises:
        OSError: as for `replacing`.
    """
    _open_beside(path, make_folders=False)[1].unlink()


def make_readable(path: Path) -> None:
    """Give a file that was made as a temporary one, for its owner alone, the rights of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _open_beside(path: str | os.PathLike[str], *, make_folders: bool = True) -> tuple[Path, Path]:
    """Give the file meant by `path`, links followed, and a new temporary file beside it, or above missing folders."""
    require_path(path)
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir() or os.fspath(path).endswith(os.sep):
            raise IsADirectoryError(21, "is a folder, not a file")
        if target.exists() and not target.is_file():
            raise FileExistsError(17, "is not a regular file")
        if make_folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = next(folder for folder in target.parents if folder.exists())
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=folder)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}; choose another output path") from None
    os.close(handle)
    return target, Path(name)
