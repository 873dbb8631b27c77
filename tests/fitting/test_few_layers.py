"""Merging removals to few layers: exactly the least extra loss, at equal budget."""

import dataclasses
import itertools
import math
import time

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from fitprune import AttentionStats, PruningRecipe, fit
from fitprune.costs.flops import visual_flops_reduction
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import Budget, checked_budget
from fitprune.fitting.few_layers import lost_attention, merge_layers, prices_of
from fitprune.fitting.fit import Fitter
from fitprune.fitting.rules import keep_highest
from fitprune.recipes.rounding import kept_counts

KINDS = ("flops_reduction", "kv_cache_reduction", "mean_visual_tokens")


def synthetic(layers=8, counts=(144,), samples=20, number=0, **decoder):
    """Attention that drifts from layer to layer and becomes sparser, so that every layer has something to remove."""
    generator = torch.Generator().manual_seed(number)
    visual = tuple(counts[i % len(counts)] for i in range(samples))
    values = torch.randn(2, layers, sum(visual), generator=generator)
    for layer in range(1, layers):
        values[:, layer] = 0.8 * values[:, layer - 1] + 0.6 * values[:, layer]
    values.mul_(torch.linspace(0.5, 2.5, layers)[:, None]).exp_()
    shape = ModelFingerprint("llava", DecoderSizes(layers, 64, 128, 4, 4, 16, **decoder))
    values[:, list(shape.decoder.linear_layers)] = 0
    return AttentionStats(values[0], values[1], visual, (20,) * samples, tuple(map(str, range(samples))), shape)


def removing(kept, n):
    return [layer for layer, (had, keeps) in enumerate(zip([n, *kept[:-1]], kept, strict=True)) if keeps < had]


def schedules(layers, n, starts, at_most):
    """Every way to remove at no more than so many layers."""
    for k in range(1, at_most + 1):
        for where in itertools.combinations(starts, k):
            for counts in itertools.combinations(range(n - 1, -1, -1), k):
                kept = [n] * layers
                for start, count in zip(where, counts, strict=True):
                    kept[start:] = [count] * (layers - start)
                yield where, kept


def extra_loss(lost, where, kept, fitted, starts):
    total = 0.0
    for layer in range(where[0], len(kept)):
        if layer in starts:
            own = lost[starts.index(layer), layer, fitted[layer]]
            chosen = starts.index(max(start for start in where if start <= layer))
            total += max(0.0, float(lost[chosen, layer, kept[layer]] - own))
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("at_most", "number"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("decoder", [{}, {"first_prunable": 1, "linear_layers": (3,), "linear_macs": 5000}])
def test_the_least_extra_loss_of_all_schedules_is_found(kind, at_most, number, decoder):
    n = 12 if at_most < 3 else 9
    stats = synthetic(layers=5, counts=(n, 7), samples=3, number=number, **decoder)
    shape, starts = stats.model.decoder, stats.model.decoder.prunable
    budget = checked_budget(kind, 0.55 * n if kind == "mean_visual_tokens" else 0.45)
    fitted = Fitter(stats, visual_tokens=n).fit(budget).kept(n)
    lost, prices, buckets = lost_attention(stats, n), prices_of(budget, shape, n), 400
    kept, found = merge_layers(fitted, lost, prices, starts, at_most, buckets=buckets)
    assert budget.met_by(budget.measured(shape, n, kept))
    assert extra_loss(lost, removing(kept, n), kept, fitted, starts) == pytest.approx(found, abs=1e-5)

    dense = [n] * starts[0]
    least = budget.measured(shape, n, [*dense, *[0] * (5 - len(dense))])
    room = (1 - 2 * at_most / buckets) * (least - budget.value)  # what rounding can take, and as much again
    tight = Budget(kind, least - room)
    losses = {budget: math.inf, tight: math.inf}
    for where, every in schedules(5, n, starts, at_most):
        for limit in losses:
            if limit.met_by(limit.measured(shape, n, every)):
                losses[limit] = min(losses[limit], extra_loss(lost, where, every, fitted, starts))
    assert losses[budget] - 1e-5 <= found <= losses[tight] + 1e-5


def test_lost_attention_is_that_of_the_tokens_that_inference_would_remove():
    stats = synthetic(layers=4, counts=(6, 11), samples=5, linear_layers=(1,), linear_macs=5000)
    lost = lost_attention(stats, 10)
    assert lost.shape == (3, 4, 11)
    for (p, start), layer, count in itertools.product(enumerate((0, 2, 3)), range(4), range(11)):
        expected = 0.0
        for sample in range(5):
            one = stats.select([sample])
            n, own, cross = one.visual_tokens[0], one.self_attention, one.cross_attention
            image, left = torch.zeros(1, n, dtype=torch.long), torch.tensor([kept_counts([count / 10], n)])
            leaves = ~keep_highest((own[start] * cross[start])[None], image, left)[0]
            if layer >= start and layer != 1:
                expected += max(float(a[layer, leaves].sum() / a[layer].sum()) for a in (own, cross)) / 5
        assert float(lost[p, layer, count]) == pytest.approx(expected, abs=1e-6)


def test_of_equally_ranked_tokens_the_later_is_kept():
    stats = synthetic(layers=1, counts=(4,), samples=1)
    stats = dataclasses.replace(
        stats, self_attention=torch.tensor([[4.0, 2, 1, 3]]), cross_attention=1 / torch.tensor([[4.0, 2, 1, 3]])
    )
    assert lost_attention(stats, 4)[0, 0, 3] == pytest.approx(0.4)  # the first token's self attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.05, 0.37, 0.6, 0.8, 0.85])
@pytest.mark.parametrize("at_most", [1, 2, 4])
def test_a_merged_fit_meets_its_budget_to_a_token(kind, value, at_most):
    stats = synthetic()
    budget = checked_budget(kind, (1 - value) * 144 if kind == "mean_visual_tokens" else value)
    recipe = fit(stats, max_removal_layers=at_most, **{kind: budget.value})
    kept, decoder = recipe.kept(144), stats.model.decoder
    assert 1 <= len(recipe.removing) <= at_most
    assert kept == sorted(kept, reverse=True)
    assert budget.met_by(budget.measured(decoder, 144, kept))
    assert recipe.provenance["reached"] == budget.measured(decoder, 144, kept)
    assert recipe.provenance["max_removal_layers"] == at_most
    assert recipe.provenance["extra_loss"] >= 0
    for start, end in itertools.pairwise([*recipe.removing, 8]):
        more = [*kept[:start], *(count + 1 for count in kept[start:end]), *kept[end:]]
        if kind == "flops_reduction" or start < 7:  # what the last layer leaves enters no other
            assert not budget.met_by(budget.measured(decoder, 144, more))
    assert PruningRecipe.from_json(recipe.to_json()) == recipe


@seed(2409)
@settings(max_examples=60, deadline=None, database=None)
@given(
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.integers(0, 99),
    st.sampled_from(
        [{}, {"first_prunable": 2}, {"linear_layers": (0, 3), "linear_macs": 9000}, {"bidirectional": True}]
    ),
    st.sampled_from([(20,), (7, 30), (1,), (2, 3)]),
)
def test_any_budget_any_shape(kind, share, number, decoder, counts):
    stats = synthetic(layers=6, counts=counts, samples=4, number=number, **decoder)
    shape, n = stats.model.decoder, stats.usual_visual_tokens
    first = shape.prunable[0]
    most = Budget(kind, 0).measured(shape, n, [n] * first + [0] * (6 - first))
    dense = Budget(kind, 0).measured(shape, n, [n] * 6)
    budget = Budget(kind, dense + share * (most - dense))
    fitter, losses = Fitter(stats), []
    plain = fitter.fit(budget)
    for at_most in range(1, 7):
        recipe = fitter.fit(budget, at_most)
        kept = recipe.kept(n)
        assert len(recipe.removing) <= at_most
        assert set(recipe.removing) <= set(shape.prunable)
        assert budget.met_by(budget.measured(shape, n, kept))
        losses.append(recipe.provenance["extra_loss"])
        if at_most >= len(plain.removing):
            assert recipe == plain
            assert losses[-1] == 0
    assert losses == sorted(losses, reverse=True)


def test_a_tolerance_is_merged_at_equal_flops():
    stats = synthetic()
    plain, merged = fit(stats, tolerance=0.2), fit(stats, tolerance=0.2, max_removal_layers=2)
    assert len(plain.removing) > 2
    assert len(merged.removing) == 2
    assert merged.provenance["budget"] == {"tolerance": 0.2}
    reached = plain.cost().flops_reduction
    assert reached <= merged.cost().flops_reduction < reached + 0.01
    assert fit(stats, tolerance=0.0, max_removal_layers=1).removing == []


def test_drawn_samples_are_merged_by_their_own_attention():
    stats, budget, draw = synthetic(counts=(20, 31)), checked_budget("flops_reduction", 0.6), [3, 3, 0, 17, 5]
    fitter = Fitter(stats, visual_tokens=31)
    fitter.fit(budget, 2)
    alone = Fitter(stats.select(draw), visual_tokens=31).fit(budget, 2)
    assert fitter.resampled(draw).fit(budget, 2) == alone


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3"])
def test_what_is_no_number_of_layers_is_refused(value):
    with pytest.raises(ValueError, match=r"max_removal_layers=.*: must be an integer of at least 1; leave it out"):
        fit(synthetic(samples=2), flops_reduction=0.5, max_removal_layers=value)


def test_a_budget_out_of_reach_raises_as_without_merging():
    with pytest.raises(ValueError, match="ask for at most") as caught:
        fit(synthetic(), flops_reduction=0.99, max_removal_layers=2)
    most = float(str(caught.value).rsplit(" ", 1)[1])
    recipe = fit(synthetic(), flops_reduction=most, max_removal_layers=1)
    assert visual_flops_reduction(synthetic().model.decoder, 144, recipe.counts(144)) >= most


@pytest.mark.slow
def test_merging_statistics_of_full_size(record_property):
    shape = ModelFingerprint("llava", DecoderSizes(32, 4096, 11008, 32, 32, 128))
    drift = synthetic(layers=32, counts=(576,), samples=64)
    fitter = Fitter(dataclasses.replace(drift, model=shape))
    budget = checked_budget("flops_reduction", 0.6)
    fitter.fit(budget)
    started = time.perf_counter()
    recipe = fitter.fit(budget, 8)
    seconds = time.perf_counter() - started
    record_property("seconds", seconds)
    assert len(recipe.removing) == 8
    assert seconds < 20  # 1 s on a quiet core
