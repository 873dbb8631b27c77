"""`fitprune search`."""

import json

import pytest

from fitprune import PruningRecipe
from fitprune.cli.main import main

DATA = ["--data", "digit-scenes/calibration"]
BUDGET = ["--flops-reduction", "0.6"]


def test_on_the_command_line(tmp_path, capsys):
    stats, out = str(tmp_path / "stats.safetensors"), tmp_path / "recipe.json"
    data = [*DATA, "--samples", "4"]
    assert main(["measure", "digit-scenes", *data, "-o", stats]) == 0
    command = ["search", "digit-scenes", "--stats", stats, *data, *BUDGET,
               "--passes", "9", "--recombine", "2", "--batch-size", "4", "-o", str(out)]  # fmt: skip
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "validation" in said
    assert "dense passes over 4 samples" in said
    recipe = PruningRecipe.load(out)
    assert recipe.provenance["source"] == "fitprune.fit_output"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json", "stats.safetensors"]  # no journal left
    first = json.loads(out.read_text())
    assert main(command) == 0
    assert json.loads(out.read_text()) == first
    results = ["evaluate", "digit-scenes", "--data", "digit-scenes/test", "--samples", "2", "--recipe", str(out)]
    assert main([*results, "--timed-batches", "0", "--examples", "0", "-o", str(tmp_path / "results.json")]) == 0
    assert "output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*DATA, "--samples", "1"], "at least 2 are needed"),
        ([*DATA, "--samples", "4", "--minutes", "0"], "--minutes 0.0: must be above 0, and finite"),
        ([*DATA, "--samples", "4", "--passes", "inf"], "--passes inf: must be above 0, and finite"),
        ([*DATA, "--flops-reduction", "0.5", "0.5"], "0.5 is passed twice"),
    ],
)
def test_bad_use_on_the_command_line(made, tmp_path, capsys, options, message):
    command = ["search", "digit-scenes", "--stats", str(made / "stats.safetensors"), *BUDGET]
    assert main([*command, "-o", str(tmp_path / "r.json"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", "--stats", "s", *DATA, *BUDGET, "-o", "r"], "required: MODEL"),
        (["search", "m", "--stats", "s", *BUDGET, "-o", "r"], "required: --data"),
        (["search", "m", *DATA, *BUDGET, "-o", "r"], "required: --stats"),
        (["search", "m", "--stats", "s", *DATA, *BUDGET, "-o", "r", "--max-removal-layers", "2"], "unknown: --max-rem"),
        (
            ["search", "m", "--stats", "s", *DATA, *BUDGET, "-o", "r", "--prefill-latency-reduction", "1"],
            "unknown: --pref",
        ),
        (["fit", "s", *BUDGET, "-o", "r", "--minutes", "3"], "unknown: --minutes 3"),
    ],
)
def test_options_that_are_missing_or_of_another_command(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
