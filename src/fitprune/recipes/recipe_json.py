"""A recipe as JSON text: plain fields in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fitprune._support import files
from fitprune._support.messages import short
from fitprune.costs.sizes import ModelFingerprint
from fitprune.recipes import scorer_spec

SCHEMA = 1
_REQUIRED = {"schema", "model", "visual_tokens", "keep", "provenance"}
_KNOWN = _REQUIRED | {"enter", "scorer"}


def text_of(fields: Mapping[str, Any]) -> str:
    """Write a recipe's fields; `enter` and a scorer that goes without saying are left out."""
    scorer, provenance = dict(fields["scorer"]), dict(fields["provenance"])
    names_scorer = scorer != {"name": scorer_spec.FITPRUNE} or scorer_spec.left_out(provenance)
    data = {
        "schema": SCHEMA,
        "model": fields["model"].to_dict(),
        "visual_tokens": fields["visual_tokens"],
        "keep": list(fields["keep"]),
        **({"enter": list(fields["enter"])} if fields["enter"] else {}),
        **({"scorer": scorer} if names_scorer else {}),
        "provenance": provenance,
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def fields_of(text: str) -> dict[str, Any]:
    """Read `text_of`'s text; a ValueError says what is wrong with another one."""
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}: must be JSON text; load reads a file")
    try:
        data = files.parse_json(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise ValueError(f"recipe is {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"recipe is a JSON {type(data).__name__}: must be an object")
    if type(schema := data.get("schema")) is not int or schema != SCHEMA:
        raise ValueError(f"schema={short(schema)}: this version reads schema {SCHEMA}; is it a recipe?")
    if unknown := sorted(set(data) - _KNOWN):
        raise ValueError(f"unknown key {short(unknown[0])} in recipe: must be among {sorted(_KNOWN)}; remove it")
    if missing := sorted(_REQUIRED - set(data)):
        raise ValueError(f"key {missing[0]!r} is missing from the recipe; fit it again")
    lists = isinstance(data["keep"], list) and isinstance(data.get("enter", []), list)
    if not lists or not isinstance(data["provenance"], dict):
        raise ValueError("recipe's 'keep' (and 'enter') must be a list and 'provenance' an object; fit it again")
    if "scorer" not in data:
        scorer_spec.require_scorer(data["provenance"])
    del data["schema"]
    return {**data, "model": ModelFingerprint.from_dict(data["model"])}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(data := dict(pairs)) < len(pairs):
        raise ValueError(f"wrong: a key is listed twice among {short([key for key, _ in pairs])}; remove one")
    return data
