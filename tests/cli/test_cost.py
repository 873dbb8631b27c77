"""`fitprune cost`."""

import json

from fitprune.cli.main import main


def test_cost_of_a_file_and_of_a_published_recipe(made, capsys):
    assert main(["cost", str(made / "recipes" / "flops_reduction-0.5.json")]) == 0
    assert main(["cost", "llava-next-7b:60", "--visual-tokens", "1000", "--text-tokens", "50", "--crops", "5"]) == 0
    assert "visual FLOPs        -" in capsys.readouterr().out


def test_cost_of_a_folder_names_the_recipes_in_it(made, tmp_path, capsys):
    assert main(["cost", str(made / "recipes")]) == 1
    said = capsys.readouterr().err
    assert "has no fitprune_recipe.json; name one of its recipes: flops_reduction-0.5.json, flops_reduction" in said
    assert main(["cost", str(tmp_path)]) == 1
    assert "has no fitprune_recipe.json; name a recipe's file, which 'fitprune fit' makes" in capsys.readouterr().err


def test_cost_says_of_a_scorer_that_it_is_unknown(made, tmp_path, capsys):
    data = json.loads((made / "recipes" / "flops_reduction-0.5.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(data | {"scorer": {"name": "os.system"}}))
    assert main(["cost", str(tmp_path / "r.json")]) == 0
    assert "ranked by           os.system, which no model can be pruned by: " in capsys.readouterr().out


def test_cost_states_small_models_with_digits_and_units(made, capsys):
    assert main(["cost", str(made / "recipes" / "flops_reduction-0.5.json")]) == 0
    said = capsys.readouterr().out
    assert " GFLOPs against " in said
    assert " kB against " in said
    assert main(["cost", "llava-1.5-7b:60"]) == 0
    assert "prefill             4.37 TFLOPs against 8.91 TFLOPs dense (-51.0%)" in capsys.readouterr().out
