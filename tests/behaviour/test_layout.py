"""The library's layout, kept: packages import down one ladder, and importing them changes nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fitprune
from helpers import structure

SOURCE = Path(fitprune.__file__).parent


def test_a_package_imports_only_from_rungs_above_its_own():
    rung = {name: number for number, names in enumerate(structure.LADDER) for name in names}
    assert set(structure.rooms(SOURCE)) == set(rung)
    assert [(user, used) for user, used in sorted(structure.arrows(SOURCE)) if rung[used] >= rung[user]] == []


@pytest.mark.parametrize("package", sorted(path.parent.name for path in SOURCE.glob("*/__init__.py")))
def test_no_circle_inside_a_package(package):
    assert structure.circles(structure.arrows_inside(SOURCE / package, SOURCE)) == []


def test_a_long_file_is_named_in_the_design():
    page = (structure.ROOT / "docs" / "design.md").read_text()
    long = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if structure.lines([path]) > 300]
    assert [name for name in long if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_pages_show_the_tree_and_the_core_of_today(page):
    text = (structure.ROOT / page).read_text()
    assert structure.tree() in text
    assert text == structure.with_structure(text), "run `python tests/helpers/structure.py --write`"


def test_importing_every_module_changes_nothing_in_transformers():
    modules = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in sorted(SOURCE.rglob("*.py"))]
    needs = {"integrations.lmms_eval": "lmms_eval", "integrations.vllm": "vllm", "scoring.triton_kernels": "triton"}
    needs |= dict.fromkeys(("app.events", "app.launch", "app.layout", "app.style"), "gradio")
    missing = tuple(name for name, needed in needs.items() if importlib.util.find_spec(needed) is None)
    names = [
        name
        for name in modules
        if "__main__" not in name and (not name.startswith(missing) or name.startswith("integrations.lmms_eval_tasks"))
    ]
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
