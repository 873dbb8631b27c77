"""The columns of an evaluation: methods at budgets, each a recipe with a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitprune.baselines.base import Target
from fitprune.baselines.table import BASELINES, make_method, parse_name
from fitprune.evaluation.summary import label
from fitprune.families.adapter import AdaptedModel
from fitprune.families.clip_tower import watching
from fitprune.fitting.budget import OutOfReach, checked_budget
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of an evaluation.

    Attributes:
        name: the method's name, the same for all its budgets and seeds.
        recipe: what the method is; it names its scorer.
        budget: the budget that the method was solved for; None for a recipe of no stated budget.
        seed: seed of a method that draws at random; None for others.

    Raises:
        ValueError: the recipe draws by another seed.
    """

    name: str
    recipe: PruningRecipe
    budget: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        drawn = self.recipe.scorer.get("parameters", {}).get("seed", self.seed)
        if self.seed is not None and drawn != self.seed:
            raise ValueError(f"seed={self.seed}: the recipe of {self.name!r} draws by seed {drawn}; pass that, or None")

    @property
    def label(self) -> str:
        """Name, budget and seed in one."""
        return label(self.name, self.budget) + ("" if self.seed is None else f" seed {self.seed}")


def entries_of(methods: Any) -> list[Entry]:
    """Make entries of recipes.

    Args:
        methods: name -> recipe, a recipe, or a list of recipes (named "recipe 1", ...); entries stay as they are.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    elif isinstance(methods, Sequence):
        pairs = [(f"recipe {number}", method) for number, method in enumerate(methods, 1)]
    else:
        pairs = [("recipe", methods)]
    entries = []
    for name, method in pairs:
        if not isinstance(method, (PruningRecipe, Entry)):
            raise ValueError(
                f"methods hold a {type(method).__name__}: must be a recipe, a list of recipes, name -> recipe, or the "
                "result of entries_for; PruningRecipe.named reads a file"
            )
        entries.append(method if isinstance(method, Entry) else Entry(name, method))
    return entries


def grouped(entries: Sequence[Entry]) -> Iterator[tuple[str, float | None, list[Entry]]]:
    """Gather the seeds of each method and budget."""
    groups: dict[tuple[str, float | None], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.name, entry.budget), []).append(entry)
    for (name, budget), group in groups.items():
        yield name, budget, group


def firsts(entries: Sequence[Entry]) -> list[Entry]:
    """Select the first seed of each method and budget."""
    return [group[0] for _, _, group in grouped(entries)]


def entries_for(
    names: Sequence[str], target: Target, budgets: Sequence[float], seeds: Sequence[int] = (0,)
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Solve methods for budgets.

    Args:
        names: methods, as `fitprune.baselines.table.make_method` takes them.
        target: a fitter on statistics of the model; its sizes do for methods whose counts are not fitted.
        budgets: fractions of visual-token FLOPs to remove.
        seeds: seeds of methods that draw at random.

    Returns:
        The entries, and for each method that cannot meet a budget: method, budget and reason.

    Raises:
        ValueError: there is no such method or parameter, or a budget is out of range.
    """
    entries: list[Entry] = []
    skipped: list[dict[str, Any]] = []
    for name in names:
        seeded = BASELINES[parse_name(name)[0]].seeded
        for budget in budgets:
            wanted = checked_budget("flops_reduction", budget)
            try:
                for seed in seeds if seeded else (0,):
                    recipe = make_method(name, target, wanted, seed=seed)
                    entries.append(Entry(name, recipe, budget, seed if seeded else None))
            except OutOfReach as error:
                skipped.append({"method": name, "budget": budget, "reason": str(error)})
    return entries, skipped


def readable(adapted: AdaptedModel, entries: Sequence[Entry]) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Leave out methods that read a [CLS] token of the vision tower if it has none.

    Args:
        adapted: the model.
        entries: the methods.

    Returns:
        The entries that the model can run; and for each of the others its method, budget and reason.
    """
    by_vision = [entry for entry in entries if get_scorer(entry.recipe.scorer).reads_vision]
    if not by_vision:
        return list(entries), []
    try:
        with watching(adapted):
            return list(entries), []
    except ValueError as error:
        skipped = [{"method": entry.name, "budget": entry.budget, "reason": str(error)} for entry in by_vision]
        return [entry for entry in entries if entry not in by_vision], skipped
