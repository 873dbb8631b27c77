"""Evaluation: figures as counted by hand; the same bytes every time, killed and continued, in one process or two."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import AttentionStats, PruningRecipe, evaluate, load_samples
from fitprune._support import assets
from fitprune.baselines.base import Sizes
from fitprune.baselines.table import BASELINES, make_method
from fitprune.cli.main import main
from fitprune.evaluation import evaluate as evaluation
from fitprune.evaluation.entries import Entry, entries_for
from fitprune.evaluation.report import write_report
from fitprune.evaluation.results import Results, beside, table
from fitprune.evaluation.tables import verdict
from fitprune.families.adapter import adapt
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter

OPTIONS = ["--methods", "fitprune", "random", "dart", "--flops-reduction", "0.6", "0.9", "--seeds", "0", "1"]
DATA = ["--data", "digit-scenes/test", "digit-details/test", "--samples", "12", "--batch-size", "5"]


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("made") / "stats.safetensors")
    options = ["--data", "digit-scenes/calibration", "digit-details/calibration", "--samples", "8", "--batch-size", "8"]
    assert main(["measure", "digit-scenes", *options, "-o", path]) == 0
    return path


def command(stats, out, *more):
    options = [*OPTIONS, "--stats", stats, "--examples", "3", "--timed-batches", "0"]  # of an option the last counts
    return ["evaluate", "digit-scenes", *DATA, *options, *more, "-o", str(out)]


@pytest.fixture(scope="module")
def done(stats, tmp_path_factory):
    """One whole run."""
    out = tmp_path_factory.mktemp("run") / "results.json"
    assert main(command(stats, out)) == 0
    return out


def records(out):
    return [json.loads(line) for line in out.with_suffix(".samples.jsonl").read_text().splitlines()[1:]]


def test_every_figure_is_what_counting_gives(done):
    results, said = Results.load(done), records(done)
    assert len(said) == 24
    assert [row.label for row in results.rows[:6]] == [
        "dense", "fitprune 60%", "fitprune 90%", "random 60%", "random 90%", "dart 60%",
    ]  # fmt: skip
    assert results.row("random 60%").seeds == 2
    for row in results.rows:
        own = [r for r in said if r["task"] == row.task]
        labels = [f"{row.label} seed {s}" for s in (0, 1)] if row.seeds == 2 else [row.label]
        right = [r["said"][name].lower() in [a.lower() for a in r["accepted"]] for name in labels for r in own]
        same = [r["said"][name] == r["said"]["dense"] for name in labels for r in own]
        assert row.accuracy == pytest.approx(np.mean(right), abs=1e-6)
        assert row.agreement == pytest.approx(np.mean(same), abs=1e-6)
        assert row.divergence == pytest.approx(np.mean([r["divergence"][n] for n in labels for r in own]), abs=1e-6)
        assert row.accuracy_interval[0] <= row.accuracy <= row.accuracy_interval[1]
        by_kind = {r["kind"] for r in own}
        assert set(row.accuracy_by_kind) == by_kind
    dense, pruned = results.row("dense"), results.row("fitprune 60%")
    assert (dense.agreement, dense.divergence, dense.flops_reduction, dense.prefill_flops_ratio) == (1, 0, 0, 1)
    assert 0.6 <= pruned.flops_reduction < 0.61
    assert pruned.kv_bytes < dense.kv_bytes
    assert results.row("dense", "digit-details/test").samples == 12
    assert [(s["method"], s["budget"]) for s in results.skipped] == [("dart", 0.9)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results.provenance["date"])


def test_the_table_says_where_fitprune_is_not_the_best(done):
    results = Results.load(done)
    text = table(results)
    assert "dart 90%: left out" in text
    for best in results.best:
        rows = [r for r in results.rows if r.task == best.task and r.budget == best.budget]
        assert best.lead == pytest.approx(
            max(r.accuracy for r in rows) - next(r.accuracy for r in rows if r.method == "fitprune"), abs=2e-6
        )
        assert ("NOT the best" in verdict(best)) == (best.lead > 0 and not best.cannot_tell)
        assert ("cannot tell" in verdict(best)) == best.cannot_tell
        assert verdict(best) in text


def test_two_runs_give_the_same_bytes(done, stats, tmp_path):
    out = tmp_path / "results.json"
    assert main(command(stats, out, "--timed-batches", "1")) == 0
    assert out.read_bytes() == done.read_bytes()
    assert out.with_suffix(".samples.jsonl").read_bytes() == done.with_suffix(".samples.jsonl").read_bytes()
    timings = json.loads(out.with_suffix(".timings.json").read_text())
    assert [row["method"] for row in timings["rows"]][:2] == ["dense", "fitprune"]
    assert timings["rows"][0]["prefill_ratio"] == timings["rows"][0]["decode_ratio"] == 1
    timed = Results.load(out)
    assert "decode" in table(timed)
    write_report(timed, tmp_path / "r.html")
    for text in (table(timed), timed._repr_html_(), (tmp_path / "r.html").read_text()):
        assert "below 1.00x is faster" in text


@pytest.mark.parametrize("whole_lines", [True, False])
def test_a_run_killed_at_half_goes_on_and_gives_the_same_bytes(whole_lines, done, stats, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    journal = out.with_suffix(".samples.jsonl")
    answer, answered = evaluation.answer_batch, []

    def dies_at_the_third_batch(*args):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(1)
        return answer(*args)

    monkeypatch.setattr(evaluation, "answer_batch", dies_at_the_third_batch)
    assert main(command(stats, out)) == 1
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not out.exists()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 10
    if not whole_lines:  # killed in the middle of a write
        journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:37])
    monkeypatch.setattr(evaluation, "answer_batch", lambda *args: answered.append(2) or answer(*args))
    assert main(command(stats, out)) == 0
    assert answered.count(2) == (4 if whole_lines else 5)  # 6 batches: those that were whole are not done again
    assert out.read_bytes() == done.read_bytes()
    assert journal.read_bytes() == done.with_suffix(".samples.jsonl").read_bytes()
    monkeypatch.setattr(evaluation, "answer_batch", None)  # a finished run has nothing left to answer
    assert main(command(stats, out)) == 0
    assert out.read_bytes() == done.read_bytes()


def test_two_processes_give_the_same_bytes(done, stats, tmp_path):
    out = tmp_path / "results.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # As many threads as here: on some processors (AMX) sums depend on how they are split.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = [*launcher, "-m", "fitprune.cli.main", *command(stats, out)]
    ended = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("digit-scenes/test, 12 questions") == 1  # one process speaks
    assert json.loads(out.read_text()) == json.loads(done.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.samples.jsonl"]


def test_damaged_records_are_made_again(done, stats, tmp_path):
    out = tmp_path / "results.json"
    lines = done.with_suffix(".samples.jsonl").read_text().splitlines()
    record = json.loads(lines[4])
    del record["said"]["dense"]
    lines[4] = json.dumps(record)
    lines[7] = "garbage"
    out.with_suffix(".samples.jsonl").write_text("\n".join(lines) + "\n")
    assert main(command(stats, out)) == 0
    assert out.read_bytes() == done.read_bytes()


def test_answers_belong_to_their_images_and_scorers(tmp_path):
    model, processor = loaded()
    samples = load_samples(assets.folder("test"), samples=2)
    keeps = PruningRecipe((0.3,) * 8, adapt(model).fingerprint, 144)
    options = {"journal": tmp_path / "j", "timed_batches": 0}
    evaluate(model, processor, samples, [Entry("a", keeps)], **options)
    with pytest.raises(ValueError, match="other entries"):
        evaluate(
            model, processor, samples, [Entry("a", dataclasses.replace(keeps, scorer={"name": "self"}))], **options
        )
    other = [dataclasses.replace(samples[0], image=samples[1].image), samples[1]]
    with pytest.raises(ValueError, match="other tasks"):
        evaluate(model, processor, other, [Entry("a", keeps)], **options)
    missing = [samples[0], dataclasses.replace(samples[1], image=tmp_path / "none.jpg")]
    with pytest.raises(ValueError, match="does not exist"):  # before the first answer
        evaluate(model, processor, missing, [], timed_batches=0)


def test_the_padding_side_of_the_tokenizer_changes_nothing():
    model, processor = loaded()
    samples = load_samples(assets.folder("test"), samples=6)
    rows = []
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        rows.append(evaluate(model, processor, samples, {}, batch_size=6, timed_batches=0).rows)
    assert rows[0] == rows[1]


def test_recipes_from_their_files_give_what_the_methods_give(stats, tmp_path):
    model, processor = loaded()
    samples = load_samples(assets.folder("test"), samples=3)
    solved, skipped = entries_for(list(BASELINES), Fitter(AttentionStats.load(stats)), [0.6], seeds=(5, 6))
    assert skipped == []
    for number, entry in enumerate(solved):
        entry.recipe.save(tmp_path / f"{number}.json")
    files = [PruningRecipe.load(tmp_path / f"{number}.json") for number in range(len(solved))]
    options = {"batch_size": 2, "timed_batches": 0, "examples": 1}
    expected = evaluate(model, processor, samples, solved, **options)
    again = [dataclasses.replace(entry, recipe=recipe) for entry, recipe in zip(solved, files, strict=True)]
    assert evaluate(model, processor, samples, again, **options) == expected
    named = evaluate(model, processor, samples, {e.label: r for e, r in zip(solved, files, strict=True)}, **options)
    assert named.answers == expected.answers
    assert named.examples[0]["layers_entered"] == {
        **named.examples[0]["layers_entered"], **expected.examples[0]["layers_entered"]
    }  # fmt: skip
    for name, baseline in BASELINES.items():
        scorer = expected.recipes[f"{name} 60%"].get("scorer", {"name": "fitprune"})
        assert scorer == {"name": baseline.scorer, **({"parameters": {"seed": 5}} if baseline.seeded else {})}


def test_random_draws_anew_for_each_sample_of_one_question():
    model, processor = loaded()
    samples = [load_samples(assets.folder("test"))[0]] * 4
    sizes, budget = Sizes(adapt(model).fingerprint, 144), checked_budget("flops_reduction", 0.5)
    drawn = [make_method("random-input", sizes, budget, seed=seed) for seed in (0, 1)]
    entries = [Entry("r", recipe, 0.5, seed) for seed, recipe in enumerate(drawn)]
    results = evaluate(model, processor, samples, entries, timed_batches=0, examples=4)
    kept = [tuple(example["layers_entered"]["r 50% seed 0"]) for example in results.examples]
    assert len(set(kept)) == 4
    with pytest.raises(ValueError, match="seed=1: the recipe of 'r' draws by seed 0"):
        Entry("r", drawn[0], 0.5, 1)


def test_logits_that_are_nan_are_told():
    model, processor = loaded()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"dense: logits of sample \S+ are NaN in torch.float32"):
        evaluate(model, processor, load_samples(assets.folder("test"), samples=1), {}, timed_batches=0)


def test_times_of_an_older_run_are_not_shown(done, tmp_path):
    results = dataclasses.replace(Results.load(done), timings={"rows": []})
    results.save(tmp_path / "a-0.6.json")
    assert {p.name for p in tmp_path.iterdir()} == {"a-0.6.json", "a-0.6.timings.json"}
    assert Results.load(tmp_path / "a-0.6.json").timings == {"rows": []}
    dataclasses.replace(results, skipped=(), timings={}).save(tmp_path / "a-0.6.json")
    assert Results.load(tmp_path / "a-0.6.json").timings == {}
    assert beside("run-0.6", "x") != beside("run-0.7", "x")


def test_a_journal_of_another_run_is_refused_and_kept(done, stats, tmp_path, capsys):
    out = tmp_path / "results.json"
    before = done.with_suffix(".samples.jsonl").read_bytes()
    out.with_suffix(".samples.jsonl").write_bytes(before)
    assert main(command(stats, out, "--max-new-tokens", "3")) == 2
    assert "holds results of another run (other max_new_tokens)" in capsys.readouterr().err
    assert out.with_suffix(".samples.jsonl").read_bytes() == before
    out.with_suffix(".samples.jsonl").write_text("something else\n")
    assert main(command(stats, out)) == 2
    assert "is no journal of this program" in capsys.readouterr().err


def test_methods_without_answers_or_with_wrong_names(stats, tmp_path, capsys):
    out = tmp_path / "r.json"
    base = ["evaluate", "digit-scenes", "--data", "digit-scenes/test", "--samples", "2", "-o", str(out)]
    cases = [
        (["--methods", "fitprune"], "--flops-reduction is missing"),
        (["--flops-reduction", "0.5"], "--stats is missing"),
        (["--methods", "best", "--flops-reduction", "0.5", "--stats", stats], "method 'best': must be one of"),
        (["--methods", "fastv", "fastv", "--flops-reduction", "0.5", "--stats", stats], "fastv is passed twice"),
        (["--flops-reduction", "50", "--stats", stats], "a fraction, not percent"),
        (["--methods", "fastv:k=99", "--flops-reduction", "0.5", "--stats", stats], "must be from 1 to 7"),
        (["--flops-reduction", "0.5", "--stats", stats, "--data", "digit-scenes/test", "digit-scenes/test"], "twice"),
    ]
    for more, message in cases:
        assert main([*base, *more]) == 2, more
        assert message in capsys.readouterr().err
        assert not out.exists()
    for more in (["--seeds", "-1"], ["--timed-batches", "-3"], ["--examples", "-1"]):
        with pytest.raises(SystemExit) as caught:
            main([*base, *more])
        assert caught.value.code == 2
        assert f"argument {more[0]}: '{more[1]}': must be an integer of at least 0" in capsys.readouterr().err


def test_evaluate_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="samples is empty"):
        evaluate(*loaded(), [], {})
    model, processor = loaded()
    samples = load_samples(assets.folder("test"), samples=2)

    keeps = PruningRecipe.dense(adapt(model).fingerprint, 144)
    with pytest.raises(ValueError, match="'dense' twice"):
        evaluate(model, processor, samples, {"dense": keeps})
    with pytest.raises(ValueError, match="'a' twice"):
        evaluate(model, processor, samples, [Entry("a", keeps), Entry("a", keeps)])
    with pytest.raises(ValueError, match="is of another model"):
        evaluate(model, processor, samples, {"other": PruningRecipe.published("llava-1.5-7b", 60)})
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, processor, samples, {}, batch_size=0)


def loaded():

    source = assets.folder("model")
    return AutoModelForImageTextToText.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)


def test_data_without_answers_has_agreement_and_no_accuracy(tmp_path):

    model, processor = loaded()
    samples = [dataclasses.replace(s, answers=()) for s in load_samples(assets.folder("test"), samples=3)]
    recipe = PruningRecipe((0.3,) * 8, adapt(model).fingerprint, 144)
    results = evaluate(model, processor, samples, {"a": recipe}, timed_batches=0)
    row = results.row("a")
    assert (row.accuracy, row.accuracy_interval, row.relative_accuracy, row.accuracy_by_kind) == (None, None, None, {})
    assert row.agreement is not None
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").rows == results.rows
    assert "-" in table(results)


def test_entries_state_what_was_left_out(stats):

    entries, skipped = entries_for(["dart", "random"], Fitter(AttentionStats.load(stats)), [0.5, 0.95], seeds=(3, 4))
    assert [entry.label for entry in entries] == [
        "dart 50%", "random 50% seed 3", "random 50% seed 4", "random 95% seed 3", "random 95% seed 4",
    ]  # fmt: skip
    assert skipped == [{"method": "dart", "budget": 0.95, "reason": skipped[0]["reason"]}]
    assert "at most" in skipped[0]["reason"]


def test_the_report_needs_nothing_else_and_tells_everything(done, tmp_path):
    out = tmp_path / "report.html"
    assert main(["report", str(done), "-o", str(out)]) == 0
    page, results = out.read_text(), Results.load(done)
    for outside in ("src='http", 'src="http', "href='http", "@import", "<link", "url("):
        assert outside not in page
    changed = {record["id"] for record in records(done) if len(set(record["said"].values())) > 1}
    assert page.count("<li data-by=") >= len(changed) > 0
    for best in results.best:
        assert verdict(best) in page
    assert page.count("data:image/png;base64,") == 3  # each picture once, however many tiles show it
    assert "dart 90%" in page
    assert results.provenance["weights"] in page
    assert "NaN" not in page
    assert main(["report", str(done), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page
    shorter = tuple(dataclasses.replace(row, figures={"a": 1, "b": "x"}) for row in results.rows)
    for damage in ({"rows": results.rows[1:2]}, {"recipes": []}, {"examples": ({},)}, {"rows": shorter}):
        with pytest.raises(ValueError, match="the results are damaged"):
            write_report(dataclasses.replace(results, **damage), out)
    assert out.read_text() == page
    odd = dataclasses.replace(results.rows[1], method=r"a$\foo_{$")
    write_report(dataclasses.replace(results, rows=(*results.rows, odd)), out)
