"""`make quick` leaves out what is slow, and nothing else: every package has a part in it."""

import ast
from pathlib import Path

import fitprune
from helpers.quick import SLOW

TESTS = Path(__file__).parents[1]


def functions(folder):
    """The names of a folder's test functions and test files."""
    files = sorted(folder.rglob("test_*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return {file.name for file in files}, {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_what_is_left_out_exists():
    files, names = functions(TESTS)
    assert SLOW - files - names == set()


def test_every_package_has_a_quick_test():
    """But `integrations`, whose tests need other programs; test_layout imports it."""
    packages = {path.parent.name for path in Path(fitprune.__file__).parent.glob("*/__init__.py")} - {"integrations"}
    quick = {
        path.name
        for path in TESTS.iterdir()
        if path.is_dir() and any(name.startswith("test_") and name not in SLOW for name in functions(path)[1])
    }
    assert packages - quick == set()
