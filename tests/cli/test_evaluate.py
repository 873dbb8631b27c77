"""`fitprune evaluate`."""

import json

from PIL import Image

from fitprune.cli.main import main


def test_evaluate_writes_results_with_dense_always(made, tmp_path, capsys):
    out = tmp_path / "results.json"
    recipes = [str(p) for p in sorted((made / "recipes").iterdir())]
    options = ["--data", "digit-scenes/test", "--samples", "16", "--recipe", *recipes, "-o", str(out)]
    assert main(["evaluate", "digit-scenes", *options]) == 0
    results = json.loads(out.read_text())
    assert [row["method"] for row in results["rows"]] == ["dense", "flops_reduction-0.5", "flops_reduction-0.8"]
    assert results["rows"][0]["agreement"] == 1
    assert len(out.with_suffix(".samples.jsonl").read_text().splitlines()) == 1 + 16
    assert out.with_suffix(".timings.json").exists()
    assert "agreement" in capsys.readouterr().out


def test_agreement_needs_no_answers(made, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "black.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "black.png", "text": "Is there a 7?"}))
    out = tmp_path / "r.json"
    recipe = str(made / "recipes" / "flops_reduction-0.5.json")
    assert main(["evaluate", "digit-scenes", "--data", f"{tmp_path}/q.jsonl", "--recipe", recipe, "-o", str(out)]) == 0
    assert json.loads(out.read_text())["rows"][1]["accuracy"] is None


def test_methods_that_need_no_statistics_run_without(made, tmp_path, capsys):
    options = ["--data", "digit-scenes/test", "--samples", "4", "--timed-batches", "0", "--examples", "0"]
    methods = ["--methods", "fastv", "divprune", "random-input", "--flops-reduction", "0.5", "--seeds", "3"]
    alone, with_stats = tmp_path / "alone.json", tmp_path / "with.json"
    assert main(["evaluate", "digit-scenes", *options, *methods, "-o", str(alone)]) == 0
    stats = ["--stats", str(made / "stats.safetensors")]
    assert main(["evaluate", "digit-scenes", *options, *methods, *stats, "-o", str(with_stats)]) == 0
    assert [row["method"] for row in json.loads(alone.read_text())["rows"]] == [
        "dense", "fastv", "divprune", "random-input"
    ]  # fmt: skip
    assert alone.read_bytes() == with_stats.read_bytes()
    capsys.readouterr()
    smaller = [*methods, "--visual-tokens", "72"]
    assert main(["evaluate", "digit-scenes", *options, *smaller, "-o", str(tmp_path / "smaller.json")]) == 0
    assert json.loads((tmp_path / "smaller.json").read_text())["rows"] != json.loads(alone.read_text())["rows"]


def test_all_leaves_out_methods_of_a_package_that_cannot_be_imported(made, tmp_path, plugins, capsys):
    plugins("fitprune.baselines", broken="nomodule:x")
    out = tmp_path / "r.json"
    options = ["--data", "digit-scenes/test", "--samples", "1", "--timed-batches", "0", "--examples", "0"]
    methods = ["--methods", "all", "--flops-reduction", "0.5", "--stats", f"{made}/stats.safetensors", "--seeds", "0"]
    assert main(["evaluate", "digit-scenes", *options, *methods, "-o", str(out)]) == 0
    (skipped,) = [each for each in json.loads(out.read_text())["skipped"] if each["method"] == "broken"]
    assert skipped["budget"] == 0.5
    assert "'nomodule:x' cannot be imported" in skipped["reason"]
    assert "'nomodule:x' cannot be imported" in capsys.readouterr().out
    assert main(["evaluate", "digit-scenes", *options, "--methods", "broken", *methods[2:], "-o", str(out)]) == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_fitted_counts_need_statistics_and_say_so_before_the_model_is_loaded(tmp_path, capsys):
    for methods in (["fitprune"], ["random"], ["all"], ["fastv", "random"]):
        command = ["evaluate", "/no-such-model", "--data", "digit-scenes/test", "--flops-reduction", "0.5"]
        assert main([*command, "--methods", *methods, "-o", str(tmp_path / "r.json")]) == 2
        assert "--stats is missing" in capsys.readouterr().err
