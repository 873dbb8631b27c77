"""DocVQA: validation and test, ANLS and its quirks."""

import json
import random

import pytest

from fitprune.benchmarks.base import ONE_WORD
from fitprune.benchmarks.docvqa import DOCVQA, DOCVQA_TEST, distance
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from fitprune.calibration.samples import Sample

FIRST = {
    "questionId": 49153,
    "question": "What is the brand?",
    "image": "documents/a_1.png",
    "answers": ["ITC Limited", "ITC"],
    "question_types": ["layout", "table/list"],
}
SECOND = {**FIRST, "questionId": 49154, "answers": ["0.28"], "question_types": ["layout"]}


def root_of(folder, *entries, name="val_v1.0_withQT.json", images="documents"):
    data = folder / "docvqa" / name
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps({"dataset_name": "SP-DocVQA", "data": entries}))
    (folder / "docvqa" / images).mkdir(parents=True, exist_ok=True)
    (folder / "docvqa" / images / "a_1.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("val_v1.0_withQT.json", "documents"),
        ("val_v1.0.json", "spdocvqa_images"),
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images"),
        ("val/val_v1.0.json", "val/documents"),
    ],
)
def test_questions_wherever_the_files_are_unpacked(tmp_path, name, images):
    first, _ = load_benchmark(DOCVQA, root_of(tmp_path, FIRST, SECOND, name=name, images=images))
    assert (first.id, first.text) == (49153, f"What is the brand?{ONE_WORD}")
    assert (first.answers, first.kind) == (("ITC Limited", "ITC"), "layout, table/list")
    assert first.image == tmp_path / "docvqa" / images / "a_1.png"


def test_a_question_counts_in_each_of_its_types(tmp_path):
    questions = load_benchmark(DOCVQA, root_of(tmp_path, FIRST, SECOND))
    scores = [DOCVQA.score(text, each) for text, each in zip(["itc", "0.3"], questions, strict=True)]
    assert scores == [1, 0.5]
    assert DOCVQA.measure(questions).of(scores) == {"ANLS": 75, "layout": 75, "table/list": 100}


def test_without_types_there_are_no_groups(tmp_path):
    questions = load_benchmark(DOCVQA, root_of(tmp_path, {k: v for k, v in FIRST.items() if k != "question_types"}))
    assert DOCVQA.measure(questions).of([1]) == {"ANLS": 100}


@pytest.mark.parametrize(
    ("text", "answers", "official"),
    [
        ("itc  limited", ["ITC Limited"], 1),
        ("ITC Ltd", ["ITC Limited"], 0.6363636363636364),
        ("ITC", ["ITC Limited"], 0),
        ("", ["a"], 0),
        ("", [""], 1),
        ("1/8/93", ["1/8/98", "January 8"], 0.8333333333333334),
        ("$137001.88", ["$137,001.88", "$137001.88"], 1),
        ("ab", ["ax"], 0.5),
        ("abc", ["axy"], 0),
        ("ab   ", ["ax"], 0.8),  # the length is that with the blanks
        ("  0.28\n", ["0.28"], 1),
        ("ﬃx", ["ﬃ"], 0.75),  # and that in upper case: FFIX
        ("straße", ["strasse"], 0.7142857142857143),
        ("İx", ["ix"], 0.5),
        ("日本", ["日本語"], 0.6666666666666667),
        ("the answer is 0.28", ["0.28"], 0),
        ("a\x1cb", ["a b"], 1),
        ("a\u00a0b", ["a b"], 1),
    ],
)
def test_official_anls(text, answers, official):
    assert DOCVQA.score(text, Sample(1, "q", None, tuple(answers))) == official


def test_distance_is_that_of_a_recursion():
    def slow(one, other):
        if not one or not other:
            return len(one) + len(other)
        return min(slow(one[1:], other) + 1, slow(one, other[1:]) + 1, slow(one[1:], other[1:]) + (one[0] != other[0]))

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert distance(one, other) == slow(one, other)


def test_the_test_split_has_no_score_but_a_file_for_the_server(tmp_path):
    asked = {"questionId": 57344, "question": "What is the income?", "image": "documents/a_1.png"}
    questions = load_benchmark(DOCVQA_TEST, root_of(tmp_path, asked, name="test_v1.0.json"))
    assert DOCVQA_TEST.score is None
    DOCVQA_TEST.upload.write(questions, ["$5 é"], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{"questionId": 57344, "answer": "$5 é"}]


def test_names():
    assert get_benchmark("DocVQA_val") is DOCVQA
    assert get_benchmark("docvqa_test") is DOCVQA_TEST


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**FIRST, "answers": []}], r"entry 0: 'answers' is \[\], must be a list of one text or more"),
        ([{**FIRST, "answers": [5]}], r"entry 0: 'answers' is \[5\], must be a list of one text or more"),
        ([SECOND, {"questionId": 1, "question": "q", "image": "a_1.png"}], r"entry 1: has no 'answers'.*another file"),
        ([FIRST, SECOND, FIRST], r"entry 2: question '49153' is there already \(.*entry 0\): remove one"),
        ([{**FIRST, "image": "documents/b.png"}], r"1 of 1 images are missing: .*b\.png"),
        ([], r"holds no question"),
        (["q"], r"entry 0: is a JSON str, must be an object"),
    ],
)
def test_broken_entries_are_named_in_one_line(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message) as error:
        load_benchmark(DOCVQA, root_of(tmp_path, *entries))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"val_v1\.0_withQT\.json: is a JSON list, must be an object; is it another file"),
        (b"{}", r"val_v1\.0_withQT\.json: has no 'data', must have a list; is it another file"),
        ('{"data": "é"}'.encode("latin-1"), r"no text: byte 10 is no UTF-8; save it as UTF-8"),
        (None, r"docvqa: its questions are missing: .*docvqa.val_v1\.0_withQT\.json \(or .*\) is not there"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, content, message):
    file = root_of(tmp_path) / "docvqa/val_v1.0_withQT.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_benchmark(DOCVQA, tmp_path)
    assert "\n" not in str(error.value)
