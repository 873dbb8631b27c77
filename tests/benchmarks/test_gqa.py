"""GQA: strict match, groups by structural type, and what its eval.py reads."""

import pytest

from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

GQA = get_benchmark("gqa")
LINES = [
    lined("201307251", "n1.jpg", "Is it overcast?\nAnswer the question using a single word or phrase."),
    lined("201640614", "n2.jpg", "Who is wearing the dress?\nAnswer the question using a single word or phrase."),
    lined("202225914", "n2.jpg", "What is red?\nAnswer the question using a single word or phrase."),
]
ENTRIES = {
    "201307251": {"answer": "no", "types": {"structural": "verify", "semantic": "attr"}},
    "201640614": {"answer": "woman", "types": {"structural": "query"}},
    "202225914": {"answer": "t-shirt", "types": {"structural": "query"}},
    "7": {"answer": "no"},
}


def root(tmp_path, lines=LINES, entries=ENTRIES, place="data/"):
    put(tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl", lines)
    put(tmp_path / f"gqa/{place}testdev_balanced_questions.json", entries)
    return tmp_path


@pytest.mark.parametrize("place", ["data/", "data/questions1.2/", "data/questions/", "questions1.2/", ""])
def test_annotations_are_found_wherever_people_put_them(tmp_path, place):
    questions = load_benchmark(GQA, root(tmp_path, place=place), images=False)
    assert [sample.answers for sample in questions] == [("no",), ("woman",), ("t-shirt",)]
    assert [sample.kind for sample in questions] == ["verify", "query", "query"]


@pytest.mark.parametrize("place", ["data/images", "images"])
def test_pictures_are_found_in_both_places(tmp_path, place):
    root(tmp_path)
    for name in ("n1", "n2"):
        put(tmp_path / "gqa" / place / f"{name}.jpg", b"")
    assert [sample.image.name for sample in load_benchmark(GQA, tmp_path)] == ["n1.jpg", "n2.jpg", "n2.jpg"]


def test_only_full_stops_at_the_end_and_case_are_forgiven(tmp_path):
    no, woman, shirt = load_benchmark(GQA, root(tmp_path), images=False)
    answers = ("No..", "woman", "A woman", "woman ", "T-shirt!", "t shirt")
    samples = (no, woman, woman, woman, shirt, shirt)
    assert [GQA.score(*pair) for pair in zip(answers, samples, strict=True)] == [1, 1, 0, 0, 0, 0]
    figures = GQA.measure([no, woman, shirt]).of([1, 1, 0])
    assert figures == pytest.approx({"accuracy": 200 / 3, "query": 50, "verify": 100})


def test_annotations_without_types_have_no_groups(tmp_path):
    entries = {number: {"answer": entry["answer"]} for number, entry in ENTRIES.items()}
    questions = load_benchmark(GQA, root(tmp_path, entries=entries), images=False)
    assert GQA.measure(questions).of([1, 0, 1]) == pytest.approx({"accuracy": 200 / 3})


def test_the_upload_is_what_the_converter_writes(tmp_path):
    questions = load_benchmark(GQA, root(tmp_path), images=False)
    GQA.upload.write(questions, ["No.", "Fianc\u00e9e", "T-shirt .."], tmp_path / "up.json")
    assert (tmp_path / "up.json").read_bytes() == (
        b'[{"questionId": "201307251", "prediction": "no"}, '
        b'{"questionId": "201640614", "prediction": "fianc\\u00e9e"}, '
        b'{"questionId": "202225914", "prediction": "t-shirt "}]'
    )


@pytest.mark.parametrize(
    ("lines", "entries", "words"),
    [
        (
            LINES,
            {"7": {"answer": "no"}},
            r"balanced.jsonl:1: question '201307251' is not in .*balanced_questions.json: ",
        ),
        (LINES, {number: {} for number in ENTRIES}, "balanced_questions.json, question 201307251: has no 'answer'"),
        (LINES, dict.fromkeys(ENTRIES, "no"), "balanced_questions.json, question 201307251: has no 'answer'"),
        (LINES, list(ENTRIES), "balanced_questions.json: is a JSON list, must be an object"),
        (LINES, b'{"\xff', "balanced_questions.json: no text: byte 2 is no UTF-8"),
        (LINES, b'{"7": ', "balanced_questions.json: not JSON"),
        (LINES + LINES[:1], ENTRIES, "balanced.jsonl:4: question '201307251' is there already"),
        ([{"question_id": "7", "image": "n.jpg"}], ENTRIES, "balanced.jsonl:1: has no 'text'"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, lines, entries, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(GQA, root(tmp_path, lines, entries), images=False)
    assert "\n" not in str(error.value)
