"""Words in pictures: lines that fit, in the letters that there are."""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from collections.abc import Callable

from PIL import ImageFont

BOX = "\u25a1"  # of which Pillow's font draws its sign for a missing letter, a box
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what XML has no place for
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2022\u00b7", "-"),
        **dict.fromkeys("\u201a\u2032\u2039\u203a", "'"),
        **dict.fromkeys("\u201e\u2033\u00ab\u00bb", '"'),
        "\u2026": "...", "\u00d7": "x", "\u00bf": "?", "\u00a1": "!",
    }
)  # fmt: skip


def plain(text: str) -> str:
    """Write a text on one line, without control characters."""
    return " ".join(_CONTROL.sub(" ", text).split())


def drawable(text: str) -> str:
    """Write a text in the letters of Pillow's font: accents are left out, a letter that it lacks becomes a box."""
    return "".join(map(_drawable, _alike(text)))


def lacks(text: str) -> bool:
    """Whether Pillow's font has no such letters."""
    return any(_drawable(letter) != letter for letter in _alike(text))


def _alike(text: str) -> str:
    return unicodedata.normalize("NFC", plain(text)).translate(_ALIKE)


def _drawable(letter: str) -> str:
    if _is_there(letter):
        return letter
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return ""
    base = unicodedata.normalize("NFKD", letter)[0]
    return base if _is_there(base) else BOX


@functools.lru_cache(4096)
def _is_there(letter: str) -> bool:
    mask, missing = (font(20).getmask(each) for each in (letter, BOX))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


@functools.lru_cache(32)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's own font, which is the same on every machine."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)  # as Pillow's own wheels have it
    return loaded


def width_of(text: str, size: int) -> float:
    """Estimate how wide a browser writes a text, whose font is not known: from above."""
    return sum(1.15 * font(size).getlength(letter) if _is_there(letter) else 1.05 * size for letter in text)


def wrapped(text: str, width: float, measure: Callable[[str], float], most: int) -> list[str]:
    """Break a text into lines that fit: between words, and inside of one that is longer than a line.

    Args:
        text: on one line.
        width: of a line.
        measure: how wide a text is.
        most: lines; a text that is longer ends in "...".
    """

    def fitting(line: str, room: float) -> int:
        return bisect.bisect_right(range(1, len(line) + 1), room, key=lambda count: measure(line[:count]))

    lines = [""]
    for word in text.split():
        if lines[-1] and measure(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
        while len(lines) <= most and (count := max(1, fitting(lines[-1], width))) < len(lines[-1]):
            lines[-1:] = [lines[-1][:count], lines[-1][count:]]
        if len(lines) > most:
            last = lines[most - 1]
            return [*lines[: most - 1], f"{last[: fitting(last, width - measure('...'))]}..."]
    return [line for line in lines if line]
