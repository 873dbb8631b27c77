"""What a recipe's fields must be, so that a damaged one fails where it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support import checked
from fitprune.recipes.scorer_spec import scorer_parts

MOST_PARAMETERS = 64  # of a scorer, one nested in another counted alone; the richest has a dozen


def require_fractions(keep: Sequence[Any], enter: Sequence[Any], layers: int) -> None:
    """Refuse what are no fractions, one for each layer, that never rise; `enter` may be empty."""
    for name, values in (("keep", keep), ("enter", enter)):
        if len(values) != layers and (name == "keep" or values):
            raise ValueError(f"{name} has {len(values)} entries: must be one for each of the model's {layers} layers")
    before, name_before = 1.0, "1"
    for layer in range(layers):  # in the order in which tokens leave: into a layer, inside it
        for part, values in (("enter", enter), ("keep", keep)) if enter else (("keep", keep),):
            name, fraction = f"{part}[{layer}]", values[layer]
            checked.fraction(name, fraction)
            if fraction > before:
                raise ValueError(
                    f"{name}={fraction}: must not exceed {name_before}={before}; removed tokens cannot return"
                )
            before, name_before = fraction, name


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
