"""Published ways to prune visual tokens, and controls, all as recipes of one engine and solved to one budget.

Each method here is two things: a schedule, which says how many tokens enter and leave each layer for a budget, and the
name of a scorer (`fitprune.scoring.scorers.SCORERS`), which says which. A recipe holds both. docs/baselines.md tells
for each what was read in its authors' code and what differs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fitprune.costs.sizes import ModelFingerprint
from fitprune.fitting.budget import Budget, OutOfReach
from fitprune.fitting.fit import Fitter
from fitprune.fitting.leftover import give_back
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer

Counts = tuple[list[int], list[int]]  # tokens that enter each layer, tokens that it keeps


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a method is solved for, where no statistics are at hand.

    Attributes:
        model: the model's type and sizes.
        visual_tokens: image size that the budget is met for.
    """

    model: ModelFingerprint
    visual_tokens: int


Target = Fitter | Sizes


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method before its budget is known.

    Attributes:
        schedule: (target, budget, **parameters) -> counts, and the parameters that were used.
        scorer: name of what ranks the tokens, in `fitprune.scoring.scorers.SCORERS`.
        source: where it was published.
        parameters: those that a user may set, with their meaning.
    """

    schedule: Callable[..., tuple[Counts, dict[str, Any]]]
    scorer: str
    source: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def seeded(self) -> bool:
        """Whether the scorer draws at random."""
        return self.scorer == "random"


def make_method(name: str, target: Target, budget: Budget, *, seed: int = 0) -> PruningRecipe:
    """Solve a method for a budget.

    Args:
        name: one of `BASELINES`, with parameters as in "fastv:k=1" or "pyramiddrop:shift=-1".
        target: sizes of the model and its images; FitPrune's own counts need a Fitter, which has statistics too.
        budget: met to within one token, for images of `target.visual_tokens`.
        seed: of methods that draw at random, 0 or more; others ignore it.

    Returns:
        A recipe that names its scorer with its parameters, the seed too: `prune` needs nothing else.

    Raises:
        ValueError: there is no such method or parameter, the seed is negative, or the method cannot meet the budget
            (the message says why).
    """
    base, given = parse_name(name)
    baseline = BASELINES[base]
    scorer = {"name": baseline.scorer, **({"parameters": {"seed": seed}} if baseline.seeded else {})}
    get_scorer(scorer)  # a wrong seed is found now
    (entering, kept), used = baseline.schedule(target, budget, **given)
    n, model = target.visual_tokens, target.model
    provenance = {
        "source": baseline.source,
        "method": name,
        "budget": {budget.kind: budget.value},
        "reached": budget.measured(model.decoder, n, kept, entering),
        **used,
    }
    between = entering != [n, *kept[:-1]]
    recipe = PruningRecipe(
        tuple(count / n for count in kept),
        model,
        n,
        provenance,
        tuple(count / n for count in entering) if between else (),
        scorer,
    )
    if wrong := [layer for layer in recipe.removing if layer not in model.decoder.prunable]:
        raise OutOfReach(
            f"{name} removes tokens at layers {wrong}, which they may not leave in a {model.model_type} model: of its "
            f"{model.decoder.layers} layers, {list(model.decoder.prunable)}"
        )
    return recipe


def parse_name(name: str) -> tuple[str, dict[str, int]]:
    """Split "fastv:k=1" into a method of BASELINES and its parameters.

    Raises:
        ValueError: there is no such method or parameter, or its value is no integer.
    """
    base, _, rest = name.partition(":")
    if base not in BASELINES:
        raise ValueError(f"method {name!r}: must be one of {sorted(BASELINES)}")
    known, given = BASELINES[base].parameters, {}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key not in known:
            allowed = f"must be one of {sorted(known)}" if known else f"{base} takes none"
            raise ValueError(f"method {name!r}: no parameter {key!r}; {allowed}")
        try:
            given[key] = int(value)
        except ValueError:
            raise ValueError(f"method {name!r}: {key}={value!r} must be an integer") from None
    return base, given


def _without_from(k: int, model: ModelFingerprint) -> PruningRecipe:
    """No visual token from layer k on: they leave inside the layer before, after its attention."""
    keep = (1.0,) * (k - 1) + (0.0,) * (model.decoder.layers - k + 1)
    provenance = {"source": BASELINES["vtw"].source, "method": "vtw", "k": k}
    return PruningRecipe(keep, model, 1, provenance, scorer={"name": BASELINES["vtw"].scorer})


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """Find the largest count up to `most` that fits; None if not even 0 does. Fewer always fit too."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _solve(target: Target, budget: Budget, counts: Callable[[int], Counts], what: str) -> Counts:
    """Keep as many tokens as the budget lets, in a schedule that has one count to choose."""
    decoder, n = target.model.decoder, target.visual_tokens

    def fits(kept: int) -> bool:
        entering, after = counts(kept)
        return budget.met_by(budget.measured(decoder, n, after, entering))

    best = _largest(fits, n)
    if best is None:
        entering, after = counts(0)
        reached = budget.measured(decoder, n, after, entering)
        raise OutOfReach(f"{what} reaches {budget.kind}={reached:.4f} at most, not {budget.value}: ask for less")
    return counts(best)


def _inside(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to a layer's attention, `count` from its MLP on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    kept = [n] * layer + [count] * (layers - layer)
    return [n, *kept[:-1]], kept


def _possible(target: Target, budget: Budget, counts: Callable[[int, int], Counts], first: int, last: int) -> int:
    """The largest layer up to `first`, at least `last`, at which removing everything meets the budget; else `last`."""
    decoder, n = target.model.decoder, target.visual_tokens
    for layer in range(first, last, -1):
        entering, kept = counts(layer, 0)
        if budget.met_by(budget.measured(decoder, n, kept, entering)):
            return layer
    return last


def _fitted(target: Target, budget: Budget) -> tuple[Counts, dict[str, Any]]:
    """FitPrune's own counts."""
    if not isinstance(target, Fitter):
        raise ValueError("FitPrune's counts are fitted from statistics: measure the model, and pass a Fitter of them")
    n = target.visual_tokens
    recipe = target.fit(budget)
    kept = recipe.kept(n)
    return ([n, *kept[:-1]], kept), {"tolerance": recipe.provenance["tolerance"]}


def _uniform(target: Target, budget: Budget) -> tuple[Counts, dict[str, Any]]:
    """The same number leaves at every layer that tokens may leave, as long as there are any."""
    decoder, n = target.model.decoder, target.visual_tokens
    passed = [sum(layer <= last for layer in decoder.prunable) for last in range(decoder.layers)]

    def kept(rate: float) -> list[int]:
        return [max(0, round(n - removals * rate)) for removals in passed]

    def fits(rate: float) -> bool:
        return budget.met_by(budget.measured(decoder, n, kept(rate)))

    low, high = 0.0, float(n)
    if not fits(high):
        raise OutOfReach(f"uniform cannot meet {budget.kind}={budget.value}: ask for less")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    counts = give_back(budget, decoder, n, kept(high))
    return ([n, *counts[:-1]], counts), {"removed_per_layer": round(high, 2)}


def _last_layers(target: Target, budget: Budget) -> tuple[Counts, dict[str, Any]]:
    """Everything leaves, as late as the budget lets: in layer k, but for what still fits in one layer more."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    k = _possible(target, budget, functools.partial(_inside, target), layers - 1, 0)

    def counts(count: int) -> Counts:
        kept = [n] * k + [count] + [0] * (layers - k - 1)
        return [n, *kept[:-1]], kept

    return _solve(target, budget, counts, "removing everything inside layer 0"), {"k": k + 1}


def _fastv(target: Target, budget: Budget, *, k: int | None = None) -> tuple[Counts, dict[str, Any]]:
    """One removal, by layer k - 1's attention and inside it: kept tokens have the values of the authors' code."""
    _require_layer("fastv", k, 1, target)
    at = _possible(target, budget, functools.partial(_inside, target), 1, 0) if k is None else k - 1
    counts = _solve(target, budget, functools.partial(_inside, target, at), f"fastv with k={at + 1}")
    return counts, {"k": at + 1, "r": round(1 - counts[1][-1] / target.visual_tokens, 4)}


def _before(target: Target, layer: int, count: int) -> Counts:
    """All tokens up to the end of the layer before, `count` from this layer on."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    counts = [n] * layer + [count] * (layers - layer)
    return counts, counts


def _embeddings(name: str, target: Target, budget: Budget) -> tuple[Counts, dict[str, Any]]:
    """One removal, before the first layer."""
    counts = _solve(target, budget, functools.partial(_before, target, 0), name)
    return counts, {"kept": counts[0][0]}


def _dart(target: Target, budget: Budget, *, k: int | None = None) -> tuple[Counts, dict[str, Any]]:
    """One removal before layer k, which needs the keys of the layer before it."""
    _require_layer("dart", k, 1, target)
    at = _possible(target, budget, functools.partial(_before, target), 2, 1) if k is None else k
    if at - 1 in target.model.decoder.linear_layers:
        raise OutOfReach(
            f"dart reads the keys of layer {at - 1}, which has no attention in a {target.model.model_type} model"
        )
    return _solve(target, budget, functools.partial(_before, target, at), f"dart with k={at}"), {"k": at}


def _pyramid(target: Target, budget: Budget, *, shift: int | None = None) -> tuple[Counts, dict[str, Any]]:
    """Three removals, before the layers at 1/4, 2/4 and 3/4 of the depth, each to the same share of what is there.

    The share meets the budget; the stages move together, earlier or later, to where it is nearest to the authors' 0.5.
    """
    decoder, n = target.model.decoder, target.visual_tokens
    authors = [round(decoder.layers * part / 4) for part in (1, 2, 3)]
    possible = range(-authors[0], decoder.layers - authors[-1])
    if shift is not None and shift not in possible:
        raise ValueError(f"pyramiddrop:shift={shift}: must be from {possible[0]} to {possible[-1]}")
    shifts = possible if shift is None else [shift]

    def counts(stages: Sequence[int], share: float, last: int = 0) -> Counts:
        left = [int(n * share ** sum(layer >= stage for stage in stages)) for layer in range(decoder.layers)]
        left = [count + (last if layer >= stages[-1] else 0) for layer, count in enumerate(left)]
        return left, left

    def fits(made: Counts) -> bool:
        return budget.met_by(budget.measured(decoder, n, made[1], made[0]))

    found = []
    for moved in shifts:
        stages = [stage + moved for stage in authors]
        if not fits(counts(stages, 0.0)):
            continue
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(counts(stages, middle)) else (low, middle)
        found.append((abs(low - 0.5), moved, stages, low))
    if not found:
        raise OutOfReach(
            f"pyramiddrop cannot meet {budget.kind}={budget.value} with stages before layers "
            f"{[s + (shift or 0) for s in authors]} of {decoder.layers}: ask for less, or for an earlier shift"
        )
    _, moved, stages, share = min(found)
    room = counts(stages, share)[0][stages[-1] - 1] - counts(stages, share)[0][-1]
    last = _largest(lambda more: fits(counts(stages, share, more)), room) or 0
    return counts(stages, share, last), {"stages": stages, "share": round(share, 4), "shift": moved}


def _require_layer(name: str, k: int | None, least: int, target: Target) -> None:
    layers = target.model.decoder.layers
    if k is not None and not least <= k < layers:
        raise ValueError(f"{name}:k={k}: must be from {least} to {layers - 1}, a layer of the {layers}")


_K = {"k": "the first layer that sees fewer tokens, from 1; by default 2, or 1 where 2 cannot meet the budget"}

BASELINES: dict[str, Baseline] = {
    "fitprune": Baseline(_fitted, "fitprune", "FitPrune, arXiv:2409.10197"),
    "random": Baseline(_fitted, "random", "control: FitPrune's counts, tokens by chance"),
    "random-input": Baseline(
        functools.partial(_embeddings, "random-input"), "random", "control: tokens by chance before the decoder"
    ),
    "uniform": Baseline(_uniform, "fitprune", "control: as many at each layer, FitPrune's scores"),
    "last-layer-first": Baseline(_last_layers, "fitprune", "control: as late as possible, FitPrune's scores"),
    "fastv": Baseline(_fastv, "last", "FastV, arXiv:2403.06764", _K),
    "pyramiddrop": Baseline(
        _pyramid,
        "last",
        "PyramidDrop, arXiv:2410.17247",
        {"shift": "layers by which the stages move from 1/4, 2/4 and 3/4 of the depth"},
    ),
    "vtw": Baseline(_last_layers, "place", "VTW, arXiv:2405.05803"),
    "divprune": Baseline(functools.partial(_embeddings, "divprune"), "max-min", "DivPrune, arXiv:2503.02175"),
    "cdpruner": Baseline(functools.partial(_embeddings, "cdpruner"), "dpp", "CDPruner, arXiv:2506.10967"),
    "dart": Baseline(_dart, "duplication", "DART, arXiv:2502.11494", _K),
    "visionzip": Baseline(
        functools.partial(_embeddings, "visionzip"), "cls", "VisionZip (dominant tokens), arXiv:2412.04467"
    ),
}
