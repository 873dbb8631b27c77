"""VizWiz: test is written for the server, val is scored; its prompts are made where LLaVA's file is not there."""

import pytest

from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

TEST, VAL = get_benchmark("vizwiz"), get_benchmark("VizWiz-val")
SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def annotated(image, question, answers, **others):
    people = [{"answer": text, "answer_confidence": "yes"} for text in answers]
    return {"image": image, "question": question, "answers": people, **others}


ENTRIES = [
    annotated("VizWiz_val_00000000.jpg", "Ok. What is this?", ["soda"] * 3 + ["can"] * 7, answer_type="other"),
    annotated("VizWiz_val_00000001.jpg", "What color?", ["unanswerable"] * 10, answer_type="unanswerable"),
]
LINES = [
    lined(4, "VizWiz_val_00000001.jpg", "What color?" + SUFFIX),
    lined(5, "VizWiz_val_00000000.jpg", "Ok. What is this?" + SUFFIX),
]


def test_prompts_of_val_are_made_as_llava_s(tmp_path):
    put(tmp_path / "vizwiz/val.json", ENTRIES)
    soda, color = load_benchmark(VAL, tmp_path, images=False)
    assert (soda.id, soda.text, soda.kind) == (0, "Ok. What is this?" + SUFFIX, "other")
    assert (color.id, color.kind, color.facts["image"]) == (1, "unanswerable", "VizWiz_val_00000001.jpg")
    scores = [VAL.score("A soda.", soda), VAL.score("Unanswerable", color)]
    assert scores == pytest.approx([0.9, 1])
    assert VAL.measure([soda, color]).of(scores) == pytest.approx({"accuracy": 95, "other": 90, "unanswerable": 100})


@pytest.mark.parametrize("place", ["val.json", "Annotations/val.json", "annotations/val.json"])
def test_llava_s_file_of_val_goes_first(tmp_path, place):
    put(tmp_path / "vizwiz" / place, ENTRIES)
    assert [sample.id for sample in load_benchmark(VAL, tmp_path, images=False)] == [0, 1]
    put(tmp_path / "vizwiz/llava_val.jsonl", LINES)
    questions = load_benchmark(VAL, tmp_path, images=False)
    assert [(sample.id, sample.answers[0]) for sample in questions] == [(4, "unanswerable"), (5, "soda")]


def test_pictures_lie_in_folders_of_their_splits(tmp_path):
    put(tmp_path / "vizwiz/val.json", ENTRIES)
    for entry in ENTRIES:
        put(tmp_path / "vizwiz/val" / entry["image"], b"")
    assert len(load_benchmark(VAL, tmp_path)) == 2


def test_the_upload_of_test_is_what_the_converter_writes(tmp_path):
    names = ("VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg")
    put(tmp_path / "vizwiz/llava_test.jsonl", [lined(i, name, "What?" + SUFFIX) for i, name in enumerate(names)])
    questions = load_benchmark(TEST, tmp_path, images=False)
    assert TEST.score is None
    TEST.upload.write(questions, ["The Caf\u00e9, please!", "Unanswerable."], tmp_path / "up.json")
    assert (tmp_path / "up.json").read_bytes() == (
        b'[{"image": "VizWiz_test_00000000.jpg", "answer": "caf\\u00e9 please"}, '
        b'{"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"}]'
    )


@pytest.mark.parametrize(
    ("lines", "entries", "words"),
    [
        (LINES, ENTRIES[1:], "llava_val.jsonl:2: question 'VizWiz_val_00000000.jpg' is not in .*val.json: "),
        (LINES, ENTRIES * 2, "val.json, entry 2: question 'VizWiz_val_00000000.jpg' is there already"),
        (LINES * 2, ENTRIES, "llava_val.jsonl:3: question '4' is there already"),
        (None, [{"image": "a.jpg", "question": "?"}], "val.json, entry 0: has no 'answers'"),  # of test
        (None, {"data": ENTRIES}, "val.json: is a JSON dict, must be a list"),
        (None, [annotated("a.jpg", 3, ["a"])], "val.json, entry 0: 'question' is 3, must be text"),
        (None, b'["\xe9"]', "val.json: no text: byte 2 is no UTF-8; save it as UTF-8"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, lines, entries, words):
    put(tmp_path / "vizwiz/val.json", entries)
    if lines:
        put(tmp_path / "vizwiz/llava_val.jsonl", lines)
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(VAL, tmp_path, images=False)
    assert "\n" not in str(error.value)
