"""Question JSONL and JSON lists, and every way in which a file can be broken."""

import json

import pytest

from fitprune import load_samples
from fitprune.calibration.entry import BadSample
from helpers.questions import OTHER, QUESTION, write


def test_the_authors_question_file(folder):
    data = write(folder, QUESTION, "", QUESTION | {"image": "blue.jpg", "answer": ["blue", "navy"], "kind": "colour"})
    first, second = load_samples(data)
    assert (first.id, first.text, first.answers, first.kind) == (1, "What colour?", (), "")
    assert (second.answers, second.kind) == (("blue", "navy"), "colour")
    assert second.load_image().size == (30, 40)


def test_llava_instruction_json_with_another_image_folder(folder, tmp_path_factory):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    data = write(
        tmp_path_factory.mktemp("other"), json.dumps([{"id": "a", "image": "red.png", "conversations": turns}])
    )
    (sample,) = load_samples(data, folder)
    assert (sample.id, sample.text, sample.answers) == ("a", "What is it?", ("A square.",))
    sample.load_image()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"q\.jsonl:2: not JSON"),
        ("[1]", r"q\.jsonl:2: is a JSON list"),
        ({"text": "x"}, r"q\.jsonl:2: 'image' is None"),
        ({"image": "red.png"}, r"q\.jsonl:2: 'text' is None"),
        ({"image": "red.png", "text": "  "}, r"q\.jsonl:2: 'text' is '  '"),
        ({"image": ["a.png", "b.png"], "text": "x"}, r"q\.jsonl:2: 'image' is \['a.png', 'b.png'\]"),
        ({"image": "red.png", "text": "x", "answer": {"a": 1}}, r"q\.jsonl:2: 'answer' is"),
        ({"image": "red.png", "text": "x", "answer": True}, r"q\.jsonl:2: 'answer' is"),
        ({"image": "red.png", "conversations": "hello"}, r"q\.jsonl:2: 'conversations' must be"),
        ({"image": "red.png", "conversations": [{"from": "gpt", "value": "x"}]}, r"q\.jsonl:2: 'conversations'"),
    ],
)
def test_a_broken_line_is_named_and_can_be_skipped(folder, line, message, caplog):
    data = write(folder, QUESTION, line, QUESTION)
    with pytest.raises(BadSample, match=message):
        load_samples(data)
    assert len(load_samples(data, skip_bad=True)) == 2
    assert "1 of 3 entries" in caplog.text
    assert "q.jsonl:2" in caplog.text


def test_files_from_other_systems_are_read(folder):
    (folder / "w.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(QUESTION).encode() + b"\r\n")
    assert len(load_samples(folder / "w.jsonl")) == 1
    odd = json.dumps(QUESTION | {"text": "a\u2028b"}, ensure_ascii=False)
    assert load_samples(write(folder, odd))[0].text == "a\u2028b"


def test_a_file_that_is_not_there_or_no_text(folder):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_samples(folder / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="image folder"):
        load_samples(write(folder, QUESTION), folder / "none")
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_samples(folder / "binary.jsonl")
    with pytest.raises(ValueError, match="no usable sample"):
        load_samples(write(folder, ""))
    for kind in ("tsv", "csv"):
        with pytest.raises(ValueError, match=f"q.{kind}: is {kind.upper()}, must be JSONL or JSON; convert it"):
            load_samples(write(folder, "index\timage\tquestion", "0\tabc\tWhat?", name=f"q.{kind}"))
    assert len(load_samples(write(folder, QUESTION, name="jsonl.tsv"))) == 1


def deep(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "red.png", "text": "x", "more": ' + deep(100_000) + "}", r"q\.jsonl:2: nested too deeply"),
        ('{"image": ' + deep(500) + ', "text": "x"}', r"q\.jsonl:2: 'image' is \[\[\["),
        (json.dumps(QUESTION | {"text": "hi \ud800"}), r"q\.jsonl:2: 'hi \\ud800' holds half of a surrogate"),
        (json.dumps(QUESTION | {"question_id": "\ud800"}), r"q\.jsonl:2: .* holds half"),
        (json.dumps(QUESTION | {"kind": "\udfff"}), r"q\.jsonl:2: .* holds half"),
        (json.dumps(QUESTION | {"answer": ["a", "\udfff"]}), r"q\.jsonl:2: .* holds half"),
        ('{"image": "a.png", "image": "b.png", "text": "x"}', r"q\.jsonl:2: has the key 'image' twice"),
        ('{"question_id": %s, "image": "red.png", "text": "x"}' % ("9" * 5000), r"q\.jsonl:2: 'question_id' is inf"),
        ('{"image": "red.png", "text": "x", "answer": 1e999}', r"q\.jsonl:2: 'answer' is inf"),
        ('{"image": "red.png", "text": "x", "answer": [["a"], "b"]}', r"q\.jsonl:2: 'answer' is"),
        ('{"image": "red.png", "text": "x", "kind": [1]}', r"q\.jsonl:2: 'kind' is \[1\]"),
        ('{"image": "red.png", "text": "x", "question_id": true}', r"q\.jsonl:2: 'question_id' is True"),
        ('{"image": "red.png", "text": "<image>"}', r"q\.jsonl:2: 'text' is '<image>'"),
        (
            '{"image": "red.png", "conversations": [{"from": "human", "value": null}]}',
            r"q\.jsonl:2: 'conversations' must",
        ),
        ('{"image": "red.png", "text": "x"} {"a": 1}', r"q\.jsonl:2: not JSON \(Extra data"),
        ('{"image": "%s", "text": "x"}' % ("x" * 9000 + "."), r"q\.jsonl:2: image .* cannot be read"),
        ('{"image": {"a": 1}, "text": "x"}', r"q\.jsonl:2: 'image' is \{'a': 1\}"),
        (json.dumps({"image": ["x" * 9000] * 9, "text": "x"}), r"q\.jsonl:2: 'image' is"),
    ],
)
def test_what_breaks_parsers_is_named_with_its_line_in_one_short_line_and_skipped(folder, line, message, caplog):
    data = write(folder, QUESTION, line, OTHER)
    with pytest.raises(BadSample, match=message) as caught:
        [sample.load_image() for sample in load_samples(data)]
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert len(load_samples(data, skip_bad=True)) == 2
    assert "q.jsonl:2: " in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (deep(100_000), r"d\.json:1: nested too deeply"),
        ('[{"image": "red.png", "text": "x"},\n {"image": ]', r"d\.json:2: not JSON"),
        ('[{"image": "red.png", "text": "x"},\n]', r"d\.json:2: not JSON"),
        ('[{"image": "red.png", "text": "x"}', r"d\.json:1: not JSON \(after entry 0"),
        ('[{"image": "red.png", "text": "x"}] []', r"d\.json:1: not JSON \(after entry 0"),
        ('[\n{"image": "red.png", "text": "x", "text": "y"}]', r"d\.json, entry 0: has the key 'text' twice"),
        (
            '{"data": [{"question": "x"}], "version": 1}',
            r"one JSON object with keys 'data', 'version'.*save its list 'd",
        ),
        ('{\n "data": [],\n "version": 1\n}\n', r"d\.json:1: the file is one JSON object with keys 'data', 'version'"),
        ('{"columns": ["image"], "index": [0], "data": [["red.png"]]}', r"or JSONL; with pandas: to_json\(.*'records'"),
        ('{"version": [1], "data": [{"question": "x"}]}', r"save its list 'data'"),
        ('{"v1_0": {"imagename": "a.png"}}', r"one JSON object with keys 'v1_0', must be a list of entries or JSONL$"),
        ("{}", "one JSON object with no keys"),
    ],
)
def test_a_whole_file_that_is_no_list_of_entries_says_what_it_is(folder, text, message):
    (folder / "d.json").write_text(text)
    with pytest.raises(BadSample, match=message):
        load_samples(folder / "d.json")


def test_lists_and_objects_are_read_whatever_space_is_between(folder):
    for text, count in [("[ ]", 0), ("\n[\n]\n", 0), (json.dumps([QUESTION, OTHER], indent=2) + "\n", 2)]:
        (folder / "d.json").write_text(text)
        if count == 0:
            with pytest.raises(ValueError, match="no usable sample"):
                load_samples(folder / "d.json")
        else:
            assert len(load_samples(folder / "d.json")) == count
    (folder / "d.json").write_text(json.dumps(QUESTION, indent=2))
    assert len(load_samples(folder / "d.json")) == 1
