"""What every method is made of: what it is solved for, its row, and how a schedule is solved for a budget.

Legend: n visual tokens; a layer's count "inside" is what its MLP and the layers after it see.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fitprune.costs.sizes import ModelFingerprint
from fitprune.fitting.budget import Budget, OutOfReach
from fitprune.fitting.fit import Fitter

Counts = tuple[list[int], list[int]]  # tokens that enter each layer, tokens that it keeps
Solution = tuple[Counts, dict[str, Any]]  # counts, and what the recipe's provenance says of them
Schedule = Callable[..., Solution]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a method is solved for where there are no statistics.

    Attributes:
        model: the model's type and sizes.
        visual_tokens: image size that the budget is met for.
    """

    model: ModelFingerprint
    visual_tokens: int


Target = Fitter | Sizes


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method before its budget is known; `baseline` makes one of a schedule.

    Attributes:
        schedule: (target, budget, **parameters) -> `Solution`. A parameter is keyword-only and an integer; its default
            is an integer or None.
        scorer: name of the scorer that ranks the tokens, as `fitprune.scoring.scorers.get_scorer` finds it.
        source: where it was published.
        parameters: meaning of each of the schedule's parameters, which a user sets as in "fastv:k=1".

    Raises:
        ValueError: a field is of another kind, or the schedule's parameters are not those of `parameters`.
    """

    schedule: Schedule
    scorer: str
    source: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise ValueError(
                f"baseline's schedule is a {type(self.schedule).__name__}: must be a function of target and budget, "
                "and of parameters by keyword"
            )
        for field in ("scorer", "source"):
            if not isinstance(value := getattr(self, field), str) or not value:
                raise ValueError(f"baseline's {field}={value!r}: must be a text that is not empty")
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(self.schedule).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        if set(defaults) != set(self.parameters):
            raise ValueError(
                f"baseline's parameters are {sorted(self.parameters)}, its schedule's keyword-only ones "
                f"{sorted(defaults)}: must be the same; write down the meaning of each"
            )
        for name, default in defaults.items():
            if default is not None and type(default) is not int:
                raise ValueError(f"baseline's parameter {name!r}: its default must be an integer or None")

    @property
    def seeded(self) -> bool:
        """Whether the scorer draws at random."""
        return self.scorer == "random"


def baseline(*, scorer: str, source: str, **parameters: str) -> Callable[[Schedule], Baseline]:
    """Make a `Baseline` of the schedule below it; its arguments are the other fields, `parameters` as keywords."""
    return lambda schedule: Baseline(schedule, scorer, source, parameters)


def inside(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to a layer's attention, `count` from its MLP on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    kept = [n] * layer + [count] * (layers - layer)
    return [n, *kept[:-1]], kept


def before(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to the end of the layer before, `count` from this layer on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    counts = [n] * layer + [count] * (layers - layer)
    return counts, counts


def measured(target: Target, budget: Budget, counts: Counts) -> float:
    """Evaluate the budget's kind for counts."""
    entering, kept = counts
    return budget.measured(target.model.decoder, target.visual_tokens, kept, entering)


def fits(target: Target, budget: Budget, counts: Counts) -> bool:
    """Whether counts meet the budget."""
    return budget.met_by(measured(target, budget, counts))


def largest(fitting: Callable[[int], bool], most: int) -> int | None:
    """Find the largest count up to `most` that fits; None if not even 0 does. Fewer always fit too."""
    if not fitting(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle - 1)
    return low


def solve(target: Target, budget: Budget, counts: Callable[[int], Counts], what: str) -> Counts:
    """Keep as many tokens as the budget allows, in a schedule that has one count to choose.

    Args:
        target: sizes of the model and its images.
        budget: to meet.
        counts: the schedule that keeps this many tokens.
        what: names the schedule in the message.

    Raises:
        OutOfReach: not even keeping 0 tokens meets the budget.
    """
    best = largest(lambda kept: fits(target, budget, counts(kept)), target.visual_tokens)
    if best is None:
        reached = measured(target, budget, counts(0))
        raise OutOfReach(f"{what} reaches {budget.kind}={reached:.4f} at most, not {budget.value}: ask for less")
    return counts(best)


def before_decoder(name: str, target: Target, budget: Budget) -> Solution:
    """One removal, before the first layer."""
    counts = solve(target, budget, lambda count: before(target, 0, count), name)
    return counts, {"kept": counts[0][0]}


def latest(target: Target, budget: Budget, counts: Callable[[Target, int, int], Counts], first: int, last: int) -> int:
    """The largest layer up to `first`, at least `last`, at which removing everything meets the budget; else `last`."""
    for layer in range(first, last, -1):
        if fits(target, budget, counts(target, layer, 0)):
            return layer
    return last


def require_layer(name: str, k: int | None, target: Target) -> None:
    """Refuse a method's parameter k unless it is None or a layer, from 1."""
    layers = target.model.decoder.layers
    if k is not None and not 1 <= k < layers:
        raise ValueError(f"{name}:k={k}: must be from 1 to {layers - 1}, a layer of the {layers}")


FIRST_LAYER = "the first layer that sees fewer tokens, from 1; by default 2, or 1 where 2 cannot meet the budget"
