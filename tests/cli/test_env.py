"""`fitprune env`: it never fails, and shows no path of the user's."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

import fitprune
from fitprune.cli import env
from fitprune.cli.main import main


def test_markdown_and_json_hold_the_same_facts(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| | |", "|---|---|"]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(facts)
    assert facts["fitprune"] == fitprune.__version__
    assert facts["torch"] == importlib.metadata.version("torch")
    assert {"matplotlib", "torchao", "bitsandbytes", "datasets", "peft"} <= set(facts)
    assert facts["vllm"] == "not installed" or facts["vllm"][0].isdigit()
    assert facts["plug-in for vLLM"] == "found"
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    assert env.environment()["plug-in for vLLM"].startswith("not loaded: VLLM_PLUGINS=none")
    assert "sdpa" in facts["attention implementations"]
    assert {f"entry points {group}" for group in env.GROUPS} <= set(facts)


def test_no_path_of_the_users_is_shown(capsys, monkeypatch):
    home = os.path.expanduser("~")

    def broken(name):
        raise ImportError(f"{home}/secret name/lib/x.so: cannot open '/mnt/jane/env/lib/y.so' (C:\\Users\\jane\\z.dll)")

    monkeypatch.setattr(importlib.metadata, "version", broken)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: broken(group))
    facts = env.environment()
    assert "cannot be found out: ImportError" in facts["numpy"]
    assert "cannot be found out: ImportError" in facts["entry points fitprune.scorers"]
    for part in ("jane", "mnt", "Users", home if len(home) > 1 else "secret name/"):
        assert part not in facts["numpy"]
    assert "y.so" in facts["numpy"]


@pytest.mark.parametrize("broken", ["torch", "transformers", "fitprune.scoring.triton_kernels"])
def test_it_works_whatever_is_missing_or_broken(broken):
    code = (
        "import sys\n"
        "from fitprune.cli.main import main\n"
        f"sys.modules[{broken!r}] = None\n"
        "sys.exit(main(['env', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["python"].endswith(".".join(map(str, sys.version_info[:3])))
    if broken in ("torch", "transformers"):
        assert "cannot be imported" in facts[broken]


def test_entry_points_are_named_with_their_package_and_a_broken_one_says_so(monkeypatch):
    class Point:
        def __init__(self, name, error=None):
            self.name, self.error = name, error
            self.dist = type("Dist", (), {"name": "other", "version": "1.2"})()

        def load(self):
            if self.error:
                raise self.error

    points = [Point("late"), Point("bad", ImportError("no module 'x'"))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "fitprune.scorers" else [])
    facts = env.environment()
    assert facts["entry points fitprune.scorers"] == (
        "late (other 1.2); bad (other 1.2, cannot be imported: ImportError: no module 'x')"
    )
    assert facts["entry points fitprune.families"] == "none"


def test_all_entry_points_are_shown_and_doubled_names_say_so(monkeypatch):
    points = [importlib.metadata.EntryPoint(f"name-{n % 40}", f"json:loads{n}", "fitprune.scorers") for n in range(41)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*points, points[5]])
    fact = env.environment()["entry points fitprune.scorers"]
    assert all(f"name-{n} (" in fact for n in range(40))
    assert fact.count("several have this name: uninstall all but one") == 2
    assert fact.count("name-5 (") == 1
