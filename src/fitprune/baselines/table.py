"""The table of methods, and how one becomes a recipe for a budget.

A method is two things: a schedule, which says how many tokens enter and leave each layer, and the name of a scorer,
which says which. A recipe holds both. docs/baselines.md says what was read in each authors' code and what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fitprune._support.messages import short
from fitprune._support.registry import Registry, failures_of
from fitprune.baselines import controls
from fitprune.baselines import fitprune as own
from fitprune.baselines.base import Baseline, Solution, Target, measured
from fitprune.baselines.cdpruner import cdpruner
from fitprune.baselines.dart import dart
from fitprune.baselines.divprune import divprune
from fitprune.baselines.fastv import fastv
from fitprune.baselines.pyramiddrop import pyramiddrop
from fitprune.baselines.visionzip import visionzip
from fitprune.baselines.vtw import vtw
from fitprune.costs.counts import Counts
from fitprune.fitting.budget import Budget, OutOfReach
from fitprune.fitting.fit import Fitter
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer

BASELINES: Registry[Baseline] = Registry(
    "baseline",
    "fitprune.baselines",
    Baseline,
    {
        "fitprune": own.fitprune,
        "random": own.random,
        "random-input": controls.random_input,
        "uniform": controls.uniform,
        "last-layer-first": controls.last_layer_first,
        "fastv": fastv,
        "pyramiddrop": pyramiddrop,
        "vtw": vtw,
        "divprune": divprune,
        "cdpruner": cdpruner,
        "dart": dart,
        "visionzip": visionzip,
    },
    {"all": "stands for all methods on the command line"},
)


def register_baseline(name: str, baseline: Baseline, *, replace: bool = False) -> None:
    """Add a method to this process: `make_method`, `evaluate` and lmms-eval then take its name.

    For every process, also that of the command line, a package names it at an entry point of `fitprune.baselines`.

    Args:
        name: how it is called; letters, digits, "-", "_" and ".".
        baseline: as `fitprune.baselines.base.baseline` makes it of a schedule.
        replace: take the place of one that was registered under this name.

    Raises:
        ValueError: the name is not allowed or is taken, or `baseline` is no `Baseline`.
    """
    BASELINES.add(name, baseline, replace=replace)


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
        ValueError: there is no such method or parameter, the seed is negative, the method cannot meet the budget (the
            message says why), or a registered method's schedule or scorer is not usable.
    """
    if not isinstance(target, Target):
        raise ValueError(f"target is a {type(target).__name__}: must be a Fitter or Sizes")
    if not isinstance(budget, Budget):
        raise ValueError(f"budget={short(budget)}: must be a Budget, as checked_budget('flops_reduction', 0.6) gives")
    base, parameters = parse_name(name)
    baseline = BASELINES[base]
    if baseline.needs_statistics and not isinstance(target, Fitter):
        raise ValueError(f"{name}: is fitted from statistics; measure the model, and pass a Fitter of them")
    scorer = baseline.spec
    if baseline.seeded:
        scorer["parameters"] = {**scorer.get("parameters", {}), "seed": seed}
    get_scorer(scorer)  # a wrong seed or an unknown scorer is found now
    with failures_of(f"baseline {name!r}: its schedule"):
        solution = baseline.schedule(target, budget, **parameters)
    counts, details = _solution(name, target, solution)
    model = target.model
    reached = measured(target, budget, counts)
    if budget.kind != "tolerance" and not budget.met_by(reached):
        raise ValueError(f"{name}: its schedule reaches {budget.kind}={reached:.4f}, not {budget.value}: must meet it")
    provenance = {
        "source": baseline.source,
        "method": name,
        "budget": {budget.kind: budget.value},
        "reached": reached,
        **details,
    }
    recipe = PruningRecipe.from_counts(counts, model, provenance=provenance, scorer=scorer)
    if wrong := [layer for layer in recipe.removing if layer not in model.decoder.prunable]:
        raise OutOfReach(
            f"{name} removes tokens at layers {wrong}, which they may not leave in a {model.model_type} model: of its "
            f"{model.decoder.layers} layers, {list(model.decoder.prunable)}"
        )
    return recipe


def _solution(name: str, target: Target, solution: Any) -> Solution:
    """Refuse what is no `Counts` of whole numbers, one for each layer, and dict; that they fall, the recipe checks."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    counts, details = solution if isinstance(solution, tuple) and len(solution) == 2 else (solution, None)
    if not isinstance(counts, Counts) or counts.visual_tokens != n or not isinstance(details, Mapping):
        raise ValueError(
            f"{name}: its schedule returns {short(solution)}: must be Counts of {n} visual tokens, and a dict"
        )
    for part in ("entering", "kept"):
        of_layers = list(getattr(counts, part))
        if len(of_layers) != layers or any(type(count) is not int for count in of_layers):
            raise ValueError(
                f"{name}: its schedule's {part}={of_layers}: must be {layers} integers, one for each layer"
            )
    return counts, dict(details)


def parse_name(name: str) -> tuple[str, dict[str, int]]:
    """Split "fastv:k=1" into a method of BASELINES and its parameters.

    Args:
        name: a method, and after a colon its parameters, separated by commas.

    Raises:
        ValueError: there is no such method or parameter, it is stated twice, or its value is no integer.
    """
    base, colon, rest = name.partition(":") if isinstance(name, str) else ("", "", "")
    if base not in BASELINES:
        raise ValueError(f"method {short(name)}: must be one of {sorted(BASELINES)}")
    known, values = BASELINES[base].parameters, {}
    for part in rest.split(",") if colon else []:
        key, _, value = part.partition("=")
        if key not in known:
            allowed = f"must be one of {sorted(known)}" if known else f"{base} takes none"
            raise ValueError(f"method {name!r}: no parameter {key!r}; {allowed}")
        if key in values:
            raise ValueError(f"method {name!r}: states {key} twice; must once")
        try:
            values[key] = int(value)
        except ValueError:
            raise ValueError(f"method {name!r}: {key}={value!r} must be an integer") from None
    return base, values
