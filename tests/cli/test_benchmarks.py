"""`fitprune benchmarks`: what there is, and what is found."""

import pytest

from fitprune.benchmarks import table
from fitprune.cli.main import main
from helpers.benchmarks import UPLOAD, make_pope, make_toy, toy


@pytest.fixture
def shown(capsys):
    def run(*options):
        assert main(["benchmarks", *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for each in (toy(), toy(name="closed", score=None, upload=UPLOAD)):
        monkeypatch.setitem(table.BENCHMARKS, each.name, each)


def test_every_benchmark_is_listed_with_what_it_needs(shown):
    said, words = shown(), " ".join(shown().split())
    assert all(f"\n{name} " in said for name in table.BENCHMARKS)
    assert "scored here; needs questions, random, popular, adversarial, images" in words
    assert "not scored here, upload file for the server; needs questions, more (optional)" in words
    assert "playground/data/eval is not there: --data-root FOLDER" in said


def test_a_root_shows_what_is_there(shown, tmp_path):
    make_pope(tmp_path)
    make_toy(tmp_path)
    words = " ".join(shown("--data-root", str(tmp_path)).split())
    assert "12 questions; scored here; found questions, random, popular, adversarial; missing images" in words
    assert "4 questions; not scored here, upload file for the server; found questions; missing more (optional)" in words
    (tmp_path / "toy/questions.jsonl").write_text("{")
    (tmp_path / "pope/llava_pope_test.jsonl").unlink()
    words = " ".join(shown("--data-root", str(tmp_path)).split())
    assert f"toy Toy test accuracy broken: {tmp_path}/toy/questions.jsonl:1: not JSON" in words
    assert "scored here; found random, popular, adversarial; missing questions, images" in words


@pytest.mark.parametrize("columns", ["40", "80", "100", "200"])
def test_lines_are_of_80_to_120_columns(shown, tmp_path, monkeypatch, columns):
    make_pope(tmp_path)
    monkeypatch.setenv("COLUMNS", columns)
    for options in ([], ["--data-root", "."]):
        assert max(map(len, shown(*options).splitlines())) <= min(max(int(columns), 110), 120)


def test_a_name_shows_every_place(shown, tmp_path):
    assert shown("Plaything", "closed").startswith(
        "toy\n"
        "  title        Toy test\n"
        "  figure       accuracy; at most 100; scored here\n"
        "  answers      of at most 128 tokens\n"
        "  other names  plaything\n"
        "  questions\n"
        "    toy/questions.jsonl\n"
        "    toy/other.jsonl\n"
        "  more, optional\n"
        "    toy/more\n"
        "\n"
        "closed\n"
    )
    make_toy(tmp_path)
    said = shown("toy", "--data-root", ".")
    assert "  title        Toy test, 4 questions\n" in said
    assert "    found  toy/questions.jsonl\n    -      toy/other.jsonl\n" in said


def test_wrong_use_is_one_line(capsys):
    for command, code, message in [
        (["nonsense"], 2, "'nonsense': no such benchmark"),
        (["toy", "toy"], 2, "toy is passed twice"),
        (["--data-root", "none"], 1, "data root none is no folder"),
    ]:
        assert main(["benchmarks", *command]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_folder_that_may_not_be_read_does_not_end_the_list(shown, tmp_path, monkeypatch):
    real = type(tmp_path).exists

    def exists(path):
        if path.parts[-2:-1] == ("gqa",):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    make_pope(tmp_path)
    monkeypatch.setattr(type(tmp_path), "exists", exists)
    words = " ".join(shown("--data-root", str(tmp_path)).split())
    assert "broken: [Errno 13] Permission denied:" in words
    assert "12 questions" in words
