"""The analysis, part by part against cases computed by hand, and its files byte by byte."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from PIL import Image

from fitprune import AttentionStats, PruningRecipe, analyze, fit
from fitprune.analysis import attention, stability
from fitprune.analysis.analyze import BUDGETS
from fitprune.analysis.figures import draw_analysis
from fitprune.analysis.save import findings, save, to_dict
from fitprune.cli.main import main
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.rules import keep_highest
from helpers.statistics import synthetic

LAYERS = 3


def made(own, cross=None, counts=None, model=None):
    """Statistics of given attention [L, T]; by default one sample, and cross attention equal to self attention."""
    own = torch.as_tensor(own, dtype=torch.float32)
    cross = own if cross is None else torch.as_tensor(cross, dtype=torch.float32)
    counts = counts or (own.shape[1],)
    shape = model or ModelFingerprint("llava", DecoderSizes(len(own), 8, 16, 2, 2, 4))
    return AttentionStats(own, cross, counts, (5,) * len(counts), tuple(map(str, range(len(counts)))), shape)


@pytest.fixture(scope="module")
def ragged():
    return synthetic(samples=18, counts=(25, 16, 25))


@pytest.fixture(scope="module")
def found(ragged):
    return analyze(ragged, resamples=4)


def test_received_attention_is_summed_over_the_tokens_of_each_sample():
    layers = attention.attention_per_layer(made([[1, 2, 3, 10, 20]], [[1, 1, 1, 1, 1]], (3, 2)))
    assert layers.self_attention.mean.tolist() == [18]  # 6 and 30
    assert layers.self_attention.deviation.tolist() == [12]
    assert layers.self_attention.low.tolist() == pytest.approx([6 + 0.05 * 24])
    assert layers.cross_attention.mean.tolist() == [2.5]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_top_share_of_uniform_attention_is_the_fraction_itself(count):
    top = attention.top_share(made(torch.full((LAYERS, count), 0.3)))
    for fraction, row in zip(top.fractions, top.self_attention.mean.tolist(), strict=True):
        assert row == pytest.approx([fraction] * LAYERS)


def test_the_top_share_counts_the_most_attended_tokens_and_parts_of_one():
    top = attention.top_share(made([[1, 6, 3]], [[0, 0, 0]]), fractions=(1 / 3, 0.5, 1.0))
    assert top.self_attention.mean[:, 0].tolist() == pytest.approx([0.6, 0.75, 1.0])
    assert top.cross_attention.mean[:, 0].tolist() == pytest.approx([1 / 3, 0.5, 1.0])  # none received: uniform


def test_a_top_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"fractions holds 10: must be above 0 and at most 1"):
        attention.top_share(made([[1.0, 2.0]]), fractions=(10,))


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
    flat = made(late, counts=(25,) * 9, model=ragged.model)
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


def test_spearman_of_a_layer_with_itself_is_1_and_of_a_reversed_one_is_minus_1():
    ranks = attention.rank_agreement(made([[1, 2, 3, 4], [9, 5, 2, 1], [10, 200, 3000, 40000]], counts=(4,)))
    expected = [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert torch.allclose(ranks.matrix, torch.tensor(expected, dtype=torch.float64))
    assert ranks.samples == 1


def test_equal_scores_share_their_mean_rank():
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2.
    ranks = attention.rank_agreement(made([[1, 1, 2], [1, 2, 3]]))
    assert float(ranks.matrix[0, 1]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_rank_agreement_is_a_mean_over_the_samples_where_it_is_defined():
    two = made([[1, 2, 3, 1, 2, 3, 7], [1, 2, 3, 3, 2, 1, 7], [5] * 7], counts=(3, 3, 1))
    ranks = attention.rank_agreement(two)
    assert ranks.samples == 2
    assert float(ranks.matrix[0, 1]) == pytest.approx(0)
    assert math.isnan(float(ranks.matrix[0, 2]))  # nothing differs in layer 2
    assert attention.rank_agreement(made([[1.0, 2.0]], counts=(1, 1))) is None


def test_attention_that_lies_in_one_row_is_all_in_that_row():
    one_row = torch.zeros(4, 4)
    one_row[2] = 0.25
    column = one_row.T
    stats = made(torch.stack([one_row.flatten(), column.flatten()]), torch.ones(2, 16))
    position = attention.position_bias(stats)
    assert (position.side, position.samples) == (4, 1)
    assert position.by_row["self"][0].tolist() == [0, 0, 4, 0]
    assert position.by_column["self"][0].tolist() == [1, 1, 1, 1]
    assert position.by_column["score"][1].tolist() == [0, 0, 4, 0]
    assert position.by_row["cross"].unique().tolist() == [1]
    assert position.grid["self"][2].tolist() == [2, 2, 4, 2]


def test_each_sample_counts_the_same_in_position_bias():
    strong = torch.tensor([[8.0, 0, 0, 0]]) * 1000
    weak = torch.tensor([[0.0, 0, 0, 1]])
    position = attention.position_bias(made(torch.cat([strong, weak], 1), counts=(4, 4)))
    assert position.grid["self"].tolist() == [[2, 0], [0, 2]]


def test_what_cannot_be_said_is_left_out_with_a_note(tmp_path):
    lonely = analyze(synthetic(samples=1, counts=(15,)), budgets=[0.5], resamples=2)
    notes = "\n".join(lonely.notes)
    assert lonely.position is None
    assert lonely.data == ()
    assert "position bias: left out, 15 visual tokens form no square grid" in notes
    assert "one sample cannot be split" in notes
    assert "calibration sizes 8, 16, 64, 655: left out, there are 1 samples" in notes
    save(lonely, tmp_path)
    draw_analysis(lonely, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith(("position", "stability_over_data.p")) for name in written)
    assert to_dict(lonely)["position_bias"] is None
    assert "no square grid" in findings(lonely)


def test_sizes_are_those_that_the_samples_reach_and_all_of_them(found):
    assert [(part.flops_reduction, part.samples) for part in found.sizes] == [
        (budget, size) for budget in BUDGETS for size in (8, 16, 18)
    ]
    assert "samples have 16 to 25 visual tokens: counts of tokens are for 25" in "\n".join(found.notes)
    assert found.position.samples == 12


def test_budgets_are_those_of_fit_and_meet_what_they_say(found, ragged):
    fitter = Fitter(ragged)
    for part in found.budgets:
        assert part.recipe.keep == fitter.fit(checked_budget("flops_reduction", part.flops_reduction)).keep
        assert part.recipe.cost().flops_reduction >= part.flops_reduction
        assert part.attention_loss == pytest.approx(float(torch.stack([part.lost_self, part.lost_cross]).mean()))


def test_several_data_are_joined_and_compared_by_name(ragged):
    other = dataclasses.replace(ragged.select(range(4)), digests=("0", "x", "y", "z"), provenance={"weights": "w"})
    both = analyze({"one": ragged, "two": other}, budgets=[0.5], resamples=2)
    assert len(both.stats) == 21
    assert both.data[0].names == ("one", "two")
    notes = "\n".join(both.notes)
    assert "1 samples stand in several of the statistics" in notes
    assert "different weights" in notes


def test_a_sample_is_shared_once_however_many_statistics_hold_it(ragged):
    repeated = dataclasses.replace(ragged.select(range(3)), digests=("x", "x", "y"))  # twice in one file: not shared
    apart = analyze({"one": ragged, "two": repeated}, budgets=[0.5], resamples=2)
    assert len(apart.stats) == 21
    assert not any("stand in several" in note for note in apart.notes)
    assert any(note.startswith("1 of 21 samples are equal to earlier ones") for note in apart.notes)
    third = analyze({"one": ragged, "two": ragged.select([0]), "three": ragged.select([0])}, budgets=[0.5], resamples=2)
    assert "data: 1 samples stand in several of the statistics, which are then not independent" in third.notes


def test_the_same_statistics_give_the_same_bytes(ragged, found, tmp_path):
    for folder, analysis in (("a", found), ("b", analyze(ragged, resamples=4))):
        written = save(analysis, tmp_path / folder) + draw_analysis(analysis, tmp_path / folder)
        assert sorted(written) == sorted((tmp_path / folder).iterdir())
    assert len(written) == 30
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_another_seed_draws_other_samples(ragged, found):
    other = analyze(ragged, resamples=4, seed=1)
    assert not torch.equal(other.sizes[0].kept.mean, found.sizes[0].kept.mean)


def test_json_and_tables_hold_the_same_figures(found, tmp_path):
    save(found, tmp_path)
    data = json.loads((tmp_path / "analysis.json").read_text())
    assert data["schema"] == 1
    assert data["samples_by_visual_tokens"] == {"16": 6, "25": 12}
    assert data["statistics"] == [{"name": "statistics", "samples": 18, "provenance": {}}]
    lines = (tmp_path / "removals.csv").read_text().splitlines()
    assert lines[0] == "flops_reduction,layer,removed,kept,lost_self,lost_cross"
    assert len(lines) == 1 + 3 * 8
    removed = [int(line.split(",")[2]) for line in lines[1:9]]
    assert removed == data["budgets"][0]["removed"] == found.budgets[0].recipe.counts(25)
    assert float(lines[1].split(",")[4]) == data["budgets"][0]["lost_self"][0]


def test_every_picture_is_a_png_and_an_svg_without_a_date(found, tmp_path):
    for path in draw_analysis(found, tmp_path):
        if path.suffix == ".png":
            assert Image.open(path).width > 500
        else:
            text = path.read_text()
            assert "<svg" in text
            assert "<dc:date>" not in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budgets": []}, "pass at least one, and each once"),
        ({"budgets": [0.5, 0.5]}, "pass at least one, and each once"),
        ({"budgets": [60]}, "a fraction, not percent"),
        ({"budgets": [0.99]}, "cannot be met"),
        ({"resamples": 0}, "resamples=0: must be an integer of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ragged, wrong, message):
    with pytest.raises(ValueError, match=message):
        analyze(ragged, **wrong)


def test_statistics_that_cannot_be_analysed_are_refused(ragged):
    with pytest.raises(ValueError, match="statistics 'b' hold no sample"):
        analyze({"a": ragged, "b": ragged.select([])})
    with pytest.raises(ValueError, match="of another model"):
        analyze({"a": ragged, "b": made([[1.0, 2.0]])})
    with pytest.raises(ValueError, match="parts is empty"):
        analyze({})


def test_the_command_writes_all_and_prints_the_findings(ragged, tmp_path, capsys, monkeypatch):
    ragged.save(tmp_path / "a.safetensors")
    synthetic(samples=5, counts=(25,), seed=3).save(tmp_path / "b.safetensors")
    names = [f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors"]
    options = ["--flops-reduction", "0.5", "--resamples", "2"]
    assert main(["analyze", *names, "-o", f"{tmp_path}/out", *options]) == 0
    said = capsys.readouterr().out
    assert "rank agreement of scores" in said
    assert "30 files" in said
    assert main(["analyze", names[0], names[0], "-o", f"{tmp_path}/x", *options]) == 2
    assert "two files have the same name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", names[0], "-o", f"{tmp_path}/y", *options]) == 1
    assert "use --no-pictures" in capsys.readouterr().err
    assert main(["analyze", names[0], "-o", f"{tmp_path}/y", "--no-pictures", *options]) == 0
    assert {path.suffix for path in (tmp_path / "y").iterdir()} == {".json", ".csv"}


@pytest.mark.slow
def test_statistics_of_full_size_are_analysed_in_bounded_memory(record_property):
    import resource
    import time

    shape = ModelFingerprint("llava", DecoderSizes(32, 4096, 11008, 32, 32, 128))
    one = torch.randn(2, 32, 655 * 576, generator=torch.Generator().manual_seed(0)).mul_(1.5).exp_()
    stats = AttentionStats(one[0], one[1], (576,) * 655, (60,) * 655, tuple(map(str, range(655))), shape)
    started = time.perf_counter()
    found = analyze(stats, resamples=2)  # of 30 draws the cost model is the same: about 0.1 s for each further recipe
    record_property("seconds", time.perf_counter() - started)
    assert [part.samples for part in found.sizes[:4]] == [8, 16, 64, 655]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB
