"""The command line as a contract: names, exit codes, one-line errors, and the whole way on the embedded model."""

import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image

from fitprune import PruningRecipe, embedded
from fitprune.cli import main

COMMANDS = ["measure", "fit", "cost", "generate", "evaluate", "analyze", "report", "demo"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics and two recipes of the embedded model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    stats = str(folder / "stats.safetensors")
    options = ["--data", "digit-scenes/calibration", "--samples", "12", "--batch-size", "4"]
    assert main(["measure", "digit-scenes", *options, "-o", stats]) == 0
    assert main(["fit", stats, "--flops-reduction", "0.5", "0.8", "-o", f"{folder}/recipes"]) == 0
    return folder


def test_help_of_every_command_is_quick_and_shows_an_example():
    for command in [[], *[[c] for c in COMMANDS]]:
        started = time.perf_counter()
        code = "import sys; from fitprune.cli import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "example:" in done.stdout
        assert time.perf_counter() - started < 5  # catches an import of torch; the 0.3 s are shown by a benchmark
        assert "torch" not in done.stderr


def test_neither_help_nor_import_nor_cost_loads_torch():
    code = (
        "import sys, fitprune, fitprune.cli\n"
        "fitprune.cli.main(['cost', 'llava-1.5-7b:60'])\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_measure_and_fit_write_what_they_say(made):
    assert sorted(p.name for p in made.iterdir()) == ["recipes", "stats.safetensors"]
    names = sorted(p.name for p in (made / "recipes").iterdir())
    assert names == ["flops_reduction-0.5.json", "flops_reduction-0.8.json"]
    recipe = PruningRecipe.load(made / "recipes" / names[1])
    assert 0.8 <= recipe.cost().flops_reduction < 0.81
    assert recipe.provenance["samples"] == 12


@pytest.mark.parametrize(
    "budget",
    [
        ["--kv-cache-reduction", "0.5"],
        ["--mean-visual-tokens", "60"],
        ["--tolerance", "0.2"],
        ["--flops-reduction", "0.5", "--max-removal-layers", "2"],
    ],
)
def test_one_budget_makes_one_file(made, budget, tmp_path):
    out = tmp_path / "r.json"
    assert main(["fit", str(made / "stats.safetensors"), *budget, "-o", str(out)]) == 0
    PruningRecipe.load(out)


def test_a_measurement_that_stopped_at_a_bad_image_goes_on_after_the_repair(tmp_path, capsys):
    for number in range(4):
        Image.new("RGB", (96, 96), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("broken")
    lines = [{"question_id": n, "image": f"{n}.png", "text": "Is there a 7?"} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out" / "s.safetensors"
    command = ["measure", "digit-scenes", "--data", f"{tmp_path}/q.jsonl", "-o", str(out)]
    assert main(command) == 2
    assert "q.jsonl:3" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "s.safetensors.parts").iterdir())) == 2
    Image.new("RGB", (96, 96), (9, 9, 99)).save(tmp_path / "2.png")
    assert main(command) == 0
    assert [p.name for p in out.parent.iterdir()] == ["s.safetensors"]


def test_cost_of_a_file_and_of_a_published_recipe(made, capsys):
    assert main(["cost", str(made / "recipes" / "flops_reduction-0.5.json")]) == 0
    assert main(["cost", "llava-next-7b:60", "--visual-tokens", "1000", "--text-tokens", "50", "--crops", "5"]) == 0
    assert "visual FLOPs        -" in capsys.readouterr().out


def test_generate_answers(made, capsys):
    image = str(embedded.folder("test") / "images" / "0000.jpg")
    recipe = str(made / "recipes" / "flops_reduction-0.5.json")
    code = main(
        ["generate", "digit-scenes", "--recipe", recipe, "--image", image, "--question", "How many digits are there?"]
    )
    assert code == 0
    assert len(capsys.readouterr().out.strip()) > 0


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


def test_bad_use_exits_2_with_one_line(made, tmp_path, capsys):
    stats, recipe = str(made / "stats.safetensors"), str(made / "recipes" / "flops_reduction-0.5.json")
    (tmp_path / "foreign.safetensors").write_text("x")
    (tmp_path / "broken.jsonl").write_text("{")
    other = PruningRecipe.published("llava-1.5-7b", 60)
    other.save(tmp_path / "other.json")
    image = str(embedded.folder("test") / "images" / "0000.jpg")
    generate = ["generate", "digit-scenes", "--question", "x"]
    here = str(tmp_path)
    cases = [
        (["fit", stats, "--flops-reduction", "60", "-o", "x"], "a fraction, not percent"),
        (["fit", f"{here}/foreign.safetensors", "--flops-reduction", "0.5", "-o", "x"], "truncated or foreign"),
        (["measure", "digit-scenes", "--data", f"{here}/broken.jsonl", "-o", f"{here}/s"], "jsonl:1: not JSON"),
        (["cost", "llava-1.5-7b:61"], "must be one of"),
        (["fit", stats, "--flops-reduction", "0.5", "0.5", "-o", here], "states a budget twice"),
        (
            [
                "fit",
                stats,
                "--flops-reduction",
                "0.5",
                "--objective",
                "output",
                "--max-removal-layers",
                "2",
                "-o",
                here,
            ],
            "--max-removal-layers is for --objective attention",
        ),
        (["cost", "llava-1.5-7b"], "say which of its recipes"),
        ([*generate, "--recipe", recipe, "--image", image, "--device", "foo"], "device foo: unknown"),
        ([*generate, "--recipe", f"{here}/other.json", "--image", image], "another model"),
        ([*generate, "--recipe", recipe, "--image", recipe], "is not an image file"),
        ([*generate, "--recipe", recipe, "--image", image, "--prompt-template", "Q {question}"], "no visual token"),
        (
            ["evaluate", "digit-scenes", "--data", "digit-scenes/test", "--recipe", recipe, recipe, "-o", f"{here}/r"],
            "same name",
        ),
    ]
    for command, message in cases:
        assert main(command) == 2, command
        err = capsys.readouterr().err.strip().splitlines()
        assert message in err[-1], (command, err)
        assert err[-1].startswith("fitprune: error: ")
        assert "Traceback" not in "\n".join(err)


def test_failures_exit_1_with_one_line(made, tmp_path, capsys):
    stats = str(made / "stats.safetensors")
    (tmp_path / "file").write_text("")
    cases = [
        (["fit", f"{tmp_path}/none", "--flops-reduction", "0.5", "-o", "x.json"], "no such file"),
        (["fit", stats, "--flops-reduction", "0.5", "-o", f"{tmp_path}/file/x.json"], "choose another output path"),
        (["cost", f"{tmp_path}/none.json"], "none.json"),
        (["measure", "digit-scenes", "--data", f"{tmp_path}/none.jsonl", "-o", f"{tmp_path}/s"], "no such file"),
        (["measure", "digit-scenes", "--data", "digit-scenes/test", "-o", str(tmp_path)], "is a folder"),
        (["measure", f"{tmp_path}/no-model", "--data", "digit-scenes/calibration", "-o", f"{tmp_path}/s"], "no-model"),
    ]
    for command, message in cases:
        assert main(command) == 1, command
        err = capsys.readouterr().err.strip().splitlines()
        assert message in err[-1], (command, err)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["cost", f"{tmp_path}/none.json", "--debug"])


@pytest.mark.parametrize(
    "command", [["measure"], ["nonsense"], ["fit", "x", "-o", "y"], ["evaluate", "m", "--batch-size", "0"]]
)
def test_wrong_arguments_exit_2(command):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2


def test_a_full_disk_half_way_through_a_file_leaves_the_old_one(made, tmp_path):
    """A real limit on file size, hit in the middle of the write."""
    target = tmp_path / "stats.safetensors"
    target.write_text("old")
    code = (
        "import resource\n"
        "from fitprune import AttentionStats\n"
        f"stats = AttentionStats.load({str(made / 'stats.safetensors')!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    stats.save({str(target)!r})\n"
        "except OSError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "refused:" in done.stdout
    assert "nothing was changed" in done.stdout
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
