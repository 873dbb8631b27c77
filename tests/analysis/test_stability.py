"""How firmly statistics fix a recipe, against cases computed by hand."""

import dataclasses

import pytest
import torch

from fitprune import PruningRecipe, fit
from fitprune.analysis import stability
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.rules import keep_highest
from helpers.statistics import statistics_of, synthetic


def test_the_tolerance_curve_rises_from_nothing_to_everything(ragged):
    curve = stability.tolerance_curve(Fitter(ragged))
    for values in (curve.flops_reduction, curve.kv_cache_reduction, curve.by_sample.mean):
        assert values[0] == 0
        assert bool((values.diff() >= 0).all())
    # All but the first layer is free of visual tokens, and the first layer's MLP.
    assert curve.kv_cache_reduction[-1] == pytest.approx(7 / 8)
    assert curve.flops_reduction[-1] > 7 / 8


def test_the_tolerance_curve_passes_through_the_fitted_recipe(ragged):
    recipe = fit(ragged, flops_reduction=0.5)
    curve = stability.tolerance_curve(Fitter(ragged), tolerances=(recipe.provenance["tolerance"],))
    assert float(curve.flops_reduction) == pytest.approx(0.5, abs=0.03)  # counts are whole, mean fractions are not


def test_attention_is_lost_by_the_rule_of_inference(ragged):
    recipe = PruningRecipe((0.9, 0.9, 0.6, 0.5, 0.5, 0.2, 0.1, 0.0), ragged.model, 25)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for sample in range(len(ragged)):
        one = ragged.select([sample])
        n = one.visual_tokens[0]
        place = torch.arange(n)
        for layer, left in enumerate(recipe.kept(n)):
            own, cross = one.self_attention[layer], one.cross_attention[layer]
            score = (own * cross)[place][None]
            stays = keep_highest(score, torch.zeros(1, len(place), dtype=torch.long), torch.tensor([[left]]))
            place = place[stays[0]]
            for kind, values in enumerate((own, cross)):
                expected[kind, layer] += 1 - values[place].sum() / values.sum()
    lost = stability.attention_loss(ragged, [recipe])[0]
    assert torch.allclose(lost, expected / len(ragged), atol=1e-5)


def test_a_recipe_that_keeps_all_loses_nothing_and_order_is_kept(ragged):
    dense = PruningRecipe.dense(ragged.model, 25)
    none = PruningRecipe((0.0,) * 8, ragged.model, 25)
    lost = stability.attention_loss(ragged, [none, dense, none])
    assert lost[1].abs().max() == 0
    assert torch.equal(lost[0], torch.ones(2, 8, dtype=torch.float64))
    assert torch.equal(lost[0], lost[2])


def test_recipe_distance_is_the_mean_difference_of_present_tokens():
    assert float(stability.recipe_distance(torch.tensor([10, 8, 4]), torch.tensor([10, 5, 1]))) == 2


def test_draws_of_equal_samples_have_no_spread():
    one = synthetic(samples=1)
    same = dataclasses.replace(
        one,
        self_attention=one.self_attention.repeat(1, 10),
        cross_attention=one.cross_attention.repeat(1, 10),
        visual_tokens=one.visual_tokens * 10,
        text_tokens=one.text_tokens * 10,
        digests=tuple(map(str, range(10))),
    )
    for part in stability.stability_over_size(Fitter(same), [checked_budget("flops_reduction", 0.5)], resamples=5):
        assert float(part.distance.mean) == float(part.distance.high) == 0
        for spread in (part.removed, part.kept, part.tolerance, part.attention_loss):
            assert torch.equal(spread.low, spread.high)


def test_more_samples_move_a_recipe_less():
    stats = synthetic(samples=200, counts=(36,))
    small, large = stability.stability_over_size(
        Fitter(stats), [checked_budget("flops_reduction", 0.5)], sizes=(4,), resamples=12
    )
    assert (small.samples, large.samples) == (4, 200)
    assert float(large.distance.mean) < float(small.distance.mean)


def test_a_draw_shares_walks_and_fits_as_if_alone(ragged):
    fitter, draw = Fitter(ragged), [3, 3, 0, 17, 5, 1, 1, 9, 8, 2]
    budget = checked_budget("flops_reduction", 0.5)
    fitter.fit(budget)
    drawn = fitter.resampled(draw)
    alone = Fitter(ragged.select(draw), visual_tokens=25)
    for tolerance in (0.1, 0.4):
        assert drawn.kept_fractions(tolerance) == pytest.approx(alone.kept_fractions(tolerance))
    recipe = drawn.fit(budget)
    assert recipe.provenance["samples"] == 10
    assert recipe.cost().flops_reduction == pytest.approx(alone.fit(budget).cost().flops_reduction, abs=1e-3)
    walks = len(fitter._simulation.walks)
    fitter.resampled(draw).fit(budget)
    assert len(fitter._simulation.walks) == walks
    with pytest.raises(ValueError, match="samples is empty: draw at least one"):
        fitter.resampled([])


def test_halves_are_all_samples_once(ragged):
    first, second = stability.halves(ragged, seed=1).values()
    assert sorted(first.digests + second.digests) == sorted(ragged.digests)
    assert abs(len(first) - len(second)) <= 1
    with pytest.raises(ValueError, match="holds 1 sample: must be at least 2 to split"):
        stability.halves(ragged.select([0]))


def test_recipes_of_the_same_data_agree_and_lose_the_same(ragged):
    budget = checked_budget("flops_reduction", 0.5)
    (part,) = stability.stability_over_data({"a": ragged, "b": ragged}, [budget], visual_tokens=25)
    assert part.distance.abs().max() == 0
    assert part.attention_loss.unique().numel() == 1


def test_losses_stand_in_the_row_of_the_recipe_and_the_column_of_the_data(ragged):
    late = torch.rand(8, 225, generator=torch.Generator().manual_seed(0)).add(1)
    late[4:] = late[4:] ** 20  # only late layers hold tokens that matter little
    flat = statistics_of(late, counts=(25,) * 9, model=ragged.model)
    data = {"a": ragged, "b": flat, "c": synthetic(samples=6, seed=5)}
    budgets = [checked_budget("flops_reduction", value) for value in (0.3, 0.7)]
    found = stability.stability_over_data(data, budgets, visual_tokens=25)
    for part in found:
        recipes = [fit(stats, flops_reduction=part.flops_reduction, visual_tokens=25) for stats in data.values()]
        assert float(part.distance[0, 1]) > 0
        assert torch.equal(part.distance, part.distance.T)
        for row, recipe in enumerate(recipes):
            for column, stats in enumerate(data.values()):
                alone = float(stability.attention_loss(stats, [recipe]).mean())
                assert float(part.attention_loss[row, column]) == pytest.approx(alone, abs=5e-3)
