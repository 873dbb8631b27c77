"""The published recipes, to the digit."""

import importlib.resources
import json

import pytest

from fitprune import PruningRecipe
from fitprune.recipes.rounding import rounded_counts

PUBLISHED = json.loads(importlib.resources.files("fitprune").joinpath("data/published_recipes.json").read_text())[
    "models"
]
CASES = [(name, int(p)) for name, entry in PUBLISHED.items() for p in entry["removals"]]


@pytest.mark.parametrize(("name", "percent"), CASES)
def test_published_counts_and_reductions_come_back(name, percent):
    entry = PUBLISHED[name]
    published = PruningRecipe.published(name.split(" (")[0], percent)
    counts = published.counts(entry["visual_tokens"])
    assert counts == entry["removals"][str(percent)]
    reduction = published.cost().flops_reduction
    assert reduction == pytest.approx(entry["visual_flops_reduction"][str(percent)], abs=1e-4)


@pytest.mark.parametrize(("name", "percent"), [("llava-1.5-7b", 61), ("qwen", 60), ("llava-1.5-7b", "60%")])
def test_an_unpublished_recipe_names_those_there_are(name, percent):
    with pytest.raises(ValueError, match="must be one of"):
        PruningRecipe.published(name, percent)


@pytest.mark.parametrize(("name", "percent"), CASES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
def test_a_recipe_that_keeps_anything_keeps_a_token_of_every_image(name, percent, n):
    published = PruningRecipe.published(name.split(" (")[0], percent)
    kept, removed = published.kept(n), published.counts(n)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == max(1, rounded_counts(published.keep, n)[-1])
    assert min(removed) >= 0
    assert n - sum(removed) == kept[-1]
    assert published.cost(visual_tokens=n).kept == tuple(kept)
