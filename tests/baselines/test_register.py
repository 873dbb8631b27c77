"""A baseline from outside the package: registered in a process, or found at an entry point; and what is refused."""

import json
import os
import re
import subprocess
import sys

import pytest

from fitprune import PruningRecipe
from fitprune.baselines.base import Baseline, Sizes, baseline, before, inside, solve
from fitprune.baselines.table import BASELINES, make_method, parse_name, register_baseline
from fitprune.cli.main import main
from fitprune.costs.counts import Counts
from fitprune.evaluation.entries import entries_for
from fitprune.fitting.budget import OutOfReach, checked_budget

MODEL = PruningRecipe.published("llava-1.5-7b", 60).model
TARGET, BUDGET = Sizes(MODEL, 576), checked_budget("flops_reduction", 0.5)
SOURCE = """
from fitprune.baselines.base import baseline, before, solve


@baseline(scorer="max-min", source="a test", layer="before which tokens leave")
def one_removal(target, budget, *, layer=2):
    return solve(target, budget, lambda count: before(target, layer, count), f"at {layer}"), {"layer": layer}


def bare(target, budget):
    return None
"""


@baseline(scorer="max-min", source="a test", layer="before which tokens leave")
def one_removal(target, budget, *, layer=2):
    return solve(target, budget, lambda count: before(target, layer, count), f"at {layer}"), {"layer": layer}


def test_a_registered_baseline_makes_recipes_by_name():
    register_baseline("mine", one_removal)
    assert "mine" in BASELINES
    assert list(BASELINES)[-1] == "mine"
    assert parse_name("mine:layer=4") == ("mine", {"layer": 4})
    recipe = make_method("mine:layer=4", TARGET, BUDGET)
    assert recipe.scorer == {"name": "max-min"}
    assert recipe.provenance["source"] == "a test"
    assert recipe.provenance["method"] == "mine:layer=4"
    assert recipe.provenance["layer"] == 4
    assert [layer for layer, share in enumerate(recipe.entering) if share < 1] == list(range(4, 32))
    assert 0.5 <= recipe.cost().flops_reduction < 0.503
    assert PruningRecipe.from_json(recipe.to_json()) == recipe


def test_evaluate_takes_its_name_on_the_command_line(tmp_path, capsys):
    register_baseline("mine", one_removal)
    stats, results = str(tmp_path / "stats.safetensors"), tmp_path / "results.json"
    data = ["--samples", "2"]
    assert main(["measure", "digit-scenes", "--data", "digit-scenes/calibration", *data, "-o", stats]) == 0
    command = ["evaluate", "digit-scenes", "--data", "digit-scenes/test", *data, "--stats", stats, "--methods"]
    options = ["--flops-reduction", "0.5", "--timed-batches", "0", "--examples", "0", "-o", str(results)]
    assert main([*command, "mine:layer=3", "mine", *options]) == 0
    recipes = json.loads(results.read_text())["recipes"]
    entering = {name: recipe["enter"] for name, recipe in recipes.items()}
    assert set(entering) == {"mine:layer=3 50%", "mine 50%"}
    assert entering["mine 50%"][2] < 1 == entering["mine:layer=3 50%"][2]
    capsys.readouterr()
    assert main([*command, "mine:k=3", *options]) == 2
    assert "method 'mine:k=3': no parameter 'k'; must be one of ['layer']" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path):
    """A folder with a package that names two baselines, and one that cannot be imported, at entry points."""
    (tmp_path / "dummy.py").write_text(SOURCE)
    folder = tmp_path / "dummy-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy\nVersion: 1.0\n")
    points = ["late = dummy:one_removal", "bare = dummy:bare", "broken = dummy.missing:x"]
    (folder / "entry_points.txt").write_text("\n".join(["[fitprune.baselines]", *points, ""]))
    return tmp_path


def run(folder, code):
    """Run code in a process of its own, where the folder's package is installed."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)


def test_an_installed_package_brings_one_to_every_process(installed):
    code = """
from fitprune import PruningRecipe
from fitprune.baselines.base import Sizes
from fitprune.baselines.table import BASELINES, make_method
from fitprune.fitting.budget import checked_budget
import sys
assert "dummy" not in sys.modules, "imported before its name is asked for"
assert list(BASELINES)[-3:] == ["bare", "broken", "late"], list(BASELINES)
target = Sizes(PruningRecipe.published("llava-1.5-7b", 60).model, 576)
print(make_method("late:layer=4", target, checked_budget("flops_reduction", 0.5)).to_json())
for name in ("bare", "broken"):
    try:
        make_method(name, target, checked_budget("flops_reduction", 0.5))
    except ValueError as error:
        print(error, file=sys.stderr)
"""
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    register_baseline("late", one_removal)
    assert PruningRecipe.from_json(done.stdout.decode()) == make_method("late:layer=4", TARGET, BUDGET)
    refused = done.stderr.decode()
    assert "baseline 'bare': found at the entry point 'dummy:bare' as function, must be Baseline" in refused
    assert "baseline 'broken': its entry point 'dummy.missing:x' cannot be imported" in refused


def test_names_that_are_taken_or_not_allowed():
    register_baseline("mine", one_removal)
    for name, message in (
        ("mine", "registered already"),
        ("fastv", "one of fitprune's own"),
        ("all", "stands for all methods"),
        ("mine:k", "must be letters, digits"),
        ("", "must be letters, digits"),
    ):
        with pytest.raises(ValueError, match=message):
            register_baseline(name, one_removal)
    with pytest.raises(ValueError, match="'other': registered as function, must be Baseline"):
        register_baseline("other", one_removal.schedule)
    register_baseline("mine", BASELINES["fastv"], replace=True)
    assert make_method("mine", TARGET, BUDGET).scorer == {"name": "last"}


def undescribed(target, budget, *, k=None):
    return None


def without_default(target, budget, *, k):
    return None


def wrong_default(target, budget, *, k=0.5):
    return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (undescribed, "last", "x"),
            r"parameters are \[\], its schedule's keyword-only ones \['k'\]: must be the same",
        ),
        ((undescribed, "last", "x", {"k": "a", "r": "b"}), r"parameters are \['k', 'r'\]"),
        ((without_default, "last", "x", {"k": "a"}), "parameter 'k': its default must be an integer or None"),
        ((wrong_default, "last", "x", {"k": "a"}), "parameter 'k': its default must be an integer or None"),
        (("fastv", "last", "x"), "schedule is a str: must be a function"),
        ((undescribed, "", "x", {"k": "a"}), "scorer='': must be a text that is not empty"),
        ((undescribed, "last", None, {"k": "a"}), "source=None: must be a text that is not empty"),
    ],
)
def test_a_row_is_checked_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Baseline(*arguments)


def gives(counts):
    return Baseline(lambda target, budget: (counts, {}), "last", "a test")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (gives(Counts(576, [576] * 32)), "mine: its schedule reaches flops_reduction=0.0000, not 0.5: must meet it"),
        (gives(Counts(576, [100] * 31, [576] * 31)), "mine: its schedule's entering=[576, 576,"),
        (gives(Counts(576, [100] * 32, [576.0] * 32)), "mine: its schedule's entering=[576.0,"),
        (gives(Counts(576, [200] * 32, [100] * 32)), "must not exceed"),
        (gives(Counts(100, [50] * 32)), "must be Counts of 576 visual tokens"),
        (gives(([576] * 32, [100] * 32)), "must be Counts of 576 visual tokens"),
        (Baseline(one_removal.schedule, "no-such-scorer", "x", {"layer": "at"}), "no-such-scorer"),
    ],
)
def test_what_a_schedule_must_give(method, message):
    register_baseline("mine", method)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_method("mine", TARGET, BUDGET)


def test_a_baseline_may_name_a_registered_scorer():
    from fitprune.scoring.scorers import register_scorer

    register_scorer("of-a-test", lambda view: view.place.float(), replace=True)
    register_baseline("mine", Baseline(one_removal.schedule, "of-a-test", "a test", one_removal.parameters))
    assert make_method("mine", TARGET, BUDGET).scorer == {"name": "of-a-test"}


def seeded(*, seed):
    from fitprune.scoring.scorers import Scorer

    return Scorer(lambda view: view.place.float() + seed)


def test_a_baselines_scorer_has_parameters_and_a_seed(monkeypatch):
    from fitprune.scoring.scorers import SCORERS, register_scorer

    monkeypatch.setattr(SCORERS, "_added", {})
    register_scorer("seeded", seeded)
    for scorer, expected in (
        ("seeded", {"name": "seeded", "parameters": {"seed": 5}}),
        (
            {"name": "seeded", "parameters": {"diversity": 1.0}},
            {"name": "seeded", "parameters": {"diversity": 1.0, "seed": 5}},
        ),
        ({"name": "seeded", "parameters": {"seed": 2}}, {"name": "seeded", "parameters": {"seed": 2}}),
        ({"name": "last", "parameters": {"diversity": 0.5}}, {"name": "last", "parameters": {"diversity": 0.5}}),
    ):
        row = Baseline(one_removal.schedule, scorer, "a test", one_removal.parameters)
        register_baseline("mine", row, replace=True)
        assert make_method("mine", TARGET, BUDGET, seed=5).scorer == expected
        entries, _ = entries_for(["mine"], TARGET, [0.5], seeds=(0, 1))
        assert len(entries) == (2 if row.seeded else 1)
    assert [name for name, row in BASELINES.items() if row.seeded] == ["random", "random-input"]


def test_a_baseline_may_need_statistics(capsys):
    register_baseline("mine", baseline(scorer="last", source="a test", needs_statistics=True)(lambda target, budget: 0))
    with pytest.raises(ValueError, match="mine: is fitted from statistics; measure the model, and pass a Fitter"):
        make_method("mine", TARGET, BUDGET)
    command = ["evaluate", "digit-scenes", "--data", "digit-scenes/test", "--methods", "vtw", "mine"]
    assert main([*command, "--flops-reduction", "0.5", "-o", "results.json"]) == 2
    assert "method mine is fitted from statistics: --stats is missing" in capsys.readouterr().err


def schedule_of(give):
    return Baseline(lambda target, budget: give(target), "last", "a test")


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda target: None, "mine: its schedule returns None: must be Counts of 576 visual tokens, and a dict"),
        (lambda target: (Counts(576, [0] * 32), None), "must be Counts of 576 visual tokens, and a dict"),
        (lambda target: {}["x"], "baseline 'mine': its schedule failed: KeyError: 'x'"),
        (lambda target: sys.exit(0), "baseline 'mine': its schedule failed: SystemExit: 0"),
        (lambda target: (before(target, 99, 0), {}), "layer=99: must be an integer from 0 to 31, one of the 32"),
        (lambda target: (inside(target, -1, 0), {}), "layer=-1: must be an integer from 0 to 31, one of the 32"),
    ],
)
def test_what_a_schedule_does_wrong_is_one_line(give, message):
    register_baseline("mine", schedule_of(give))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}" if "mine" in message else re.escape(message)):
        make_method("mine", TARGET, BUDGET)


def test_a_schedule_may_say_that_a_budget_is_out_of_reach():
    def refuse(target):
        raise OutOfReach("too much")

    register_baseline("mine", schedule_of(refuse))
    with pytest.raises(OutOfReach, match=r"^too much$"):
        make_method("mine", TARGET, BUDGET)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_method("fastv:k=1,k=2", TARGET, BUDGET), "method 'fastv:k=1,k=2': states k twice"),
        (lambda: make_method("fastv:", TARGET, BUDGET), "method 'fastv:': no parameter ''; must be one of ['k']"),
        (lambda: make_method(5, TARGET, BUDGET), "method 5: must be one of"),
        (lambda: make_method("fastv", None, BUDGET), "target is a NoneType: must be a Fitter or Sizes"),
        (lambda: make_method("fastv", TARGET, 0.5), "budget=0.5: must be a Budget, as checked_budget"),
        (lambda: Sizes(MODEL, 0), "visual_tokens=0: must be an integer from 1"),
        (lambda: Sizes(None, 5), "model is a NoneType: must be a ModelFingerprint"),
        (lambda: Baseline(lambda: 1, "last", "x"), "schedule takes (): must take target and budget"),
        (lambda: Baseline(lambda a, b, c: 1, "last", "x"), "schedule takes (a, b, c): must take target and budget"),
        (lambda: Baseline(one_removal.schedule, "last", "x", {"layer": 5}), "must say in text what each means"),
        (lambda: Baseline(one_removal.schedule, "last", "x", None), "parameters=None: must say in text"),
        (lambda: Baseline(one_removal.schedule, 5, "x"), "scorer=5: must be a text that is not empty, or an object"),
        (lambda: Baseline(one_removal.schedule, {"nme": 1}, "x"), "must be an object with a 'name'"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
