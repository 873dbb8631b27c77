"""`fitprune generate`."""

import os
import shlex

import pytest

from fitprune._support import assets
from fitprune.cli.main import main


def test_generate_answers(made, capsys):
    image = str(assets.folder("test") / "images" / "0000.jpg")
    recipe = str(made / "recipes" / "flops_reduction-0.5.json")
    code = main(
        ["generate", "digit-scenes", "--recipe", recipe, "--image", image, "--question", "How many digits are there?"]
    )
    assert code == 0
    assert len(capsys.readouterr().out.strip()) > 0


def test_the_picture_of_generates_example_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    words = shlex.split(capsys.readouterr().out.split("example:")[1])
    assert os.path.isfile(words[words.index("--image") + 1])
