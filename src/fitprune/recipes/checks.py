"""What a recipe's fields must be, so that a damaged one fails where it is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fitprune._support import checked
from fitprune.recipes.scorer_spec import scorer_parts

MOST_PARAMETERS = 64  # of a scorer, one nested in another counted alone; the richest has a dozen


def fractions(keep: Any, enter: Any, layers: int) -> dict[str, tuple[float, ...]]:
    """Take fractions, one for each layer, that never rise, and refuse all else; `enter` may be empty."""
    parts: dict[str, tuple[Any, ...]] = {}
    for name, values in (
        ("enter", enter),
        ("keep", keep),
    ):  # in the order in which tokens leave: into a layer, inside it
        if not isinstance(values, Iterable):
            raise ValueError(f"{name} is a {type(values).__name__}: must be a list of numbers")
        parts[name] = tuple(values)
        if len(parts[name]) != layers and (name == "keep" or parts[name]):
            raise ValueError(
                f"{name} has {len(parts[name])} entries: must be one for each of the model's {layers} layers"
            )
    before, name_before = 1.0, "1"
    for layer in range(layers):
        for part in (name for name in parts if parts[name]):
            name, fraction = f"{part}[{layer}]", parts[part][layer]
            checked.fraction(name, fraction)
            if fraction > before:
                raise ValueError(
                    f"{name}={fraction}: must not exceed {name_before}={before}; removed tokens cannot return"
                )
            before, name_before = fraction, name
    return {name: tuple(map(float, values)) for name, values in parts.items()}


def require_scorer(scorer: Any) -> None:
    """Refuse what has not the form of a scorer, or too many parameters."""
    _, parameters = scorer_parts(scorer)
    if (count := len(parameters)) > MOST_PARAMETERS:
        raise ValueError(f"scorer has {count} parameters: must have at most {MOST_PARAMETERS}")


def require_json(name: str, value: Any) -> None:
    """Refuse what is no mapping, or what JSON cannot hold."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a mapping")
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error}): must hold text, finite numbers, lists, objects") from None
