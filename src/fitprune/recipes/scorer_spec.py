"""The scorer in a recipe, {"name": ..., "parameters": {...}}: its form, not which scorers there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fitprune._support.messages import short

FITPRUNE = "fitprune"  # what ranks tokens where a recipe names no scorer

# What ranks the tokens of methods whose recipes older versions wrote without their scorer.
_LEFT_OUT = {
    "random": "random", "random-input": "random", "fastv": "last", "pyramiddrop": "last", "vtw": "place",
    "divprune": "max-min", "cdpruner": "dpp", "dart": "duplication", "visionzip": "cls",
}  # fmt: skip


def scorer_parts(scorer: Any) -> tuple[str, dict[str, Any]]:
    """Take a recipe's scorer apart into its name and its parameters.

    Args:
        scorer: an object with a "name" and, where it has any, "parameters".

    Raises:
        ValueError: it has another form. Whether there is such a scorer, `fitprune.scoring.scorers` knows.
    """
    if isinstance(scorer, Mapping) and set(scorer) <= {"name", "parameters"}:
        name, parameters = scorer.get("name"), scorer.get("parameters", {})
        if isinstance(name, str) and isinstance(parameters, Mapping):
            return name, dict(parameters)
    raise ValueError(f"scorer={short(scorer)}: must be an object with a 'name' and perhaps 'parameters'")


def left_out(provenance: Mapping[str, Any]) -> str | None:
    """Name the scorer that older versions left out of a recipe of this provenance; None where it is FitPrune's."""
    method = provenance.get("method")
    name = method.partition(":")[0].strip().lower().replace("_", "-") if isinstance(method, str) else ""
    return _LEFT_OUT.get(name)


def require_scorer(provenance: Mapping[str, Any]) -> None:
    """Refuse, by its provenance, a recipe that names no scorer though its method has another than FitPrune's."""
    if name := left_out(provenance):
        spec = {"name": name, **({"parameters": {"seed": 0}} if name == "random" else {})}
        raise ValueError(
            f"the recipe of method {short(provenance['method'])} names no scorer (an older version left it out), and "
            f'would rank by FitPrune\'s: make it again, or add "scorer": {json.dumps(spec)}'
        )
