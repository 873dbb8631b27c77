"""The command line as a contract: names, exit codes, one-line errors, help."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fitprune.cli.main
from fitprune import PruningRecipe
from fitprune._support import assets
from fitprune.cli import options
from fitprune.cli.main import GROUPS, main

COMMANDS = [module.__name__.rpartition(".")[2] for modules in GROUPS.values() for module in modules]
NAMES = [name.replace("_", "-") for name in COMMANDS]


def test_help_of_every_command_is_quick_and_shows_an_example():
    for command in [[], *[[name] for name in NAMES]]:
        started = time.perf_counter()
        code = "import sys; from fitprune.cli.main import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "120"},
        )
        assert done.returncode == 0
        assert "example:" in done.stdout
        assert time.perf_counter() - started < 5  # catches an import of torch; `benchmarks/start.py` shows the 0.3 s
        assert "torch" not in done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_lists_every_command_in_the_order_of_the_data(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name in shown if name in NAMES] == NAMES
    order = [
        "recipe",
        "measure",
        "fit",
        "search",
        "show",
        "cost",
        "push",
        "app",
        "generate",
        "serve",
        "evaluate",
        "report",
    ]
    assert NAMES[:12] == order


def test_a_signal_to_end_leaves_no_half_file(tmp_path):
    code = (
        "import sys, time\n"
        "from fitprune._support import files\n"
        "from fitprune.cli import main, report\n"
        "def run(args):\n"
        "    with files.replacing(args.output) as half:\n"
        "        print(half, flush=True)\n"
        "        time.sleep(60)\n"
        "report.run = run\n"
        f"sys.exit(main.main(['report', 'r.json', '-o', {str(tmp_path / 'r.html')!r}]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert Path(process.stdout.readline().strip()).exists()
        process.terminate()
        assert process.wait(20) == 143
    assert list(tmp_path.iterdir()) == []


def test_one_command_is_one_file():
    folder = Path(fitprune.cli.main.__file__).parent
    shared = {"__init__", "main", "options", "outputs", "parser"}
    assert {path.stem for path in folder.glob("*.py")} == {*COMMANDS, *shared}


def test_the_options_of_loading_are_those_of_load_model():
    from fitprune.families import loading, quantization

    assert tuple(options.DTYPES) == tuple(loading.DTYPES)
    assert tuple(options.QUANTIZATIONS) == tuple(quantization.QUANTIZATIONS)
    assert set(options.LOADING) <= set(inspect.signature(loading.load_model).parameters)


def test_help_needs_no_more_than_the_standard_library_and_recipes():
    code = (
        "import sys, fitprune.cli.main\n"
        "try: fitprune.cli.main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["fit", "s", "--tolerance", "0.5", "-o", "r", "--objective", "output"],
            "for output use 'fitprune search MODEL",
        ),
        (["fit", "s", "--objective=attention", "-o", "r"], "--objective"),
        (["profile", "--shape", "llava-1.5-7b", "-o", "p"], "--shape is now --random-model"),
        (["time", "--shape=llava-1.5-7b"], "--shape is now --random-model"),
        (["benchmark", "--random-model", "llava-1.5-7b"], "'fitprune benchmark' is now 'fitprune time'"),
        (["search", "m", "--prefill-latency-reduction", ".9"], "only 'fitprune recipe' and 'fitprune fit' have it"),
    ],
)
def test_an_option_that_was_renamed_names_the_new_one(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said


def test_neither_help_nor_import_nor_cost_loads_torch():
    code = (
        "import sys, fitprune, fitprune.cli.main\n"
        "fitprune.cli.main.main(['cost', 'llava-1.5-7b:60'])\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
        (["fit", stats, "--flops-reduction", "0.5", "0.5", "-o", here], "--flops-reduction: 0.5 is passed twice"),
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


FAULTY = "def key(): return {}['x']\ndef value(): raise ValueError('no')\ndef calls(f): f()\n"


@pytest.mark.parametrize(("function", "message"), [("key", "KeyError: 'x'"), ("value", "no")])
def test_what_a_plug_in_raises_is_one_line(plugins, monkeypatch, capsys, function, message):
    plugins("fitprune.scorers", FAULTY, faulty="stranger:key")
    stranger = importlib.import_module("stranger")
    monkeypatch.setattr("fitprune.cli.families.run", lambda args: getattr(stranger, function)())
    assert main(["families"]) == 1
    expected = f"fitprune: error: {message}; in a plug-in of the package stranger, --debug shows where\n"
    assert capsys.readouterr().err == expected
    with pytest.raises((KeyError, ValueError)):
        main(["families", "--debug"])

    def wrapped(args):
        try:
            stranger.key()
        except KeyError as error:
            raise ValueError("scorer 'faulty' failed") from error

    monkeypatch.setattr("fitprune.cli.families.run", wrapped)
    assert main(["families"]) == 1
    assert "scorer 'faulty' failed; in a plug-in of the package stranger" in capsys.readouterr().err


def test_a_fault_of_fitprunes_own_keeps_its_traceback(plugins, monkeypatch):
    """Also under a plug-in's frames, as hooks run under those of a model."""
    plugins("fitprune.families", FAULTY, faulty="stranger:calls")
    stranger = importlib.import_module("stranger")
    code = compile("def bug(): raise TypeError('ours')", "x", "exec")
    names = {"__name__": "fitprune.engine.x"}
    exec(code, names)
    for run in (lambda args: names["bug"](), lambda args: stranger.calls(names["bug"])):
        monkeypatch.setattr("fitprune.cli.families.run", run)
        with pytest.raises(TypeError, match="ours"):
            main(["families"])


def test_only_our_own_log_messages_are_shown_as_ours(monkeypatch, capsys):
    def run(args):
        logging.getLogger("fitprune.engine").warning("ours")
        logging.getLogger("torchao").warning("theirs")

    monkeypatch.setattr("fitprune.cli.families.run", run)
    for _ in range(2):
        assert main(["families"]) == 0
        said = capsys.readouterr().err
        assert said.count("fitprune: ours\n") == 1
        assert "fitprune: theirs" not in said


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["mesure"], "'mesure': must be one of recipe, measure, fit, .*; did you mean measure?"),
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
        ["search", "m", "--stats", "s", "--data", "d", "--flops-reduction", "0.5", "-o", "r"],
        ["recipe", "m", "--data", "d", "--flops-reduction", "0.5", "-o", "r"],
        ["generate", "m", "--image", "i", "--question", "q"],
        ["evaluate", "m", "--data", "d", "-o", "r"],
        ["profile", "m", "-o", "p"],
        ["time", "m"],
    ],
    ids=lambda command: command[0],
)
def test_a_template_on_the_command_line_has_its_escapes_read(monkeypatch, command):
    read = []
    module = importlib.import_module(f"fitprune.cli.{command[0]}")
    monkeypatch.setattr(module, "run", lambda args: read.append(args.prompt_template))
    assert main([*command, *TEMPLATE]) == 0
    assert read == ["USER: <image>\n\t{question}"]


def test_python_m_fitprune_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fitprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fitprune ")
    done = subprocess.run([sys.executable, "-m", "fitprune", "cost"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "see 'fitprune cost --help'" in done.stderr


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "left", "text"),
    [
        (["measure", "m", "--data", "d", "-o", "OUT"], "OUT.parts/a.safetensors", "x"),
        (["evaluate", "m", "--data", "d", "-o", "OUT.json"], "OUT.samples.jsonl", '{"run": {}}\n{"place": 0}\n'),
        (["search", "m", "--stats", "s", "--data", "d", "--tolerance", "0.1", "-o", "OUT"], "OUT.search.jsonl",
         '{"run": {}}\n{"place": 0}\n'),
        (["recipe", "m", "--data", "d", "--tolerance", "0.1", "-o", "OUT"],
         "OUT.stats.safetensors.parts/a.safetensors", "x"),
        (["recipe", "m", "--data", "d", "--tolerance", "0.1", "0.2", "-o", "OUT"],
         "OUT/stats.safetensors.parts/a.safetensors", "x"),
        (["convert-llava-hr", "s", "OUT"], "OUT/model-1.safetensors", "x"),
    ],
)  # fmt: skip
def test_going_on_is_promised_only_where_something_was_stored(tmp_path, capsys, monkeypatch, command, left, text):
    monkeypatch.setattr(importlib.import_module(f"fitprune.cli.{command[0].replace('-', '_')}"), "run", interrupt)
    command = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    assert main(command) == 1
    assert capsys.readouterr().err == "fitprune: interrupted\n"
    stored = tmp_path / left.replace("OUT", "out")
    stored.parent.mkdir(exist_ok=True, parents=True)
    if stored.suffix == ".jsonl":
        stored.write_text('{"run": {}}\n')
        assert main(command) == 1
        assert "again" not in capsys.readouterr().err
    stored.write_text(text)
    assert main(command) == 1
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err


def test_a_command_runs_where_its_output_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["families"]) == 0


def test_a_progress_bar_is_not_written_into_a_pipe(tmp_path):
    command = ["measure", "digit-scenes", "--data", "digit-scenes/test", "--samples", "1", "-o", f"{tmp_path}/s"]
    done = subprocess.run([sys.executable, "-m", "fitprune", *command], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr
    assert "batch" not in done.stderr
    assert "1 sample, 8 layers" in done.stdout


def test_it_runs_in_a_thread_that_is_not_the_main_one(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["families"])))
    thread.start()
    thread.join()
    assert codes == [0]
