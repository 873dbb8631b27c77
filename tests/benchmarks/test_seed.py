"""SEED-Bench: its image part, strict letters, groups by the name of a question's type."""

import pytest

from fitprune.benchmarks.answers import matched
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

SEED = get_benchmark("SEED-Bench")
TEXT = "How many towels?\nA. One\nB. Two\nC. Three\nD. Four"
TEXT += "\nAnswer with the option's letter from the given choices directly."
LINES = [
    lined(101669, "SEED-Bench-image/1454426_2591111986", TEXT),
    lined(7, "SEED-Bench-image/7", TEXT),
    lined(8, "SEED-Bench-image/7", TEXT),
    lined("v1738", "SEED-Bench-video-image/v1738.png", TEXT),
]


def entry(number, answer, kind, **others):
    return {"question_id": number, "answer": answer, "question_type_id": kind, "data_type": "image", **others}


ENTRIES = [
    entry("101669", "A", 5),
    entry("v1738", "B", 10, data_type="video"),
    entry("7", "C", 1),
    entry("8", "D", 1),
]
TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}


def root(tmp_path, lines=LINES, entries=ENTRIES, types=TYPES):
    put(tmp_path / "seed_bench/llava-seed-bench.jsonl", lines)
    put(tmp_path / "seed_bench/SEED-Bench.json", {"questions": entries, "question_type": types})
    return tmp_path


def test_questions_about_videos_are_left_out(tmp_path):
    root(tmp_path)
    for name in ("1454426_2591111986", "7"):
        put(tmp_path / "seed_bench/SEED-Bench-image" / name, b"")
    questions = load_benchmark(SEED, tmp_path)
    assert [(sample.id, sample.answers, sample.kind) for sample in questions] == [
        (101669, ("A",), "Instances Counting"),
        (7, ("C",), "Scene Understanding"),
        (8, ("D",), "Scene Understanding"),
    ]
    assert questions[1].image == tmp_path / "seed_bench/SEED-Bench-image/7"
    assert questions[0].text == TEXT


def test_answers_to_questions_about_videos_are_left_out(tmp_path):
    questions = load_benchmark(SEED, root(tmp_path), images=False)
    lines = [("a", {"question_id": each["question_id"], "text": "A"}) for each in LINES]
    assert len(matched(SEED, questions, lines)[0]) == 3
    with pytest.raises(ValueError, match="3 of 3 questions have no answer"):
        matched(SEED, questions, lines[3:], partial=True)


def test_only_the_letter_itself_is_right(tmp_path):
    first, second, third = load_benchmark(SEED, root(tmp_path), images=False)
    assert [SEED.score(text, first) for text in ("A", "A.", "a", "A. One", " A", "")] == [1, 0, 0, 0, 0, 0]
    figures = SEED.measure([first, second, third]).of([1, 1, 0])
    assert figures == pytest.approx({"accuracy": 200 / 3, "Instances Counting": 100, "Scene Understanding": 50})


@pytest.mark.parametrize(
    ("lines", "entries", "types", "words"),
    [
        (LINES, ENTRIES[:3], TYPES, "seed-bench.jsonl:3: question '8' is not in .*SEED-Bench.json: "),
        (LINES[1:], ENTRIES, TYPES, r"seed-bench.jsonl: has no question 101669, .*\(1 of 3 are missing\)"),
        (LINES, ENTRIES + ENTRIES[:1], TYPES, "SEED-Bench.json, entry 4: question '101669' is there already"),
        (LINES + LINES[:1], ENTRIES, TYPES, "seed-bench.jsonl:5: question '101669' is there already"),
        (LINES, ENTRIES, list(TYPES), "SEED-Bench.json: 'question_type' is .*, must be an object"),
        (LINES, {"0": ENTRIES[0]}, TYPES, "SEED-Bench.json: 'questions' is .*, must be a list"),
        (LINES, [{**ENTRIES[0], "answer": 0}, *ENTRIES[1:]], TYPES, "entry 0: 'answer' is 0, must be text"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, lines, entries, types, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(SEED, root(tmp_path, lines, entries, types), images=False)
    assert "\n" not in str(error.value)
