"""The whole analysis: its notes, settings and command, and its files byte by byte."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from PIL import Image

from fitprune import AttentionStats, analyze
from fitprune.analysis.analyze import BUDGETS
from fitprune.analysis.figures import draw_analysis
from fitprune.analysis.save import findings, save, to_dict
from fitprune.cli.main import main
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from helpers.statistics import statistics_of, synthetic


@pytest.fixture(scope="module")
def found(ragged):
    return analyze(ragged, resamples=4)


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


def test_pictures_of_few_samples_say_so_first(found, tmp_path):
    for path in draw_analysis(found, tmp_path):
        if path.suffix == ".svg":
            assert re.search(rf">Only {len(found.stats)} samples: ", path.read_text())
            assert "#565d66" not in path.read_text()


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
        analyze({"a": ragged, "b": statistics_of([[1.0, 2.0]])})
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
