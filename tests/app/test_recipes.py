import pytest

import fitprune
from fitprune.app.recipes import Choice, Recipes
from fitprune.costs.sizes import ModelFingerprint
from fitprune.recipes.recipe import PruningRecipe


def test_every_budget_has_its_recipe_at_once(served):
    for percent in range(0, 96, 5):
        recipe = served.recipes.make(served.recipes.choice(percent, "fitprune"), 144)
        assert recipe.cost().flops_reduction >= percent / 100 - 1e-9
    assert served.recipes.make(Choice(60), 144) is served.recipes.make(Choice(60), 7)  # made once


def test_a_fitted_recipe_is_that_of_fit(served, stats):
    assert served.recipes.make(Choice(60), 144) == fitprune.fit(stats, flops_reduction=0.6)


def test_without_statistics_methods_that_need_none_are_made_for_the_picture(served):
    recipes = Recipes(served.adapted.fingerprint)
    assert recipes.make(Choice(60, "fastv"), 100).visual_tokens == 100
    with pytest.raises(ValueError, match="method fitprune: is fitted from statistics, and this model has none yet"):
        recipes.make(Choice(60), 100)


@pytest.mark.parametrize("percent", [-1, 95.5, float("nan"), "60", None, True])
def test_a_budget_out_of_range_is_refused(served, percent):
    with pytest.raises(ValueError, match=r"budget=.*: must be (from 0 to 95, percent|a finite number)"):
        served.recipes.choice(percent, "fitprune")


@pytest.mark.parametrize(
    "method", ["magic", "recipe: llava-1.5-7b:60", "recipe: ../x", "recipe: /x.json", ["fastv"], None]
)
def test_an_unknown_method_or_recipe_is_refused(served, method):
    with pytest.raises(
        ValueError, match=r"(method .*: must be one of fitprune|recipe .*: unknown; a recipe is chosen)"
    ):
        served.recipes.choice(60, method)


@pytest.mark.parametrize("scorer", ["magic", "random", ["self"]])
def test_an_unknown_scorer_or_one_that_needs_parameters_is_refused(served, scorer):
    with pytest.raises(ValueError, match="scorer"):
        served.recipes.choice(60, "fitprune", scorer)


def test_recipes_of_a_folder_are_offered_by_name_and_those_of_other_models_are_not(served, stats, tmp_path):
    fitprune.fit(stats, flops_reduction=0.5).save(tmp_path / "half.json")
    PruningRecipe.published("llava-1.5-7b", 60).save(tmp_path / "other.json")
    (tmp_path / "notes.json").write_text("{}")
    recipes = Recipes(served.adapted.fingerprint, tmp_path)
    assert list(recipes.named) == ["half"]
    made = recipes.make(recipes.choice(60, "recipe: half"), 144)
    assert made.cost().flops_reduction >= 0.5
    (tmp_path / "half.json").unlink()
    with pytest.raises(ValueError, match="holds no recipe for this model; its 1 recipes are for other models"):
        Recipes(served.adapted.fingerprint, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Recipes(served.adapted.fingerprint, tmp_path / "missing")


def test_a_broken_recipe_file_is_named(served, tmp_path):
    (tmp_path / "broken.json").write_text('{"schema": 1, "keep": [')
    with pytest.raises(ValueError, match=r"broken.json: .*; mend it, or take it out of the folder"):
        Recipes(served.adapted.fingerprint, tmp_path)


def test_a_recipe_is_the_same_choice_at_every_budget(served, stats, tmp_path):
    fitprune.fit(stats, flops_reduction=0.5).save(tmp_path / "half.json")
    recipes = Recipes(served.adapted.fingerprint, tmp_path)
    assert recipes.choice(20, "recipe: half") == recipes.choice(80, "recipe: half")


def test_published_recipes_of_the_model_are_offered():
    model: ModelFingerprint = PruningRecipe.published("llava-1.5-7b", 60).model
    recipes = Recipes(model)
    assert "recipe: llava-1.5-7b:60" in recipes.methods
    assert not any("hr" in name for name in recipes.named)
