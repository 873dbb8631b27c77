"""VQAv2: test-dev is written for the server, val is scored as the server does."""

import dataclasses
import json

import pytest

from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

TEST, VAL = get_benchmark("VQAv2"), get_benchmark("vqav2-val")
SUFFIX = "\nAnswer the question using a single word or phrase."
TEST_LINES = [lined(number, f"COCO_test2015_{number:012d}.jpg", "Is it?" + SUFFIX) for number in (3, 1)]
VAL_LINES = [
    lined(262148000, "COCO_val2014_000000262148.jpg", "Where is he looking?" + SUFFIX),
    lined(262148001, "COCO_val2014_000000262148.jpg", "How many?" + SUFFIX),
]
QUESTIONS = [
    {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
    {"image_id": 262148, "question": "How many?", "question_id": 262148001},
]


def annotated(number, kind, answers):
    people = [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(answers)]
    return {"question_id": number, "image_id": 262148, "answer_type": kind, "question_type": "what", "answers": people}


ENTRIES = [
    annotated(262148001, "number", ["2"] * 10),
    annotated(262148000, "other", ["down"] * 2 + ["at the table"] * 8),
    annotated(7, "yes/no", ["yes"] * 10),
]
LLAVA, OFFICIAL = "llava_vqav2_mscoco_val2014.jsonl", "v2_OpenEnded_mscoco_val2014_questions.json"


def root(tmp_path, name=LLAVA, questions=VAL_LINES, entries=ENTRIES):
    put(tmp_path / "vqav2" / name, questions)
    entries = entries if isinstance(entries, bytes) else {"info": {}, "annotations": entries}
    put(tmp_path / "vqav2/v2_mscoco_val2014_annotations.json", entries)
    return tmp_path


def test_llava_s_file_and_the_official_one_hold_the_same_questions(tmp_path):
    ours = load_benchmark(VAL, root(tmp_path / "a"), images=False)
    theirs = load_benchmark(VAL, root(tmp_path / "b", OFFICIAL, {"questions": QUESTIONS}), images=False)
    assert [dataclasses.replace(sample, where="") for sample in ours] == [
        dataclasses.replace(sample, where="") for sample in theirs
    ]
    assert [sample.kind for sample in ours] == ["other", "number"]
    assert len(ours[0].answers) == 10


@pytest.mark.parametrize("place", ["vqav2/val2014", "coco/val2014", "pope/val2014"])
def test_pictures_of_val_are_found_where_other_benchmarks_have_them(tmp_path, place):
    root(tmp_path, OFFICIAL, {"questions": QUESTIONS})
    put(tmp_path / place / "COCO_val2014_000000262148.jpg", b"")
    assert len(load_benchmark(VAL, tmp_path)) == 2


def test_val_is_scored_as_the_server_scores_what_is_sent(tmp_path):
    where, many = load_benchmark(VAL, root(tmp_path), images=False)
    scores = [VAL.score("Down", where), VAL.score("Two.", many)]
    assert scores == pytest.approx([0.6, 1])
    assert VAL.score("table", where) == 0
    assert VAL.score("At table!", where) == 1
    assert VAL.measure([where, many]).of(scores) == pytest.approx({"accuracy": 80, "number": 100, "other": 60})


def test_the_upload_has_every_question_of_the_split(tmp_path):
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", TEST_LINES)
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": number} for number in (1, 2, 3)])
    assert TEST.score is None
    questions = load_benchmark(TEST, tmp_path, images=False)
    TEST.upload.write(questions, ["The Caf\u00e9.", "Two"], tmp_path / "up.json")
    assert (tmp_path / "up.json").read_bytes() == (
        b'[{"question_id": 1, "answer": "2"}, {"question_id": 2, "answer": ""}, '
        b'{"question_id": 3, "answer": "caf\\u00e9"}]'
    )


def test_no_answer_is_lost_where_the_split_s_ids_are_text_or_are_others(tmp_path):
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", TEST_LINES)
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": name} for name in ("1", "3")])
    questions = load_benchmark(TEST, tmp_path, images=False)
    TEST.upload.write(questions, ["yes", "no"], tmp_path / "up.json")
    assert [each["answer"] for each in json.loads((tmp_path / "up.json").read_text())] == ["no", "yes"]
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 1}])
    with pytest.raises(ValueError, match=r"test2015.jsonl: has no question 3, which was answered \(1 of 2 are missing"):
        TEST.upload.write(questions, ["yes", "no"], tmp_path / "up.json")


def test_without_the_split_the_upload_has_what_was_asked(tmp_path):
    put(tmp_path / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", TEST_LINES)
    questions = load_benchmark(TEST, tmp_path, images=False)
    TEST.upload.write(questions, ["yes", "no"], tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 3, "answer": "yes"},
        {"question_id": 1, "answer": "no"},
    ]


@pytest.mark.parametrize(
    ("name", "questions", "entries", "words"),
    [
        (
            LLAVA,
            VAL_LINES,
            ENTRIES[:1],
            r"val2014.jsonl:1: question '262148000' is not in .*val2014_annotations.json: ",
        ),
        (OFFICIAL, {"questions": QUESTIONS}, ENTRIES[:1], "questions.json, entry 0: question '262148000' is not in"),
        (LLAVA, VAL_LINES, ENTRIES * 2, "annotations.json, entry 3: question '262148001' is there already"),
        (LLAVA, VAL_LINES + VAL_LINES, ENTRIES, "val2014.jsonl:3: question '262148000' is there already"),
        (OFFICIAL, {"annotations": []}, ENTRIES, "questions.json: has no 'questions'"),
        (LLAVA, VAL_LINES, b"[]", "annotations.json: is a JSON list, must be an object"),
        (LLAVA, VAL_LINES, b'{"annotations": ["\xe9"]}', "annotations.json: no text: byte 18 is no UTF-8"),
        (LLAVA, VAL_LINES, [annotated(262148000, "other", [])], "entry 0: 'answers' is .*, must hold"),
        (LLAVA, VAL_LINES, [annotated(262148000, "other", [2])], "entry 0: 'answers' is .*, must hold"),
        (LLAVA, VAL_LINES, [{**ENTRIES[1], "answers": ["down"] * 10}], "entry 0: 'answers' is .*, must hold"),
        (LLAVA, VAL_LINES, [annotated(262148000, None, ["down"])], "entry 0: 'answer_type' is None, must be text"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, name, questions, entries, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(VAL, root(tmp_path, name, questions, entries), images=False)
    assert "\n" not in str(error.value)
