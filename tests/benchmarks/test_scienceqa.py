"""ScienceQA: questions with and without an image, the letter rule, the authors' groups; official figures."""

import pytest

from fitprune.benchmarks.answers import read_answers
from fitprune.benchmarks.base import line_of
from fitprune.benchmarks.reading import drawn, load_benchmark
from fitprune.benchmarks.scienceqa import answer_of
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import put
from helpers.real_answers import ANSWERS, SLICE, figures, whole

SQA = get_benchmark("ScienceQA-IMG")
SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def asked(number, text, letter, **image):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": letter}]
    return {"id": number, **image, "conversations": turns}


ENTRIES = [
    asked("4", "Which figure of speech?\nA. chiasmus\nB. apostrophe", "B"),
    asked("5", "<image>\nContext: A map.\nWhich?\nA. Ohio\nB. Maine\nC. Utah", "C", image="5/image.png"),
    asked("11", "<image>\nWhich colony?\nA. Maryland\nB. Vermont", "A", image="11/image.png"),
    asked("12", "Context: Read.\nWhich?\nA. yes\nB. no", "A"),
]


def problem(answer, subject, grade, hint="", image=None):
    return {"answer": answer, "subject": subject, "grade": grade, "hint": hint, "image": image, "choices": ["", ""]}


PROBLEMS = {
    "4": problem(1, "language science", "grade7"),
    "5": problem(2, "social science", "grade6", "A map.", "image.png"),
    "11": problem(0, "social science", "grade1", "", "image.png"),
    "12": problem(0, "natural science", "grade12", "Read."),
    "1": problem(3, "natural science", "grade12", "Of another split."),
}


def root(tmp_path, entries=ENTRIES, problems=None):
    put(tmp_path / "scienceqa/llava_test_CQM-A.json", entries)
    if problems is not None:
        put(tmp_path / "scienceqa/problems.json", problems)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),
        ("B. apostrophe", "B"),
        ("B. ", "B"),
        ("B.", ""),
        ("B.apostrophe", ""),
        ("b", ""),
        (" B", ""),
        ("B\n", ""),
        ("F", ""),
        ("", ""),
        ("The answer is B.", "B"),
        ("So, The answer is B. Because", "B"),
        ("The answer is B", ""),  # some character must follow
        ("The answer is Blue", "B"),
        ("the answer is B.", ""),
        ("The answer is A. The answer is B.", ""),
        ("The answer is F.", "F"),  # beyond the choices, so never right
        ("B is the run-on sentence.", ""),
    ],
)
def test_letters_are_read_as_eval_science_qa_reads_them(text, letter):
    assert answer_of(text) == letter


def test_questions_of_text_alone_have_no_image_and_another_prompt(tmp_path):
    root(tmp_path)
    for number in (5, 11):
        put(tmp_path / f"scienceqa/images/test/{number}/image.png", b"")
    text, image, *_ = load_benchmark(SQA, tmp_path)
    assert (text.id, text.image, text.answers, text.kind) == ("4", None, ("B",), "text")
    assert line_of(text)["prompt"] == text.text == "Which figure of speech?\nA. chiasmus\nB. apostrophe" + SUFFIX
    assert (image.id, image.image.name, image.kind) == ("5", "image.png", "images")
    assert image.text == "Context: A map.\nWhich?\nA. Ohio\nB. Maine\nC. Utah" + SUFFIX
    assert line_of(image)["prompt"] == "<image>\n" + image.text
    assert SQA.max_new_tokens == 1024


def test_the_figure_is_that_of_questions_with_an_image(tmp_path):
    questions = load_benchmark(SQA, root(tmp_path), images=False)
    scores = [SQA.score(text, each) for text, each in zip(("B", "C. Utah", "C", "B"), questions, strict=True)]
    assert scores == [1, 1, 0, 0]
    every = SQA.measure(questions).of(scores)
    assert every == {"images": 50, "all": 50, "text": 50}
    assert list(every) == ["images", "all", "text"]
    assert SQA.measure(questions[:1]).of([1]) == {"all": 100, "text": 100}


def test_groups_are_the_columns_of_the_authors_tables(tmp_path):
    questions = load_benchmark(SQA, root(tmp_path, problems=PROBLEMS), images=False)
    every = SQA.measure(questions).of([1, 1, 0, 0])
    assert list(every)[:3] == ["images", "all", "text"]
    assert {name: every[name] for name in list(every)[3:]} == {
        "NAT": 0,
        "SOC": 50,
        "LAN": 100,
        "TXT": 50,
        "NO": 100,
        "G1-6": 50,
        "G7-12": 50,
    }


def test_a_draw_counts_what_it_holds(tmp_path):
    questions = drawn(SQA, load_benchmark(SQA, root(tmp_path), images=False), 2, seed=0)
    assert SQA.measure(questions).of([1, 1])["all"] == 100


def test_figures_are_those_of_eval_science_qa_on_a_slice_of_real_answers():
    every = figures(SQA, SLICE, SLICE / "scienceqa" / ANSWERS)
    assert (round(every["images"], 2), round(every["all"], 2)) == (64.29, 56.41)


def test_figures_are_the_published_ones_on_all_real_answers():
    root = whole()
    every = figures(SQA, root, root / "scienceqa" / ANSWERS)
    assert (round(every["images"], 2), round(every["all"], 2)) == (71.64, 74.39)


def test_the_answers_file_is_that_of_llava():
    questions = load_benchmark(SQA, SLICE, images=False)
    for sample, (_, line) in zip(questions, read_answers(SLICE / "scienceqa" / ANSWERS), strict=True):
        assert line_of(sample, line["text"]) == {name: line[name] for name in ("question_id", "prompt", "text")}


@pytest.mark.parametrize(
    ("entries", "problems", "words"),
    [
        ({"4": ENTRIES[0]}, None, "CQM-A.json: is a JSON dict, must be a list"),
        ([asked("4", "?", "F")], None, "CQM-A.json, entry 0: the answer is 'F', must be one of A, B, C, D, E"),
        (
            [{"id": "4", "conversations": [{"value": "?"}]}],
            None,
            "entry 0: 'conversations' is .*a question and its letter",
        ),
        ([{"id": "4"}], None, "entry 0: has no 'conversations', must have a list"),
        ([asked("4", "?", "A", image=None)], None, "entry 0: 'image' is None, must be text"),
        (ENTRIES + ENTRIES[:1], None, "entry 4: question '4' is there already"),
        (ENTRIES, {"4": PROBLEMS["4"]}, "problems.json: has no '5', must have an object"),
        (
            ENTRIES,
            {**PROBLEMS, "5": problem(0, "", "")},
            "problem 5: 'answer' is 0, .*entry 1 has C: one is of another",
        ),
        (ENTRIES, b"[]", "problems.json: is a JSON list, must be an object"),
        (b'[{"id": "4", \xff', None, "CQM-A.json: no text: byte 13 is no UTF-8"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, entries, problems, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(SQA, root(tmp_path, entries, problems), images=False)
    assert "\n" not in str(error.value)
