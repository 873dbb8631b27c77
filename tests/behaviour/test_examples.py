"""The examples of extension: short, and at work from outside the package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fitprune

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("own_*.py"))


def named(path):
    return path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_an_example_has_less_than_thirty_lines_of_its_own(path):
    """Docstrings, comments and blank lines not counted."""
    text = path.read_text()
    documents = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            documents |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [
        line
        for number, line in enumerate(text.splitlines(), 1)
        if number not in documents and line.strip() and not line.strip().startswith("#")
    ]
    assert 0 < len(lines) < 30


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_an_example_runs_in_another_folder(path, tmp_path):
    """What it writes goes there; what it did, it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(fitprune.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
