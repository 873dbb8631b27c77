"""The library's layout, kept: a module imports only from layers above its own, and importing it changes nothing."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import fitprune

# docs/design.md explains the layers.
LAYERS = [
    {
        "tokens",
        "flops",
        "families",
        "files",
        "hub",
        "card",
        "diversity",
        "processes",
        "tables",
        "kernels",
        "host",
        "metrics",
        "embedded",
        "pictures",
    },
    {
        "recipe",
        "journal",
        "results",
        "attention",
        "selection",
        "stats",
        "calibration",
        "adapters",
        "models",
        "profiles",
    },
    {"merging", "shapes", "hooks", "batches", "cache", "images", "views", "vision", "lookup", "loading"},
    {"fitting", "scoring", "packing", "arguments", "rotary", "inputs"},
    {"measurement", "removal", "analysis"},
    {"pruning", "sequential", "analysis_files"},
    {"profiling", "divergence", "figures"},
    {"baselines", "summary", "benchmark", "analysis_figures", "head_choice"},
    {"evaluation", "output_fitting"},
    {"demo", "report"},
    {"cli", "integrations", "__init__"},
    {"__main__"},
]
SOURCE = Path(fitprune.__file__).parent


def units():
    """Each module, and each package as one, with its files."""
    modules = {path.stem: [path] for path in SOURCE.glob("*.py")}
    packages = {path.parent.name: sorted(path.parent.rglob("*.py")) for path in SOURCE.glob("*/__init__.py")}
    return {**modules, **packages}


def imports(path):
    tree = ast.parse(path.read_text())
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(node) for block in typing_only for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("fitprune"):
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_a_module_imports_only_from_layers_above_its_own():
    rank = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert set(units()) == set(rank)
    wrong = [
        (name, used)
        for name, files in units().items()
        for path in files
        for used in imports(path)
        if used in rank and used != name and rank[used] >= rank[name]
    ]
    assert wrong == []


def test_importing_every_module_changes_nothing_in_transformers():
    names = sorted(set(units()) - (set() if importlib.util.find_spec("triton") else {"kernels"}))
    code = (
        "from transformers import AttentionInterface\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry\n"
        "before = list(registry.keys())\n"
        f"import importlib\nfor name in {names}: importlib.import_module('fitprune.' + name)\n"
        "assert list(registry.keys()) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_anywhere():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in text
        assert "torch.load" not in text
        assert "torch.save" not in text
