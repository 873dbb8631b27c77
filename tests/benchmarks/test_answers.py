"""Files of answers: LLaVA's format, what others write, and pairs of answers and questions."""

import json
import logging
import os
import random
import threading
import zipfile

import pytest

from fitprune.benchmarks.answers import ALPHABET, matched, read_answers, scored, write_answers
from fitprune.benchmarks.base import line_of
from fitprune.benchmarks.pope import POPE
from fitprune.benchmarks.reading import load_benchmark
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample
from helpers.benchmarks import answer, make_pope, toy, write_lines

# The first line of answers that LLaVA's authors published for POPE.
PUBLISHED = (
    '{"question_id": 1, "prompt": "Is there a snowboard in the image?\\nAnswer the question using a single word or '
    'phrase.", "text": "No", "answer_id": "3wn9aPE3PL7qsd7mzWnuyL", "model_id": "llava-v1.5-13b", "metadata": {}}'
)


@pytest.fixture
def pope(tmp_path):
    questions, labels = make_pope(tmp_path)
    return load_benchmark(POPE, tmp_path, images=False), [
        answer(entry["question_id"], label) for entry, label in zip(questions, labels, strict=True)
    ]


def lines_of(path, entries):
    return read_answers(write_lines(path, entries))


def test_a_line_is_llavas_but_for_its_answer_id(tmp_path):
    question = "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    write_answers(tmp_path / "a.jsonl", [Sample(1, question, None)], ["No"], "llava-v1.5-13b")
    line = (tmp_path / "a.jsonl").read_text()
    name = json.loads(line)["answer_id"]
    assert line == PUBLISHED.replace("3wn9aPE3PL7qsd7mzWnuyL", name) + "\n"
    assert len(name) == 22
    assert set(name) <= set(ALPHABET)


def test_ids_keep_their_type_and_equal_answers_give_equal_bytes(tmp_path):
    samples = [Sample("12", "a", None), Sample(12, "é\ud800", None, facts={"prompt": "<image>\na"})]
    for name in ("a", "b"):
        write_answers(tmp_path / name, samples, ["x", "x"], "m")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    entries = [line for _, line in read_answers(tmp_path / "a")]
    assert [entry["question_id"] for entry in entries] == ["12", 12]
    assert [entry["prompt"] for entry in entries] == ["a", "<image>\na"]
    assert len({entry["answer_id"] for entry in entries}) == 2
    write_answers(tmp_path / "b", samples, ["x", "y"], "m")
    other = [line for _, line in read_answers(tmp_path / "b")]
    assert entries[0] == other[0]
    assert entries[1]["answer_id"] != other[1]["answer_id"]


def test_what_mmbench_adds_stands_where_its_script_has_it(tmp_path):
    more = {"round_id": 0, "options": ["x", "y"], "option_char": ["A", "B"]}
    write_answers(tmp_path / "a", [Sample(241, "q", None, facts={"more": more})], ["A"], "m")
    [(_, line)] = read_answers(tmp_path / "a")
    assert list(line) == [
        "question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"
    ]  # fmt: skip
    assert more == {name: line[name] for name in more}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_answers(path, [Sample(1, "q", None)], ["old"], "m")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_answers(path, [Sample(1, "q", None), Sample(2, "q", None)], ["new"], "m")
    with pytest.raises(TypeError):
        write_answers(path, [Sample(1, "q", None, facts={"more": {"x": object()}})], ["new"], "m")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_list_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    entries = [answer(1, "yes"), answer("b", "no")]
    (tmp_path / "a").write_text("\ufeff \n" + json.dumps(entries, indent=1))
    (tmp_path / "b").write_text("\ufeff" + "\n\n".join(map(json.dumps, entries)) + "\n\n")
    for name in "ab":
        assert [line for _, line in read_answers(tmp_path / name)] == entries
    assert [where for where, _ in read_answers(tmp_path / "b")] == [f"{tmp_path}/b:1", f"{tmp_path}/b:3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a: holds no answer, must have a line for each question"),
        ("[]", "a: holds no answer"),
        ('{"question_id": 1, "text": "x"}\n{"question_id": 2, "te', "a:2: not JSON"),
        ("[1]", "a, entry 0: is a JSON int, must be an object"),
        ("3", "a:1: is a JSON int"),
        ('{"question_id": 1}', "a:1: has no 'text', must have text; is it another file?"),
        ('{"question_id": 1, "text": null}', "a:1: 'text' is None, must be text"),
        ('{"text": "x"}', "a:1: has no 'question_id', must have text or a whole number"),
        ('{"question_id": true, "text": "x"}', "a:1: 'question_id' is True, must be text or a whole number"),
        ('{"question_id": 1.5, "text": "x"}', "a:1: 'question_id' is 1.5"),
        ('{"question_id": 1, "text": "x", "prompt": 3}', "a:1: 'prompt' is 3, must be text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question_id": ' + "9" * 5000 + "}", "a:1: not JSON (Exceeds the limit"),
        ('{"question_id": 1, "text": "é"}'.encode("latin-1"), "is no UTF-8; save it as UTF-8"),
        ('{"question_id": 1, "text": "x"}'.encode("utf-16"), "byte 0 is no UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadSample) as caught:
        read_answers(tmp_path / "a")
    assert message in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_spreadsheet_is_read_by_its_columns(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [("index", "question", "prediction"), (7, "q", "A"), (None, None, None), (8, "r", None), (9, "s", 5)]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    *answers, (_, last) = read_answers(tmp_path / "a.xlsx")
    assert last["text"] == "5"
    assert answers == [
        (f"{tmp_path}/a.xlsx:2", {"index": 7, "question": "q", "prediction": "A", "question_id": 7, "text": "A"}),
        (f"{tmp_path}/a.xlsx:4", {"index": 8, "question": "r", "prediction": None, "question_id": 8, "text": ""}),
    ]
    book.active["C1"] = "answer"
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(BadSample, match=r"a.xlsx:1: has no column 'prediction', must have index and prediction"):
        read_answers(tmp_path / "a.xlsx")
    book.active["C1"], book.active["A2"] = "prediction", None
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(BadSample, match=r"a.xlsx:2: 'index' is None, must be text or a whole number"):
        read_answers(tmp_path / "a.xlsx")
    (tmp_path / "a.xlsx").write_text("index,prediction")
    with pytest.raises(BadSample, match="no spreadsheet with a row of names"):
        read_answers(tmp_path / "a.xlsx")


def test_a_spreadsheet_of_other_programs_is_read_whole(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [("index", "prediction"), (7, "A")]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.xlsx") as made, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as other:
        for name in made.namelist():
            part = made.read(name).replace(b'<dimension ref="A1:B2"', b'<dimension ref="A1"')
            other.writestr(name, part.replace(b"<v>7</v>", b"<v>7.0</v>"))
    assert [(line["question_id"], line["text"]) for _, line in read_answers(tmp_path / "b.xlsx")] == [(7, "A")]


def test_a_pipe_is_read_whole(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = [{"question_id": number, "text": "x" * 100} for number in range(50)]
    for text in ("\n".join(map(json.dumps, lines)), json.dumps(lines)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
        writer.start()
        assert [line for _, line in read_answers(tmp_path / "pipe")] == lines
        writer.join()


def test_prompts_without_their_questions_are_warned_of(pope, caplog):
    samples, _ = pope
    lines = [
        (f"a:{place}", {"question_id": each.id, "prompt": "Why?", "text": ""}) for place, each in enumerate(samples)
    ]
    matched(POPE, samples, lines)
    assert "a:0: has another prompt than its question, as 12 of 12 answers have" in caplog.text
    caplog.clear()
    matched(
        POPE, samples, [(where, {**line, "prompt": s.text}) for s, (where, line) in zip(samples, lines, strict=True)]
    )
    assert not caplog.text


def test_a_spreadsheet_without_openpyxl_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"pip install 'fitprune\[benchmarks\]'"):
        read_answers(tmp_path / "a.xlsx")


def test_answers_find_their_questions_in_any_order_and_by_ids_of_any_type(tmp_path, pope):
    samples, entries = pope
    in_order = matched(POPE, samples, lines_of(tmp_path / "a", entries))
    assert in_order == (samples, [entry["text"] for entry in entries])
    assert scored(POPE, *in_order)["F1"] == 100
    random.Random(0).shuffle(entries)
    others = [{**entry, "question_id": str(entry["question_id"])} for entry in entries]
    assert matched(POPE, samples, lines_of(tmp_path / "a", others)) == in_order


def test_another_order_is_warned_of_where_the_official_script_pairs_by_lines(tmp_path, pope, caplog):
    samples, entries = pope
    with caplog.at_level(logging.WARNING, "fitprune"):
        matched(POPE, samples, lines_of(tmp_path / "a", entries))
        matched(POPE, samples, lines_of(tmp_path / "a", entries[8:] + entries[:8]))  # whole categories
        matched(POPE, samples, lines_of(tmp_path / "a", entries[:3]), partial=True)
        shuffled = [Sample(number, "q", None) for number in range(3)]
        matched(toy(), shuffled, lines_of(tmp_path / "a", [answer(number, "x") for number in (2, 0, 1)]))
        assert caplog.messages == []
        matched(POPE, samples, lines_of(tmp_path / "a", [entries[1], entries[0], *entries[2:]]))
        matched(POPE, samples, lines_of(tmp_path / "b", entries[1:]), partial=True)
    assert len(caplog.messages) == 2
    for name, message in zip("ab", caplog.messages, strict=True):
        assert message.startswith(f"{tmp_path}/{name}:1: the answers are not in the questions' order")
        assert "LLaVA's eval_pope.py, which pairs by lines, gives another figure" in message


def test_what_does_not_pair_is_counted_with_its_first(tmp_path, pope):
    samples, entries = pope
    path = tmp_path / "a"
    cases = [
        (
            [*entries, answer("x", "a"), answer(0, "b")],
            f"{path}:13: question 'x' is not one of POPE's; 2 of 14 answers",
        ),
        ([*entries, *entries[:3]], f"{path}:13: question 1 is answered already ({path}:1); 3 of 15 answers"),
        (entries[:2] + entries[5:], f"{path}:9: is the last answer, and 3 of 12 questions have no answer (first: 3)"),
    ]
    for lines, message in cases:
        with pytest.raises(BadSample) as caught:
            matched(POPE, samples, lines_of(path, lines))
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    assert "finish the run, or pass --partial to score those that are answered" in str(caught.value)
    assert matched(POPE, samples, lines_of(path, entries[6:7]), partial=True) == ([samples[6]], ["yes"])


def test_a_line_without_what_tells_questions_apart_is_named(tmp_path):
    by_prompt = toy(key=lambda line: (line["question_id"], line["prompt"]))
    samples = [Sample(1, "a", None), Sample(1, "b", None)]
    lines = lines_of(tmp_path / "a", [line_of(sample, sample.text) for sample in reversed(samples)])
    assert matched(by_prompt, samples, lines) == (samples, ["a", "b"])
    with pytest.raises(BadSample, match=r"a:1: has no 'prompt', which tells Toy test's questions apart"):
        matched(by_prompt, samples, lines_of(tmp_path / "a", [{"question_id": 1, "text": "x"}]))


def test_nothing_is_scored_where_no_answers_are_published():
    with pytest.raises(ValueError, match="Toy test: no answers are published"):
        scored(toy(score=None), [], [])
