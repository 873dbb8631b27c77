"""The tolerance search: budgets met to within a token, monotone, and the rule of the paper."""

import time

import pytest
import torch

from fitprune import AttentionStats, fit, fit_sequential, measure
from fitprune.costs.flops import visual_flops_reduction
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.families.images import images_of
from fitprune.fitting.budget import Budget, budget_from, checked_budget
from fitprune.fitting.fit import Fitter
from helpers.models import tiny_inputs, tiny_model
from helpers.statistics import SHAPE, synthetic


@pytest.fixture(scope="module")
def stats():
    return synthetic()


@pytest.mark.parametrize("value", [0.0, 0.05, 0.37, 0.5, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("kind", ["flops_reduction", "kv_cache_reduction", "mean_visual_tokens"])
def test_a_budget_is_met_and_missed_by_less_than_one_token_in_one_layer(stats, kind, value):
    if kind != "flops_reduction":
        value = min(value, 0.85)  # 1 - 1/8 is the most that eight layers can give
    if kind == "mean_visual_tokens":
        value = (1 - value) * 144
    budget = checked_budget(kind, value)
    recipe = fit(stats, **{kind: value})
    kept = recipe.kept(144)
    assert budget.met_by(budget.measured(SHAPE.decoder, 144, kept))
    for layer in range(8):
        more = [*kept[:layer], kept[layer] + 1, *kept[layer + 1 :]]
        if more[layer] <= ([144, *kept])[layer] and (kind == "flops_reduction" or layer < 7):
            assert not budget.met_by(budget.measured(SHAPE.decoder, 144, more))


def test_budgets_are_monotone(stats):
    values = [0.05 * i for i in range(1, 19)]
    reached = [fit(stats, flops_reduction=v).cost().flops_reduction for v in values]
    tolerances = [fit(stats, flops_reduction=v).provenance["tolerance"] for v in values]
    assert reached == sorted(reached)
    assert tolerances == sorted(tolerances)


def test_the_order_of_budgets_does_not_matter(stats):
    together, apart = Fitter(stats), [fit(stats, flops_reduction=v) for v in (0.8, 0.3, 0.6)]
    for value, alone in zip((0.8, 0.3, 0.6), apart, strict=True):
        shared = together.fit(checked_budget("flops_reduction", value))
        assert shared.cost().flops_reduction == pytest.approx(alone.cost().flops_reduction, abs=2e-4)


def test_tolerance_zero_removes_nothing_and_one_everything(stats):
    assert sum(fit(stats, tolerance=0.0).counts(144)) == 0
    assert fit(stats, tolerance=1.0).counts(144) == [144, 0, 0, 0, 0, 0, 0, 0]


def test_ragged_statistics_meet_the_budget_for_the_stated_size():
    recipe = fit(synthetic(counts=(100, 150, 150)), flops_reduction=0.5, visual_tokens=2880)
    assert recipe.visual_tokens == 2880
    removed = recipe.counts(2880)
    assert visual_flops_reduction(SHAPE.decoder, 2880, removed) == pytest.approx(0.5, abs=1e-4)
    assert fit(synthetic(counts=(100, 150, 150)), flops_reduction=0.5).visual_tokens == 150


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops_reduction": -0.1}, "flops_reduction=-0.1: must be at least 0 and below 1"),
        ({"flops_reduction": 1.0}, "flops_reduction=1.0: must be at least 0 and below 1"),
        ({"flops_reduction": 60}, "a fraction, not percent"),
        ({"flops_reduction": float("nan")}, "must be a finite number"),
        ({"flops_reduction": "0.5"}, "must be a finite number"),
        (
            {"flops_reduction": 0.99},
            "cannot be met even with all visual tokens removed after layer 0; ask for at most 0.9",
        ),
        ({"kv_cache_reduction": 0.9}, "ask for at most 0.8750"),
        ({"mean_visual_tokens": 10}, "ask for at least 18.0000"),
        ({"mean_visual_tokens": 0}, "must be above 0"),
        ({"tolerance": 1.1}, "must be between 0 and 1"),
        ({}, "0 budgets stated"),
        ({"flops_reduction": 0.5, "tolerance": 0.1}, "2 budgets stated"),
        ({"flops_reduction": 0.5, "visual_tokens": 0}, "visual_tokens=0"),
    ],
)
def test_a_budget_that_makes_no_sense_says_what_does(stats, budget, message):
    with pytest.raises(ValueError, match=message):
        fit(stats, **budget)


def test_statistics_without_samples_are_refused(stats):
    with pytest.raises(ValueError, match="holds no sample"):
        fit(stats.select([]), flops_reduction=0.5)


def test_the_least_tolerance_that_meets_the_budget_is_kept():
    stats = synthetic()
    recipe = fit(stats, flops_reduction=0.6)
    found = recipe.provenance["tolerance"]
    lower = fit(stats, tolerance=found - 2e-3).cost().flops_reduction
    assert lower < 0.6 <= fit(stats, tolerance=found).cost().flops_reduction


@pytest.mark.slow
def test_ten_budgets_on_statistics_of_full_size(record_property):
    shape = ModelFingerprint("llava", DecoderSizes(32, 4096, 11008, 32, 32, 128))
    one = torch.randn(2, 32, 655 * 576, generator=torch.Generator().manual_seed(0)).mul_(1.5).exp_()
    stats = AttentionStats(one[0], one[1], (576,) * 655, (60,) * 655, tuple(map(str, range(655))), shape)
    started = time.perf_counter()
    fitter = Fitter(stats)
    reached = [fitter.fit(checked_budget("flops_reduction", v / 10)).cost().flops_reduction for v in range(10)]
    record_property("seconds", time.perf_counter() - started)
    assert all(r >= v / 10 for v, r in enumerate(reached))
    assert all(r - v / 10 < 1e-4 for v, r in enumerate(reached))


@pytest.mark.parametrize("reduction", [0.3, 0.6])
def test_the_sequential_fit_meets_the_budget_on_a_model(reduction):
    model = tiny_model()
    batches = [tiny_inputs(model, seed=s) for s in range(4)]
    stats = measure(model, batches)
    recipe = fit_sequential(model, batches, flops_reduction=reduction, stats=stats)
    assert recipe.model == stats.model
    # The authors round the mean removals down, so their result may miss the budget by up to one token in each layer.
    assert recipe.cost().flops_reduction > reduction - 0.05


def test_the_sequential_fit_at_a_tolerance_equals_one_pass_at_the_first_layer():
    """Nothing is renormalised before anything has left: the first layer that removes must agree."""
    model = tiny_model()
    batches = [tiny_inputs(model, seed=s) for s in range(6)]
    stats = measure(model, batches)
    from fitprune.baselines.authors_fit import _totals, _within
    from fitprune.engine.remover import removing
    from fitprune.families.adapter import adapt

    left = torch.zeros(6, 5, dtype=torch.long)
    for index, batch in enumerate(batches):
        with (
            torch.no_grad(),
            removing(adapt(model), _within(_totals(stats)[index], 0.3, left[index], range(5))),
        ):
            model(**batch, use_cache=False)
    assert (left[:, 0].double() / 16).mean().item() == pytest.approx(Fitter(stats).kept_fractions(0.3)[0])


def test_the_sequential_fit_weighs_samples_of_different_size_by_their_shares():
    model = tiny_model()
    batches = [tiny_inputs(model, images=i, seed=s) for s, i in enumerate((3, 1, 1, 2, 1))]
    recipe = fit_sequential(model, [*batches, batches[0]], flops_reduction=0.4)
    assert recipe.provenance["samples"] == 6  # each row counts, also one that is equal to another
    kept = [16, *recipe.kept(16)]
    assert kept == sorted(kept, reverse=True)


def test_the_most_that_can_be_asked_for_is_what_the_message_says():
    stats = synthetic()
    with pytest.raises(ValueError, match="ask for at most") as caught:
        fit(stats, flops_reduction=0.99)
    most = float(str(caught.value).rsplit(" ", 1)[1])
    assert fit(stats, flops_reduction=most).counts(144) == [144, *[0] * 7]


def test_the_sequential_fit_refuses_other_samples_and_batches():
    model = tiny_model()
    batches = [tiny_inputs(model, seed=s) for s in range(2)]
    stats = measure(model, batches)
    others = [batches[0], tiny_inputs(model, seed=9)]
    for wrong in (batches[:1], others, batches[::-1]):
        with pytest.raises(ValueError, match="must be the same samples in the same order"):
            fit_sequential(model, wrong, flops_reduction=0.5, stats=stats)
    with pytest.raises(ValueError, match="one sample at a time"):
        fit_sequential(model, [tiny_inputs(model, batch=2)], flops_reduction=0.5)
    with pytest.raises(ValueError, match="of another model"):
        fit_sequential(tiny_model(layers=4), batches, flops_reduction=0.5, stats=stats)


def test_images_are_runs_of_visual_tokens():
    visual = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    assert images_of(visual).tolist() == [[-1, 0, 0, -1, 1, -1], [0, 0, 0, 0, -1, -1]]


@pytest.mark.parametrize("kind", ["flops_reduction", "tolerance"])
def test_a_list_of_budgets_gives_a_recipe_each_as_one_fitter_does(stats, kind):
    values, fitter = [0.6, 0.2, 0.4], Fitter(stats)
    recipes = fit(stats, **{kind: values}, max_removal_layers=3)
    assert recipes == [fitter.fit(**{kind: value}, max_removal_layers=3) for value in values]
    assert [recipe.provenance["budget"] for recipe in recipes] == [{kind: value} for value in values]
    assert fit(stats, **{kind: (0.6,)}) == [fit(stats, **{kind: 0.6})]


def test_a_budget_by_keyword_is_the_budget_of_its_kind():
    assert budget_from(flops_reduction=0.5, tolerance=None) == Budget("flops_reduction", 0.5)
    assert budget_from(tolerance=[0, 1]) == [Budget("tolerance", 0.0), Budget("tolerance", 1.0)]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops_reduction": []}, r"flops_reduction=\[\]: must hold at least one value; pass a number or a list"),
        ({"flops_reduction": [[0.4]]}, r"flops_reduction\[0\]=\[0.4\]: must be a finite number"),
        ({"flops_reduction": [0.4, "0.6"]}, r"flops_reduction\[1\]='0.6': must be a finite number"),
        ({"flops_reduction": [0.4, True]}, r"flops_reduction\[1\]=True: must be a finite number"),
        ({"flops_reduction": [float("nan")]}, r"flops_reduction\[0\]=nan: must be a finite number"),
        ({"tolerance": [0.4, 2]}, r"tolerance\[1\]=2: must be between 0 and 1"),
        ({"flops_reduction": [0.4], "tolerance": [0.1]}, "2 budgets stated .*pass exactly one of"),
        ({"kv_reduction": 0.4}, "budget 'kv_reduction': must be one of flops_reduction"),
    ],
)
def test_a_budget_in_a_list_is_named_with_its_place(stats, budget, message):
    with pytest.raises(ValueError, match=message):
        Fitter(stats).fit(**budget)


@pytest.mark.parametrize(
    "call", [lambda fitter: fitter.fit(0.6), lambda fitter: fitter.fit(Budget("tolerance", 0.1), tolerance=0.1)]
)
def test_a_fitter_takes_one_budget_or_keywords(stats, call):
    with pytest.raises(ValueError, match=r"budget=.*: must be a Budget alone, or pass flops_reduction=0.6"):
        call(Fitter(stats))
