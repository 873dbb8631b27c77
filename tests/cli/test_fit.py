"""`fitprune fit`."""

import pytest

from fitprune import PruningRecipe
from fitprune.cli.main import main


def test_measure_and_fit_write_what_they_say(made):
    assert sorted(p.name for p in made.iterdir()) == ["recipes", "stats.safetensors"]
    names = sorted(p.name for p in (made / "recipes").iterdir())
    assert names == ["flops_reduction-0.5.json", "flops_reduction-0.8.json"]
    recipe = PruningRecipe.load(made / "recipes" / names[1])
    assert 0.8 <= recipe.cost().flops_reduction < 0.81
    assert recipe.provenance["samples"] == 12


@pytest.mark.parametrize(
    "budget",
    [
        ["--kv-cache-reduction", "0.5"],
        ["--mean-visual-tokens", "60"],
        ["--tolerance", "0.2"],
        ["--flops-reduction", "0.5", "--max-removal-layers", "2"],
    ],
)
def test_one_budget_makes_one_file(made, budget, tmp_path):
    out = tmp_path / "r.json"
    assert main(["fit", str(made / "stats.safetensors"), *budget, "-o", str(out)]) == 0
    PruningRecipe.load(out)
