"""Say which budget a recipe was fitted to, in a stranger's words too. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LONGEST_VALUE = 200  # characters of one value of the origin


def budget_of(provenance: Mapping[str, Any]) -> str:
    """Write the budget of a recipe, and what was reached of it.

    Args:
        provenance: the recipe's.
    """
    budget = provenance.get("budget")
    if isinstance(budget, Mapping) and budget:
        budgets = ", ".join(f"{as_text(kind)} {as_text(value)}" for kind, value in budget.items())
        reached = provenance.get("reached")
        rounded = f"{reached:.4g}" if isinstance(reached, float) else as_text(reached)
        return budgets + (f", reached {rounded}" if "reached" in provenance else "")
    if "nominal_percent" in provenance:
        return f"{as_text(provenance['nominal_percent'])}% of the visual FLOPs, as its authors name it"
    return "not recorded"


def as_text(value: Any) -> str:
    """Write a value of a recipe, which may be a stranger's: on one line, control characters escaped, not too long."""
    text = json.dumps(value, ensure_ascii=True)
    text = text[1:-1] if isinstance(value, str) else text
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
