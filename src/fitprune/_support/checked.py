"""Checks of numbers from users and files; each error names the value, the rule and, where there is one, the remedy."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from fitprune._support.messages import short


def whole(name: str, value: Any, least: int, most: int, remedy: str = "") -> None:
    """Refuse what is no integer from `least` to `most`.

    Args:
        name: of the value, for the message.
        value: what is checked.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        remedy: ends the message.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name}={short(value)}: must be an integer from {least} to {most:,}{remedy}")


def number(name: str, value: Any) -> None:
    """Refuse what is no real number, such as text or NaN.

    Args:
        name: of the value, for the message.
        value: what is checked.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise ValueError(f"{name}={short(value)}: must be a finite number")


def fraction(name: str, value: Any) -> None:
    """Refuse what is no number from 0 to 1.

    Args:
        name: of the value, for the message.
        value: what is checked.

    Raises:
        ValueError: it is something else.
    """
    number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={short(value)}: must be between 0 and 1")
