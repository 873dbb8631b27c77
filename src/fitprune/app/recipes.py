"""The recipes that the app offers: of any method for a budget, or by name. No file is read by a path of a visitor's."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from fitprune._support import files
from fitprune._support.checked import number
from fitprune._support.messages import line, short
from fitprune.baselines.base import Sizes
from fitprune.baselines.table import BASELINES, make_method
from fitprune.costs.sizes import ModelFingerprint
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.recipes import published
from fitprune.recipes.find import fitted_to
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import SCORERS, get_scorer

MOST_PERCENT = 95  # of the visual FLOPs that can be asked for
RECIPE = "recipe: "  # begins the choice of a recipe by its name
FITTED = "fitprune"  # the method that is fitted from statistics


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a person chooses: how much is to be saved, and how tokens leave.

    Attributes:
        percent: of the visual FLOPs to save; always the same of a recipe, which has its own.
        method: one of the methods, or "recipe: " and the name of a recipe.
        scorer: what ranks the tokens instead of the method's own scorer; "" for that.
    """

    percent: float = 60
    method: str = FITTED
    scorer: str = ""

    @property
    def recipe(self) -> str | None:
        """The name of the recipe that is chosen; None for a method."""
        return self.method.removeprefix(RECIPE) if self.method.startswith(RECIPE) else None


class Recipes:
    """Makes recipes for one model.

    Args:
        model: the model's type and sizes.
        folder: of the operator's recipe files; None for none. Files of other models are left out.

    Attributes:
        named: name -> recipe of the folder, and those that were published for this model.
        fitter: of the model's statistics; None before they are there.
        statistics: Python lines that make the statistics as `stats`; "" before they are there.
    """

    def __init__(self, model: ModelFingerprint, folder: str | os.PathLike[str] | None = None) -> None:
        self.model = model
        self.named: Mapping[str, PruningRecipe] = {**_published(model), **_of_folder(model, folder)}
        self.fitter: Fitter | None = None
        self.statistics = ""
        self._lock = threading.Lock()  # a fitter notes what it has tried
        self._solved = functools.lru_cache(maxsize=1000)(self._solve)

    @functools.cached_property  # a look at all installed packages takes 20 ms
    def methods(self) -> list[str]:
        """All that may be chosen as a method."""
        return [*BASELINES, *(RECIPE + name for name in self.named)]

    def choice(self, percent: object, method: object, scorer: object = "") -> Choice:
        """Check what a person chooses; a ValueError says what is wrong with it."""
        number("budget", percent)
        if not 0 <= percent <= MOST_PERCENT:  # type: ignore[operator]  # a number
            raise ValueError(f"budget={short(percent)}: must be from 0 to {MOST_PERCENT}, percent of the visual FLOPs")
        if method not in self.methods:
            if isinstance(method, str) and method.startswith(RECIPE):
                known = ", ".join(self.named) or "none; 'fitprune app --recipes FOLDER' offers those of a folder"
                raise ValueError(
                    f"recipe {short(method.removeprefix(RECIPE))}: unknown; a recipe is chosen by its name, no file is "
                    f"read. Names: {known}"
                )
            raise ValueError(f"method {short(method)}: must be one of {', '.join(self.methods)}")
        if not isinstance(scorer, str) or (scorer and scorer not in SCORERS):
            raise ValueError(f"scorer {short(scorer)}: must be one of {', '.join(sorted(SCORERS))}, or empty")
        if scorer:
            get_scorer(scorer)  # some need parameters
        choice = Choice(method=str(method), scorer=scorer)
        if choice.recipe is not None:
            return choice
        return dataclasses.replace(choice, percent=float(percent))  # type: ignore[arg-type]  # `number` has checked it

    def make(self, choice: Choice, visual_tokens: int) -> PruningRecipe:
        """Make the recipe of a choice.

        Args:
            choice: as `choice` returns it.
            visual_tokens: of the picture; statistics are fitted for their own most common number.

        Raises:
            ValueError: the method cannot meet the budget, or needs statistics that are not there.
        """
        if choice.recipe is not None:
            return self.named[choice.recipe]
        if not choice.percent:
            return PruningRecipe.dense(self.model, visual_tokens)
        if self.fitter is None and BASELINES[choice.method].needs_statistics:
            raise ValueError(
                f"method {choice.method}: is fitted from statistics, and this model has none yet; measure them first"
            )
        with self._lock:
            return self._solved(choice.percent, choice.method, 0 if self.fitter else visual_tokens)

    def _solve(self, percent: float, method: str, visual_tokens: int) -> PruningRecipe:
        target = self.fitter or Sizes(self.model, visual_tokens)
        return make_method(method, target, checked_budget("flops_reduction", percent / 100))

    def use(self, fitter: Fitter, statistics: str) -> None:
        """Take new statistics, and the Python lines that make them."""
        with self._lock:
            self.fitter, self.statistics = fitter, statistics
            self._solved.cache_clear()


def _published(model: ModelFingerprint) -> dict[str, PruningRecipe]:
    recipes = {
        f"{name}:{percent}": PruningRecipe.published(name, percent)
        for name, percents in published.names().items()
        for percent in percents
    }
    return {name: recipe for name, recipe in recipes.items() if _fits(recipe, model)}


def _of_folder(model: ModelFingerprint, folder: str | os.PathLike[str] | None) -> dict[str, PruningRecipe]:
    """Read the recipes of a folder that are for the model; a ValueError says that there are none, or a broken file."""
    if folder is None:
        return {}
    if not os.path.isdir(folder):
        raise FileNotFoundError(2, f"{folder}: no such folder; name the one that holds your recipes")
    recipes = {}
    for path in sorted(Path(folder).glob("*.json")):
        if (kind := files.kind_of(path)) == files.RECIPE:
            recipes[path.stem] = PruningRecipe.load(path)
        elif kind is None:  # other data in JSON may lie here, but nothing that is broken
            try:
                files.parse_json(files.read_text(path))
            except ValueError as error:
                raise ValueError(f"{path}: {error}; mend it, or take it out of the folder") from None
    fitting = {name: recipe for name, recipe in recipes.items() if _fits(recipe, model)}
    if not fitting:
        other = f"; its {len(recipes)} recipes are for other models" if recipes else ""
        raise ValueError(f"{line(str(folder))} holds no recipe for this model{other}: fit one with 'fitprune recipe'")
    return fitting


def _fits(recipe: PruningRecipe, model: ModelFingerprint) -> bool:
    try:
        fitted_to(recipe, model, force=False)
    except ValueError:
        return False
    return True
