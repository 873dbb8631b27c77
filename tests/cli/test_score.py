"""`fitprune score`: figures of answers files, without a model."""

import json
import subprocess
import sys

import pytest

from fitprune.benchmarks import table
from fitprune.cli.main import main
from helpers.benchmarks import FOLDER, UPLOAD, answer, make_pope, make_toy, toy, write_lines


@pytest.fixture
def add(monkeypatch):
    """Make a benchmark known to the command."""
    return lambda benchmark: monkeypatch.setitem(table.BENCHMARKS, benchmark.name, benchmark)


@pytest.fixture
def pope(tmp_path):
    """A root; and the answers, all right but for two of the random category."""
    questions, labels = make_pope(tmp_path / "root")
    answers = [answer(entry["question_id"], label) for entry, label in zip(questions, labels, strict=True)]
    for place in (8, 9):
        answers[place] = answer(place + 1, "No" if labels[place] == "yes" else "Yes")
    return ["--data-root", str(tmp_path / "root")], answers


def error_of(command, capsys, code=2):
    assert main(command) == code, command
    *_, line = said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return line.removeprefix("fitprune: error: ")


def test_each_file_is_a_column_with_every_figure(tmp_path, pope, capsys):
    root, answers = pope
    good = write_lines(tmp_path / "good.jsonl", [{**entry, "text": "Yes"} for entry in answers])
    own, out = write_lines(tmp_path / "own.jsonl", answers), str(tmp_path / "scores.json")
    assert main(["score", "POPE", "--answers", own, good, *root, "-o", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "POPE: F1, mean of its categories"
    rows = {line[:22].strip(): line[22:].split() for line in lines[2:]}
    assert rows[""] == ["own", "good"]
    assert rows["questions"] == ["12", "12"]
    assert rows["F1"] == ["83.33", "66.67"]
    assert rows["random F1"] == ["50.00", "66.67"]
    assert rows["random yes"] == ["50.00", "100.00"]
    low, high = map(float, rows["95% interval"][0].split(".."))
    assert low < 83.33 < high
    data = json.loads((tmp_path / "scores.json").read_text())
    assert [data[name] for name in ("benchmark", "metric", "maximum")] == ["pope", "F1, mean of its categories", 100]
    first = data["scores"][0]
    assert [first[name] for name in ("answers", "questions", "answered", "figure")] == [own, 12, 12, "F1"]
    assert first["figures"]["F1"] == pytest.approx(250 / 3)
    assert [round(end, 2) for end in first["interval"]] == [low, high]
    before = (tmp_path / "scores.json").read_bytes()
    assert main(["score", "pope", "--answers", own, good, *root, "-o", out]) == 0
    assert capsys.readouterr().out.endswith(f"{out}, which replaced the one there\n")
    assert (tmp_path / "scores.json").read_bytes() == before


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path, pope, capsys):
    root, answers = pope
    paths = [write_lines(tmp_path / name / "merge.jsonl", answers) for name in "ab"]
    assert main(["score", "pope", "--answers", *paths, *root]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == paths


def test_part_of_the_answers_is_scored_if_asked_for(tmp_path, pope, capsys):
    root, answers = pope
    path, out = write_lines(tmp_path / "a.jsonl", answers[:6]), tmp_path / "s.json"
    whole = write_lines(tmp_path / "b.jsonl", answers)
    command = ["score", "pope", "--answers", path, *root, "-o", str(out)]
    assert "6 of 12 questions have no answer (first: 7): finish the run, or pass --partial" in error_of(command, capsys)
    assert not out.exists()
    assert main(["score", "pope", "--answers", path, whole, *root, "--partial"]) == 0
    rows = {line[:22].strip(): line[22:].split("  ") for line in capsys.readouterr().out.splitlines()[2:]}
    assert [cell.strip() for cell in rows["questions"] if cell] == ["6 of 12", "12"]
    assert [cell.strip() for cell in rows["random F1"] if cell] == ["-", "50.00"]


def test_wrong_use_is_one_line(tmp_path, pope, add, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, answers = pope
    add(toy(upload=UPLOAD))
    add(toy(name="closed", score=None, upload=UPLOAD))
    add(toy(name="plain", score=None))
    path, other = write_lines(tmp_path / "a.jsonl", answers), write_lines(tmp_path / "b.jsonl", [answer("q1", "a")])
    cases = [
        (["pope", "--answers", path, path, *root], "a.jsonl is passed twice"),
        (["pop", "--answers", path, *root], "'pop': no such benchmark; there are textvqa, gqa"),
        (["pope", "--answers", other, *root], "b.jsonl:1: question 'q1' is not one of POPE's; 1 of 1 answers"),
        (["pope", "--answers", path, *root, "-o", other], "b.jsonl is no file of fitprune: choose another output"),
        (["pope", "--answers", path, *root, "--upload", "u"], "pope has no other format; pass on the answers file"),
        (["toy", "--answers", path, other, "--upload", "u.json"], "holds one model's answers, not 2"),
        (["toy", "--answers", path, "--upload", "u.txt"], "--upload u.txt: must end in .json, as the server takes it"),
        (
            ["closed", "--answers", path],
            "closed: no answers are published, so nothing can be scored here; pass --upload FILE alone to write what "
            "the server takes",
        ),
        (["closed", "--answers", path, "--upload", "u.json", "-o", "s.json"], "closed: no answers are published"),
        (["plain", "--answers", path], "nothing can be scored here; its server takes the file"),
    ]
    for command, message in cases:
        assert message in error_of(["score", *command], capsys), command
    failures = [
        (["pope", "--answers", "none.jsonl", *root], "none.jsonl"),
        (["pope", "--answers", path], "data root playground/data/eval is no folder: pass the one that holds pope/"),
        (
            ["pope", "--answers", path, "--data-root", "."],
            "pope: its questions are missing: pope/llava_pope_test.jsonl",
        ),
    ]
    for command, message in failures:
        assert message in error_of(["score", *command], capsys, 1), command
    assert {entry.name for entry in tmp_path.iterdir()} == {"root", "a.jsonl", "b.jsonl"}


def test_the_upload_file_is_written_whole_and_replaces_nothing(tmp_path, add, capsys):
    make_toy(tmp_path)
    add(toy(score=None, upload=UPLOAD))
    path = write_lines(tmp_path / "a.jsonl", [answer(f"q{number}", "x") for number in reversed(range(4))])
    command = ["score", "toy", "--answers", path, "--data-root", str(tmp_path), "--upload", str(tmp_path / "u.json")]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path}/u.json: for the server\n"
    assert json.loads((tmp_path / "u.json").read_text()) == dict.fromkeys(["q0", "q1", "q2", "q3"], "x")
    assert "choose another output for an upload file, or pass --overwrite" in error_of(command, capsys)
    assert main([*command, "--overwrite"]) == 0

    def broken(samples, texts, place):
        place.write_text("half")
        raise ValueError("no")

    before = (tmp_path / "u.json").read_bytes()
    add(toy(score=None, upload=type(UPLOAD)(".json", broken, "the server")))
    assert main([*command, "--overwrite"]) == 2
    assert (tmp_path / "u.json").read_bytes() == before


def test_an_upload_that_is_a_folder_is_a_new_one(tmp_path, add, capsys):
    make_toy(tmp_path)
    add(toy(upload=FOLDER))
    path = write_lines(tmp_path / "a.jsonl", [answer(f"q{number}", "a") for number in range(4)])
    command = ["score", "toy", "--answers", path, "--data-root", str(tmp_path), "--upload", str(tmp_path / "u")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/u: for the script\n" in said
    assert "accuracy                100.00" in said
    assert "holds other files, such as all.txt: name another folder" in error_of(command, capsys)


def test_a_folder_that_cannot_be_written_whole_is_left_as_it_was(tmp_path, add, capsys):
    def broken(samples, texts, folder):
        (folder / "all.txt").write_text("half")
        raise ValueError("no")

    make_toy(tmp_path)
    (tmp_path / "u").mkdir()
    (tmp_path / "u/all.txt").write_text("whole")
    add(toy(upload=type(UPLOAD)("", broken, "the script")))
    path = write_lines(tmp_path / "a.jsonl", [answer(f"q{number}", "a") for number in range(4)])
    command = ["score", "toy", "--answers", path, "--data-root", str(tmp_path), "--upload", str(tmp_path / "u")]
    assert main([*command, "--overwrite"]) == 2
    assert [file.read_text() for file in (tmp_path / "u").iterdir()] == ["whole"]


def test_no_file_is_written_over_another_of_the_command(tmp_path, add, capsys):
    make_toy(tmp_path)
    add(toy(upload=UPLOAD))
    path = write_lines(tmp_path / "a.json", [answer(f"q{number}", "a") for number in range(4)])
    command = ["score", "toy", "--answers", path, "--data-root", str(tmp_path), "--overwrite"]
    again = f"{tmp_path}/./a.json"
    for more in (["-o", again], ["--upload", again], ["-o", "s.json", "--upload", "s.json"]):
        assert ".json is passed twice; leave one out" in error_of([*command, *more], capsys)


def test_the_figures_are_written_though_the_table_s_reader_had_enough(tmp_path, pope, monkeypatch):
    root, answers = pope
    path, out = write_lines(tmp_path / "a.jsonl", answers), tmp_path / "s.json"
    with open(tmp_path / "out", "w") as saved, monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **more: (_ for _ in ()).throw(BrokenPipeError))
        patch.setattr("sys.stdout", saved)
        assert main(["score", "pope", "--answers", path, *root, "-o", str(out)]) == 0
    assert json.loads(out.read_text())["benchmark"] == "pope"


def test_without_a_root_the_questions_are_those_that_the_file_holds(tmp_path, add, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(toy())
    entries = [answer(1, "A", question="q", answer="A"), answer(2, "B", question="q", answer="A")]
    path = write_lines(tmp_path / "a.jsonl", entries)
    assert main(["score", "toy", "--answers", path]) == 0
    assert "50.00" in capsys.readouterr().out
    assert "data root no is no folder" in error_of(["score", "toy", "--answers", path, "--data-root", "no"], capsys, 1)


def test_it_needs_no_torch(tmp_path, pope):
    root, answers = pope
    path = write_lines(tmp_path / "a.jsonl", answers)
    for command in (["score", "pope", "--answers", path, *root], ["benchmarks", *root]):
        code = (
            "import sys, fitprune.cli.main\n"
            f"assert fitprune.cli.main.main({command!r}) == 0\n"
            "assert not {'torch', 'transformers', 'huggingface_hub', 'datasets'} & set(sys.modules), 'heavy import'"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
