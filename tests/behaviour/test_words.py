"""Words that were retired: none of them comes back into the code, the pages or the README."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fitprune"

# Of prose, with what stands in their place.
RETIRED = {
    r"\btold\b": "say what is passed, to what",
    r"\bbehind\b": "after",
    r"\banew\b": "again",
    r"\brightly\b": "exactly, correctly",
    r"\bas ever\b": "as before",
    r"\bso many\b": "n, that number of",
    r"\bso long\b": "that time",
    r"\bstands? twice\b": "is listed twice",
    r"\bembedded\b": "bundled",
    r"\bstate exactly\b": "pass exactly",
    r"\bforgets?\b": "discards, deletes",
    r"\bdeed\b": "action",
    r"\bwords of\b": "answers of",
}
# Of names in the code: a participle does not say of what.
NAMES = {"told", "said", "given", "made", "held", "seen", "found", "came", "took", "asked", "meant", "shown", "heard"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(SOURCE.rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=named)
def test_no_retired_word(path):
    text = path.read_text()
    hits = [
        f"{number}: {line.strip()} ({better})"
        for number, line in enumerate(text.splitlines(), 1)
        for word, better in RETIRED.items()
        if re.search(word, line, re.IGNORECASE)
    ]
    assert hits == []


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_no_participle_as_a_name(path):
    tree = ast.parse(path.read_text())
    names = [(node.lineno, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [(node.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.arg)]
    names += [(node.lineno, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [(node.lineno, node.name) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [(line, name) for line, name in names if name.lstrip("_") in NAMES] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_lines_of_pages_are_short(path):
    """At most 120 characters, but for what cannot be broken: a row of a table, and what a program printed."""
    long, fence = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip().startswith("```"):
            fence = None if fence is not None else line.strip()[3:]
        if len(line) > 120 and not line.startswith("|") and fence != "":
            long.append(number)
    assert long == []
