"""Show values, text and errors in a message: on one line, and short whatever their size."""

from __future__ import annotations

import reprlib
from typing import Any


def short(value: Any, most: int = 60) -> str:
    """Show a value as `repr` does, in at most `most` characters; its parts are read neither deep nor far."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = max(most, shortener.maxstring)
    return _cut(shortener.repr(value), most)


def line(text: str | BaseException, most: int = 60) -> str:
    """Show text as it is, or an error's message, in at most `most` characters.

    What cannot be printed in text is escaped. White space in an error's message becomes single spaces; an error without
    a message is shown by the name of its type. The first sentence alone: `line(error, 300).partition(". ")[0]`.
    """
    if isinstance(text, BaseException):
        text = " ".join(str(text).split()) or type(text).__name__
    text = _cut(text, most)
    return text if text.isprintable() else _cut(repr(text)[1:-1], most)


def _cut(text: str, most: int) -> str:
    """Leave out the middle of what is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[len(text) - (most - most // 2 - 3) :]}"
