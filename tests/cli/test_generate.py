"""`fitprune generate`."""

import os
import re
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


def test_the_dense_answer_is_printed_beside_with_what_both_took(made, tmp_path, capsys):
    recipe = str(made / "recipes" / "flops_reduction-0.8.json")
    words = ["generate", "digit-scenes", "--recipe", recipe, "--image", "digit-details/test/images/0000.jpg"]
    words += ["--question", "What is the number?", "--dense", "--picture", str(tmp_path / "kept.svg")]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["dense", "pruned"]
    assert lines[2] in ("(the same answer)", "(the answers differ)")
    cells = {name: rest for name, *rest in (re.split("  +", line) for line in lines[5:9])}
    dense, pruned = cells["visual tokens at the end"]
    assert int(pruned) < 30 < int(dense) == 144
    bytes_of = {"kB": 1e3, "MB": 1e6}
    dense, pruned = (float(n) * bytes_of[unit] for n, unit in map(str.split, cells["KV cache"]))
    assert pruned < 0.5 * dense
    assert list(cells)[2:] == ["time to first token", "time for each further one"]
    assert lines[-1] == str(tmp_path / "kept.svg")
    assert "dense: " in (tmp_path / "kept.svg").read_text()


def test_a_picture_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    words = ["generate", "nowhere", "--image", "x.jpg", "--question", "?", "--picture"]
    assert main([*words, str(tmp_path / "kept.webp")]) == 2
    assert "must end in .gif" in capsys.readouterr().err
