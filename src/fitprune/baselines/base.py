"""What every method is made of: what it is solved for, its row, and how a schedule is solved for a budget.

Legend: n visual tokens; a layer's count "inside" is what its MLP and the layers after it see.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fitprune._support.checked import whole
from fitprune._support.messages import short
from fitprune.costs.counts import Counts
from fitprune.costs.sizes import ModelFingerprint
from fitprune.fitting.budget import Budget, OutOfReach
from fitprune.fitting.fit import Fitter
from fitprune.recipes.recipe import scorer_parts
from fitprune.scoring.scorers import parameters_of

Solution = tuple[Counts, dict[str, Any]]  # counts, and what the recipe's provenance says of them
Schedule = Callable[..., Solution]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a method is solved for where there are no statistics.

    Attributes:
        model: the model's type and sizes.
        visual_tokens: image size that the budget is met for.

    Raises:
        ValueError: `model` is something else, or there is no visual token.
    """

    model: ModelFingerprint
    visual_tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelFingerprint):
            raise ValueError(
                f"model is a {type(self.model).__name__}: must be a ModelFingerprint, as fingerprint_of gives"
            )
        whole("visual_tokens", self.visual_tokens, 1, 2**31)


Target = Fitter | Sizes


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method before its budget is known; `baseline` makes one of a schedule.

    Attributes:
        schedule: (target, budget, **parameters) -> `Solution`. A parameter is keyword-only and an integer; its default
            is an integer or None.
        scorer: what ranks the tokens: a scorer's name, or its name and parameters as a recipe holds them. A `seed` that
            it takes and that is not among these is `make_method`'s.
        source: where it was published.
        parameters: meaning of each of the schedule's parameters, which a user sets as in "fastv:k=1".
        needs_statistics: whether the schedule's target must be a `Fitter`.

    Raises:
        ValueError: a field is of another kind, or the schedule's parameters are not those of `parameters`.
    """

    schedule: Schedule
    scorer: str | Mapping[str, Any]
    source: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_statistics: bool = False

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise ValueError(
                f"baseline's schedule is a {type(self.schedule).__name__}: must be a function of target and budget, "
                "and of parameters by keyword"
            )
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(f"baseline's source={self.source!r}: must be a text that is not empty")
        if not isinstance(self.scorer, (str, Mapping)) or not scorer_parts(self.spec)[0]:
            raise ValueError(f"baseline's scorer={short(self.scorer)}: must be a text that is not empty, or an object")
        if not isinstance(self.parameters, Mapping) or not all(isinstance(v, str) for v in self.parameters.values()):
            raise ValueError(f"baseline's parameters={short(self.parameters)}: must say in text what each means")
        if not isinstance(self.needs_statistics, bool):
            raise ValueError(f"baseline's needs_statistics={short(self.needs_statistics)}: must be True or False")
        signature = _signature(self.schedule)
        defaults = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
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
    def spec(self) -> dict[str, Any]:
        """The scorer as a recipe holds it, but for a seed."""
        return {"name": self.scorer} if isinstance(self.scorer, str) else dict(self.scorer)

    @property
    def seeded(self) -> bool:
        """Whether the scorer takes a seed that is not stated; a ValueError says that there is no such scorer."""
        name, parameters = scorer_parts(self.spec)
        return "seed" not in parameters and "seed" in parameters_of(name)


def _signature(schedule: Schedule) -> inspect.Signature:
    """Read a schedule's arguments; refuse others than two by place, and parameters by keyword."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        raise ValueError("baseline's schedule has no signature to read: wrap it in a function") from None
    try:
        signature.replace(
            parameters=[each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
        ).bind(None, None)
    except TypeError:
        raise ValueError(
            f"baseline's schedule takes {signature}: must take target and budget, and parameters by keyword"
        ) from None
    return signature


def baseline(
    *, scorer: str | Mapping[str, Any], source: str, needs_statistics: bool = False, **parameters: str
) -> Callable[[Schedule], Baseline]:
    """Make a `Baseline` of the schedule below it; its arguments are the other fields, `parameters` as keywords."""
    return lambda schedule: Baseline(schedule, scorer, source, parameters, needs_statistics)


def inside(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to a layer's attention, `count` from its MLP on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    whole("layer", layer, 0, layers - 1, f", one of the {layers}")
    return Counts(n, (*[n] * layer, *[count] * (layers - layer)))


def before(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to the end of the layer before, `count` from this layer on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    whole("layer", layer, 0, layers - 1, f", one of the {layers}")
    counts = (*[n] * layer, *[count] * (layers - layer))
    return Counts(n, counts, counts)


def measured(target: Target, budget: Budget, counts: Counts) -> float:
    """Evaluate the budget's kind for counts."""
    return budget.measured(target.model.decoder, target.visual_tokens, counts.kept, counts.entering)


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
    return counts, {"kept": counts.kept[0]}


def latest(target: Target, budget: Budget, counts: Callable[[Target, int, int], Counts], first: int, last: int) -> int:
    """The largest layer up to `first`, at least `last`, at which removing everything meets the budget; else `last`."""
    for layer in range(min(first, target.model.decoder.layers - 1), last, -1):
        if fits(target, budget, counts(target, layer, 0)):
            return layer
    return last


def require_layer(name: str, k: int | None, target: Target) -> None:
    """Refuse a method's parameter k unless it is None or a layer, from 1."""
    layers = target.model.decoder.layers
    if k is not None and not 1 <= k < layers:
        raise ValueError(f"{name}:k={k}: must be from 1 to {layers - 1}, a layer of the {layers}")


FIRST_LAYER = "the first layer that sees fewer tokens, from 1; by default 2, or 1 where 2 cannot meet the budget"
