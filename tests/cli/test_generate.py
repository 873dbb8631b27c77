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


def test_the_example_of_generate_runs_wherever_it_is_typed(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    words = shlex.split(capsys.readouterr().out.split("example:")[1].replace("\\\n", ""))
    (tmp_path / "r.json").write_bytes((made / "recipes" / "flops_reduction-0.5.json").read_bytes())
    assert not any(map(os.path.isabs, words))
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()
