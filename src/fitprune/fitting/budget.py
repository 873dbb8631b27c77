"""Budgets: what a user asks for, what each counts, and whether counts meet it."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from numbers import Real

from fitprune.costs import flops
from fitprune.costs.latency import LatencyProfile
from fitprune.costs.sizes import DecoderSizes
from fitprune.fitting import few_layers


class OutOfReach(ValueError):
    """A budget that the method cannot meet, whatever it removes."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the user asks for: a kind that `measured` can evaluate, and its value; for a latency, on which device."""

    kind: str
    value: float
    profile: LatencyProfile | None = None

    def measured(
        self,
        decoder: DecoderSizes,
        visual_tokens: int,
        kept: Sequence[float],
        entering: Sequence[float] | None = None,
    ) -> float:
        """Evaluate this kind of budget for `kept` tokens after each layer. More removal never moves it backwards.

        `entering` are the tokens that enter each layer, where some leave between layers.
        """
        before = [visual_tokens, *kept[:-1]]
        entering = before if entering is None else entering
        if self.kind == "mean_visual_tokens":
            return sum(entering) / len(entering)
        if self.kind == "kv_cache_reduction":
            cached = [entering[layer] for layer in decoder.attention_layers]
            return 1 - sum(cached) / len(cached) / visual_tokens
        if self.profile is not None:
            spent = self.profile.prefill_seconds(visual_tokens, kept, entering)
            return 1 - spent / self.profile.dense_seconds(visual_tokens)
        removed = [a - b for a, b in zip(entering, kept, strict=True)]
        between = [a - b for a, b in zip(before, entering, strict=True)]
        # Counts are fractional while a tolerance is searched; the arithmetic is the same as for whole ones.
        return flops.visual_flops_reduction(decoder, visual_tokens, removed, between)  # type: ignore[arg-type]

    def prices(self, decoder: DecoderSizes, visual_tokens: int) -> few_layers.Prices:
        """Write the budget as a sum over layers: `met_by(measured(...))` where no more than the limit is spent."""
        if self.kind == "flops_reduction":
            dense = flops.visual_macs(decoder, visual_tokens, [0] * decoder.layers)
            return few_layers.Prices(
                lambda layer, count: decoder.mixer_macs(layer, count, projected=0),
                lambda layer, count: decoder.mixer_macs(layer, 0, projected=count) + count * decoder.mlp_macs(layer),
                (1 - self.value) * dense,
            )
        if (profile := self.profile) is not None:
            text, tokens_at = profile.text_tokens, profile.seconds_at
            allowed = (1 - self.value) * profile.dense_seconds(visual_tokens) - profile.outside_seconds
            return few_layers.Prices(
                # What a layer takes for the text alone is in both, and cannot be saved.
                lambda _, count: tokens_at(profile.mixer_seconds, count + text),
                lambda _, count: tokens_at(profile.mlp_seconds, count + text),
                allowed,
            )
        if self.kind == "kv_cache_reduction":
            caching = set(decoder.attention_layers)
            limit = (1 - self.value) * len(caching) * visual_tokens
            entering = lambda layer, count: count if layer in caching else 0  # noqa: E731
            return few_layers.Prices(entering, lambda layer, count: 0, limit)
        return few_layers.Prices(lambda layer, count: count, lambda layer, count: 0, self.value * decoder.layers)

    def met_by(self, measured: float) -> bool:
        """Say whether the budget is met, to within floating-point noise."""
        if self.kind == "mean_visual_tokens":
            return measured <= self.value + 1e-9
        return measured >= self.value - 1e-12


def one_budget(*, profile: LatencyProfile | None = None, **given: float | None) -> Budget:
    """Pick the one stated budget and check its range."""
    stated = {kind: value for kind, value in given.items() if value is not None}
    if len(stated) != 1:
        raise ValueError(
            f"{len(stated)} budgets stated ({', '.join(stated) or 'none'}): state exactly one of {sorted(given)}"
        )
    kind, value = next(iter(stated.items()))
    return checked_budget(kind, value, profile)


def checked_budget(kind: str, value: float, profile: LatencyProfile | None = None) -> Budget:
    """Make a budget, its value in range.

    Raises:
        ValueError: the value is no number or outside the kind's range; a latency has no profile, or another kind one.
    """
    if (kind == "prefill_latency_reduction") != (profile is not None):
        what = (
            "needs a profile: make it with 'fitprune profile'" if profile is None else "needs no profile: leave it out"
        )
        raise ValueError(f"{kind}={reprlib.repr(value)}: {what}")
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= 1e18:
        raise ValueError(f"{kind}={reprlib.repr(value)}: must be a finite number")
    if profile is not None and not isinstance(profile, LatencyProfile):
        raise ValueError(f"profile is a {type(profile).__name__}: must be a LatencyProfile, as of LatencyProfile.load")
    if kind.endswith("_reduction") and not 0 <= value < 1:
        raise ValueError(f"{kind}={value}: must be at least 0 and below 1 (a fraction, not percent)")
    if kind == "tolerance" and not 0 <= value <= 1:
        raise ValueError(f"tolerance={value}: must be between 0 and 1")
    if kind == "mean_visual_tokens" and value <= 0:
        raise ValueError(f"mean_visual_tokens={value}: must be above 0")
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
