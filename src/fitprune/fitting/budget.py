"""Budgets: what a user asks for, what each kind counts, and whether counts meet it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

from fitprune._support import checked
from fitprune._support.messages import short
from fitprune.costs import flops
from fitprune.costs.counts import Counts
from fitprune.costs.latency import LatencyProfile
from fitprune.costs.sizes import DecoderSizes

Kind = Literal[
    "flops_reduction", "kv_cache_reduction", "mean_visual_tokens", "tolerance", "prefill_latency_reduction"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


class OutOfReach(ValueError):
    """A budget that the method cannot meet, whatever it removes."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the user asks for: a kind, its value and, for a latency, the profile of the device."""

    kind: Kind
    value: float
    profile: LatencyProfile | None = None

    def measured(
        self,
        decoder: DecoderSizes,
        visual_tokens: int,
        kept: Sequence[float],
        entering: Sequence[float] | None = None,
    ) -> float:
        """Evaluate this kind of budget for `kept` tokens after each layer. More removal never moves it away from met.

        `entering` are the tokens that enter each layer, where some leave between layers. Counts are fractional while a
        tolerance is searched; the arithmetic is the same as for whole ones.
        """
        counts = Counts(visual_tokens, kept, entering or ())  # type: ignore[arg-type]  # fractional in a fit
        if self.kind == "mean_visual_tokens":
            return sum(counts.entering) / len(counts.entering)
        if self.kind == "kv_cache_reduction":
            cached = [counts.entering[layer] for layer in decoder.attention_layers]
            return 1 - sum(cached) / len(cached) / visual_tokens
        if self.profile is not None:
            spent = self.profile.prefill_seconds(visual_tokens, kept, entering)
            return 1 - spent / self.profile.dense_seconds(visual_tokens)
        return flops.visual_flops_reduction(decoder, visual_tokens, counts.removed, counts.before)

    def met_by(self, measured: float) -> bool:
        """Say whether the budget is met, to within floating-point noise."""
        if self.kind == "mean_visual_tokens":
            return measured <= self.value + 1e-9
        return measured >= self.value - 1e-12


@overload
def budget_from(*, profile: LatencyProfile | None = None, **values: float | None) -> Budget: ...
@overload
def budget_from(*, profile: LatencyProfile | None = None, **values: Any) -> Budget | list[Budget]: ...
def budget_from(*, profile: LatencyProfile | None = None, **values: Any) -> Budget | list[Budget]:
    """Read the one budget that is passed, as in `budget_from(flops_reduction=0.6)`.

    Args:
        profile: of the device, for a latency alone.
        **values: one of KINDS with its value, or with a list of values; the others may be None.

    Returns:
        A budget, or for a list of values a list of budgets.

    Raises:
        ValueError: none is passed or several, a list is empty, or as for `checked_budget`.
    """
    passed = {kind: value for kind, value in values.items() if value is not None}
    if len(passed) != 1:
        raise ValueError(
            f"{len(passed)} budgets stated ({', '.join(passed) or 'none'}): pass exactly one of "
            f"{', '.join(values or KINDS)}"
        )
    [(kind, value)] = passed.items()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return checked_budget(kind, value, profile)
    if not value:
        raise ValueError(f"{kind}={value}: must hold at least one value; pass a number or a list of numbers")
    return [checked_budget(kind, one, profile, name=f"{kind}[{place}]") for place, one in enumerate(value)]


def checked_budget(kind: str, value: Any, profile: LatencyProfile | None = None, *, name: str | None = None) -> Budget:
    """Make a budget, or say what is wrong with its value (`name` in errors) or profile, which latencies alone have."""
    if kind not in KINDS:
        raise ValueError(f"budget {short(kind)}: must be one of {', '.join(KINDS)}")
    stated = f"{name or kind}={short(value)}"
    if (kind == "prefill_latency_reduction") != (profile is not None):
        what = "a profile: make it with 'fitprune profile'" if profile is None else "no profile: leave it out"
        raise ValueError(f"{stated}: needs {what}")
    if profile is not None and not isinstance(profile, LatencyProfile):
        raise ValueError(f"profile is a {type(profile).__name__}: must be a LatencyProfile, as of LatencyProfile.load")
    checked.number(name or kind, value)
    if abs(value) > 1e18:
        raise ValueError(f"{stated}: must be a finite number")
    if kind.endswith("_reduction") and not 0 <= value < 1:
        raise ValueError(f"{stated}: must be at least 0 and below 1 (a fraction, not percent)")
    if kind == "tolerance":
        checked.fraction(name or kind, value)
    if kind == "mean_visual_tokens" and value <= 0:
        raise ValueError(f"{stated}: must be above 0")
    return Budget(kind, float(value), profile)


def require_possible(budget: Budget, decoder: DecoderSizes, visual_tokens: int) -> None:
    """Refuse a budget that even removing everything at the first layer that lets it leave does not meet."""
    first = decoder.prunable[0]
    best = budget.measured(decoder, visual_tokens, [visual_tokens] * first + [0] * (decoder.layers - first))
    if not budget.met_by(best):
        # Rounded to the side that can be met, so that the figure in the message works.
        if budget.kind == "mean_visual_tokens":
            bound = f"at least {math.ceil(best * 1e4) / 1e4:.4f}"
        else:
            bound = f"at most {math.floor(best * 1e4) / 1e4:.4f}"
        raise OutOfReach(
            f"{budget.kind}={budget.value}: cannot be met even with all visual tokens removed after layer {first}; "
            f"ask for {bound}"
        )
