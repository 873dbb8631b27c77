"""Write files whole or not at all.

A file is written beside its place under a temporary name and renamed, so that a killed run or a full disk leaves the
old file, or none, never half of one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any exception it is removed.

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


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work that its output can be written; leaves nothing behind.

    Raises:
        OSError: as for `replacing`.
    """
    _open_beside(path)[1].unlink()


def make_readable(path: Path) -> None:
    """Give a file that was made as a temporary one, for its owner alone, the rights of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _open_beside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Give the file meant by `path`, links followed, and a new temporary file beside it."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir() or os.fspath(path).endswith(os.sep):
            raise IsADirectoryError(21, "is a folder, not a file")
        if target.exists() and not target.is_file():
            raise FileExistsError(17, "is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}; choose another output path") from None
    os.close(handle)
    return target, Path(name)
