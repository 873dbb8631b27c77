"""The command line as a contract: names, exit codes, one-line errors, and the whole way on the embedded model."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

import fitprune.cli.main
from fitprune import AttentionStats, LatencyProfile, PruningRecipe, analyze
from fitprune._support import assets, files
from fitprune.analysis import save
from fitprune.cli.main import main
from fitprune.evaluation.report import write_report
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import Row

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
        code = "import sys; from fitprune.cli.main import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "example:" in done.stdout
        assert time.perf_counter() - started < 5  # catches an import of torch; the 0.3 s are shown by a benchmark
        assert "torch" not in done.stderr


def test_neither_help_nor_import_nor_cost_loads_torch():
    code = (
        "import sys, fitprune, fitprune.cli.main\n"
        "fitprune.cli.main.main(['cost', 'llava-1.5-7b:60'])\n"
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
    image = str(assets.folder("test") / "images" / "0000.jpg")
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
    image = str(assets.folder("test") / "images" / "0000.jpg")
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
        (
            [*generate[:-1], "a <image> b", "--recipe", recipe, "--image", image],
            "error: question 'a <image> b' contains the image token",
        ),
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


@pytest.fixture(scope="module")
def kinds(made, tmp_path_factory):
    """A file of each kind: what it is called -> path."""
    folder = tmp_path_factory.mktemp("kinds")
    recipe = PruningRecipe.published("llava-1.5-7b", 60)
    recipe.save(folder / "recipe.json")
    shutil.copy(made / "stats.safetensors", folder / "stats.safetensors")
    figures = (1, 4, 1.0, (0.9, 1.0), 1.0, (1.0, 1.0), 1.0, 0.0, {}, 0.0, 1.0, 16.0, 16.0, 100.0)
    results = Results((Row("t", "dense", None, *figures),), timings={"rows": []})
    results.save(folder / "results.json")
    write_report(results, folder / "page.html")
    LatencyProfile(recipe.model, (16, 2000), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), 1.0, 576, 64).save(folder / "p.json")
    save.save(analyze(AttentionStats.load(made / "stats.safetensors"), resamples=2), folder / "analysis")
    (folder / "times.json").write_text(json.dumps({"model": "m", "device": "cpu", "torch": "2", "timings": []}))
    (folder / "answers.jsonl").write_text(json.dumps({"run": {"model": "m"}}) + "\n")
    Image.new("RGB", (4, 4)).save(folder / "image.jpg")
    (folder / "notes.txt").write_text("my notes")
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "empty").write_text("")
    return {kind: folder / name for kind, name in KINDS.items()}


KINDS = {
    "a recipe": "recipe.json",
    "statistics": "stats.safetensors",
    "results": "results.json",
    "a report": "page.html",
    "a latency profile": "p.json",
    "an analysis": "analysis/analysis.json",
    "times of a benchmark": "times.json",
    "a journal of answers": "answers.jsonl",
    "times of an evaluation": "results.timings.json",
    "an image": "image.jpg",
    "no file of fitprune": "notes.txt",
    "no file of fitprune, but JSON": "other.json",
}
FOREIGN = list(KINDS)[-2:]


def test_every_kind_of_file_is_known_by_its_content(kinds, made, tmp_path):
    for kind, path in kinds.items():
        same = shutil.copy(path, tmp_path / "renamed")
        assert files.kind_of(same) == (None if kind in FOREIGN else kind)
    assert files.kind_of(tmp_path) == "a folder"
    assert files.kind_of(assets.folder("model") / "model.safetensors") == "a safetensors file"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["cost", "FILE"], "a recipe"),
        (["generate", "digit-scenes", "--image", "x.png", "--question", "q", "--recipe", "FILE"], "a recipe"),
        (["fit", "FILE", "--flops-reduction", "0.5", "-o", "OUT"], "statistics"),
        (["analyze", "FILE", "-o", "OUT"], "statistics"),
        (["report", "FILE", "-o", "OUT"], "results"),
        (["fit", "STATS", "--prefill-latency-reduction", "0.1", "--profile", "FILE", "-o", "OUT"], "a latency profile"),
    ],
    ids=["cost", "generate", "fit", "analyze", "report", "profile"],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(kinds, tmp_path, capsys, command, wanted, kind):
    if kind == wanted:
        return
    places = {"FILE": str(kinds[kind]), "OUT": str(tmp_path / "out"), "STATS": str(kinds["statistics"])}
    assert main([places.get(word, word) for word in command]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(kinds[kind]) in said
    if kind not in FOREIGN:
        assert f"is {kind}: must be {wanted}, made by 'fitprune " in said
    else:
        assert "codec" not in said
        assert "JSON" in said or "format" in said or "schema" in said or "truncated or foreign" in said


WRITERS = {
    "statistics": ["measure", "/no-such-model", "--data", "digit-scenes/test", "-o", "FILE"],
    "a recipe": ["fit", "STATS", "--flops-reduction", "0.5", "-o", "FILE"],
    "results": ["evaluate", "/no-such-model", "--data", "digit-scenes/test", "-o", "FILE"],
    "a report": ["report", "RESULTS", "-o", "FILE"],
    "a latency profile": ["profile", "/no-such-model", "-o", "FILE"],
    "times of a benchmark": ["benchmark", "/no-such-model", "--recipe", "llava-1.5-7b:60", "-o", "FILE"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made_kind", WRITERS)
def test_an_output_replaces_its_own_kind_alone(kinds, tmp_path, capsys, made_kind, kind):
    out = tmp_path / "file"
    before = kinds[kind].read_bytes()
    out.write_bytes(before)
    places = {"FILE": str(out), "STATS": str(kinds["statistics"]), "RESULTS": str(kinds["results"])}
    command = [places.get(word, word) for word in WRITERS[made_kind]]
    code = main(command)
    said = capsys.readouterr()
    if kind != made_kind:
        shown = "no file of fitprune" if kind in FOREIGN else kind
        assert f"file is {shown}: choose another output for {made_kind}, or pass --overwrite" in said.err
        assert code == 2
        assert out.read_bytes() == before
        assert list(tmp_path.iterdir()) == [out]
        code = main([*command, "--overwrite"])
        said = capsys.readouterr()
    # What needs no model was made; the others came as far as the model.
    if made_kind in ("a recipe", "a report"):
        assert code == 0
        assert "which replaced the one there" in said.out
    else:
        assert "/no-such-model" in said.err
        assert out.read_bytes() == before


def test_a_new_or_empty_file_is_not_called_replaced(kinds, tmp_path, capsys):
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "new.json"):
        command = ["fit", str(kinds["statistics"]), "--flops-reduction", "0.5", "-o", str(tmp_path / name)]
        assert main(command) == 0
        assert "replaced" not in capsys.readouterr().out


def test_a_folder_that_holds_other_things_is_not_written_into(kinds, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "removals.csv").write_text("my own")
    fit = ["fit", str(kinds["statistics"]), "--flops-reduction"]
    shape = ["analyze", str(kinds["statistics"]), "--no-pictures", "--resamples", "2", "-o"]
    cases = [
        ([*fit, "0.5", "-o", f"{tmp_path}/mine"], "mine holds other files, such as removals.csv: write"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/mine"], "removals.csv"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/a.json"], "2 budgets make a file each: name a folder"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/a.json", "--overwrite"], "name a folder"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/mine/removals.csv"], "removals.csv is a file: name a folder"),
        ([*shape, f"{tmp_path}/mine"], "mine holds other files, such as removals.csv: name another folder"),
        ([*shape, f"{tmp_path}/mine/removals.csv"], "removals.csv is a file"),
    ]
    for command, message in cases:
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert [p.name for p in tmp_path.rglob("*")] == ["mine", "removals.csv"]
    assert main([*fit, "0.5", "-o", f"{tmp_path}/mine/"]) == 0  # meant as a folder
    assert main([*shape, f"{tmp_path}/mine", "--overwrite"]) == 0
    assert main([*shape, f"{tmp_path}/new"]) == 0
    assert "replaced" not in capsys.readouterr().out
    assert main([*shape, f"{tmp_path}/new"]) == 0
    assert "which replaced the one there" in capsys.readouterr().out


def test_the_demo_refuses_a_folder_with_files_of_its_names(tmp_path, capsys):
    (tmp_path / "results.json").write_text("my own")
    assert main(["demo", "--quick", "-o", str(tmp_path)]) == 2
    assert "results.json is no file of fitprune" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["mesure"], "'mesure': must be one of measure, fit, cost, .*; did you mean measure?"),
        (["fit"], "required: STATS, -o/--output; and one of --flops-reduction, --kv-cache-reduction, "),
        (["fit", "s", "-o", "r", "--flops-reducton", "0.5"], "one of .*; did you mean --flops-reduction?"),
        (["cost", "r", "--text-token=5", "--crop"], "argument --crops: expected one argument"),
        (["cost", "r", "--txt-tokens=5"], "unknown: --txt-tokens=5; did you mean --text-tokens?"),
        (["measure", "m", "--data", "d", "-o", "s", "--dtype", "float23"], "'float23': .*; did you mean float32?"),
        (["fit", "s", "--flops-reduction", "0.5", "-o", ""], "argument -o/--output: '': must be the name of a file"),
        (["cost", "r", "more"], "unknown: more; see 'fitprune cost --help'"),
        (["cost", "r", "--visual-tokens", "10,000"], "'10,000': must be an integer of at least 1 "),
    ],
)  # fmt: skip
def test_a_wrong_call_is_answered_in_one_line_with_what_was_meant(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("fitprune: error: ")
    assert "--help'" in said
    for part in message.split(".*"):
        assert part in said, said


TEMPLATE = ["--prompt-template", r"USER: <image>\n\t{question}"]


@pytest.mark.parametrize(
    "command",
    [
        ["measure", "m", "--data", "d", "-o", "s"],
        ["fit", "s", "--flops-reduction", "0.5", "-o", "r"],
        ["generate", "m", "--image", "i", "--question", "q"],
        ["evaluate", "m", "--data", "d", "-o", "r"],
        ["profile", "m", "-o", "p"],
        ["benchmark", "m"],
    ],
    ids=lambda command: command[0],
)
def test_a_template_on_the_command_line_has_its_escapes_read(monkeypatch, command):
    read = []
    monkeypatch.setattr(fitprune.cli.main, f"_{command[0]}", lambda args: read.append(args.prompt_template))
    assert main([*command, *TEMPLATE]) == 0
    assert read == ["USER: <image>\n\t{question}"]


def test_the_picture_of_generates_example_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    words = shlex.split(capsys.readouterr().out.split("example:")[1])
    assert os.path.isfile(words[words.index("--image") + 1])


def test_python_m_fitprune_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fitprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fitprune ")
    done = subprocess.run([sys.executable, "-m", "fitprune", "cost"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "see 'fitprune cost --help'" in done.stderr


def test_cost_of_a_folder_names_the_recipes_in_it(made, tmp_path, capsys):
    assert main(["cost", str(made / "recipes")]) == 1
    said = capsys.readouterr().err
    assert "has no fitprune_recipe.json; name one of its recipes: flops_reduction-0.5.json, flops_reduction" in said
    assert main(["cost", str(tmp_path)]) == 1
    assert "name one" not in capsys.readouterr().err


def test_cost_says_of_a_scorer_that_it_is_unknown(made, tmp_path, capsys):
    data = json.loads((made / "recipes" / "flops_reduction-0.5.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(data | {"scorer": {"name": "os.system"}}))
    assert main(["cost", str(tmp_path / "r.json")]) == 0
    assert "ranked by           os.system, which no model can be pruned by: " in capsys.readouterr().out


def test_cost_states_small_models_with_digits_and_units(made, capsys):
    assert main(["cost", str(made / "recipes" / "flops_reduction-0.5.json")]) == 0
    said = capsys.readouterr().out
    assert " GFLOPs against " in said
    assert " kB against " in said
    assert main(["cost", "llava-1.5-7b:60"]) == 0
    assert "prefill             4.37 TFLOPs against 8.91 TFLOPs dense (-51.0%)" in capsys.readouterr().out


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "left", "text"),
    [
        (["measure", "m", "--data", "d", "-o", "OUT"], "OUT.parts/a.safetensors", "x"),
        (["evaluate", "m", "--data", "d", "-o", "OUT.json"], "OUT.samples.jsonl", '{"run": {}}\n{"place": 0}\n'),
        (["fit", "s", "--tolerance", "0.1", "-o", "OUT"], "OUT.search.jsonl", '{"run": {}}\n{"place": 0}\n'),
        (["convert-llava-hr", "s", "OUT"], "OUT/model-1.safetensors", "x"),
    ],
)  # fmt: skip
def test_going_on_is_promised_only_where_something_was_stored(tmp_path, capsys, monkeypatch, command, left, text):
    for name in ("_measure", "_evaluate", "_fit", "_convert_llava_hr"):
        # By its name, since a command knows itself by its function.
        monkeypatch.setattr(fitprune.cli.main, name, lambda args: interrupt())
    command = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    assert main(command) == 1
    assert capsys.readouterr().err == "fitprune: interrupted\n"
    stored = tmp_path / left.replace("OUT", "out")
    stored.parent.mkdir(exist_ok=True)
    if stored.suffix == ".jsonl":
        stored.write_text('{"run": {}}\n')
        assert main(command) == 1
        assert "again" not in capsys.readouterr().err
    stored.write_text(text)
    assert main(command) == 1
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err


def test_a_progress_bar_is_not_written_into_a_pipe(tmp_path):
    command = ["measure", "digit-scenes", "--data", "digit-scenes/test", "--samples", "1", "-o", f"{tmp_path}/s"]
    done = subprocess.run([sys.executable, "-m", "fitprune", *command], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr
    assert "batch" not in done.stderr
    assert "1 sample, 8 layers" in done.stdout


def test_a_spreadsheet_runs_no_formula_of_a_name(made, tmp_path):
    stats = AttentionStats.load(made / "stats.safetensors")
    names = {"=HYPERLINK(1)": stats.select(range(6)), "@b": stats.select(range(6, 12))}
    save.save(analyze(names, resamples=2), tmp_path)
    cells = [cell for row in csv.reader((tmp_path / "stability_over_data.csv").open()) for cell in row]
    assert {"'=HYPERLINK(1)", "'@b"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]


def test_what_needs_matplotlib_says_so_alike(kinds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    hint = "pictures need matplotlib: pip install matplotlib"
    assert main(["report", str(kinds["results"]), "-o", f"{tmp_path}/page.html"]) == 1
    assert capsys.readouterr().err == f"fitprune: error: {hint}\n"
    assert main(["analyze", str(kinds["statistics"]), "-o", f"{tmp_path}/a"]) == 1
    assert f"{hint}, or use --no-pictures" in capsys.readouterr().err
