"""Curves of recipes."""

from xml.etree import ElementTree

import pytest

from fitprune import PruningRecipe
from fitprune._support import files
from fitprune.pictures.curve import curve_file


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_a_curve_is_a_file_that_is_known_again(tmp_path, ending):
    path = tmp_path / f"curve.{ending}"
    path.write_text(curve_file(path, PruningRecipe.named("llava-1.5-7b:60"), 576, "llava <60%>"))
    assert files.kind_of(path) == files.PICTURE
    assert "llava &lt;60%&gt;" in path.read_text()
    if ending == "svg":
        ElementTree.parse(path)


def test_another_ending_is_refused():
    with pytest.raises(ValueError, match=r"curve.png: must end in .svg or .html"):
        curve_file("curve.png", PruningRecipe.named("llava-1.5-7b:60"), 576, "")
