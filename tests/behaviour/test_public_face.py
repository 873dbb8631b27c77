"""What `import fitprune` gives: every name is there, for type checkers too, and nothing heavy is imported for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fitprune

SOURCE = Path(fitprune.__file__)


@pytest.mark.parametrize("name", fitprune.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(fitprune, name) is not None


def test_type_checkers_see_the_same_names_in_the_same_places():
    tree = ast.parse(SOURCE.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    places = {
        alias.asname: node.module.removeprefix("fitprune.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert places == fitprune._HOMES
    assert set(fitprune.__all__) == {*places, "__version__"}


def test_no_name_hides_a_package():
    packages = {path.parent.name for path in SOURCE.parent.glob("*/__init__.py")}
    assert not packages & set(fitprune.__all__)


def test_names_that_went_are_unknown():
    for name in ("merge", "fit_output", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(fitprune, name)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, fitprune\n"
        "dir(fitprune)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
