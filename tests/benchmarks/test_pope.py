"""POPE: labels by line, the rule for yes and no, F1 of three categories; the official figures on real answers."""

import pytest

from fitprune.benchmarks.answers import matched, read_answers
from fitprune.benchmarks.pope import answer_of
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.benchmarks import make_pope, write_lines
from helpers.real_answers import ANSWERS, SLICE, figures, whole

POPE = get_benchmark("POPE")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("No, it does not", "no"),
        ("There is not a dog.", "no"),
        ("Yes. There is no cat", "yes"),  # after the first full stop nothing counts
        ("NO", "yes"),
        ("no!", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
        (".no", "yes"),
        ("no\nyes", "yes"),  # only blanks part words
        ("no,", "no"),
        ("n,o", "no"),
    ],
)
def test_yes_and_no_are_read_as_eval_pope_reads_them(text, answer):
    assert answer_of(text) == answer


def test_figures_are_those_of_eval_pope_on_a_slice_of_real_answers():
    assert figures(POPE, SLICE, SLICE / "pope" / ANSWERS) == pytest.approx(
        {
            "F1": 100 * (2 * 0.7142857142857143 + 0.7692307692307692) / 3,
            "random F1": 76.92307692307692,
            "popular F1": 71.42857142857143,
            "adversarial F1": 71.42857142857143,
            "random accuracy": 76.92307692307692,
            "popular accuracy": 71.42857142857143,
            "adversarial accuracy": 71.42857142857143,
            "random yes": 46.15384615384616,
            "popular yes": 50,
            "adversarial yes": 50,
        }
    )


def test_figures_are_the_published_ones_on_all_real_answers():
    root = whole()
    every = figures(POPE, root, root / "pope" / ANSWERS)
    assert {name: round(value, 2) for name, value in every.items() if "F1" in name} == {
        "F1": 85.95,
        "random F1": 87.14,
        "popular F1": 86.25,
        "adversarial F1": 84.46,
    }


def test_the_answers_file_is_that_of_llava():
    questions = load_benchmark(POPE, SLICE, images=False)
    for sample, (_, line) in zip(questions, read_answers(SLICE / "pope" / ANSWERS), strict=True):
        assert (sample.id, sample.text) == (line["question_id"], line["prompt"])


def test_f1_counts_yes_as_what_is_sought(tmp_path):
    _, labels = make_pope(tmp_path)
    questions = load_benchmark(POPE, tmp_path, images=False)
    assert [sample.answers[0] for sample in questions] == labels == ["yes", "no"] * 6
    assert POPE.measure(questions).of([1.0] * 12)["F1"] == 100
    assert POPE.measure(questions).of([1.0, 0.0] * 6)["F1"] == pytest.approx(200 / 3)  # always yes
    assert POPE.measure(questions).of([0.0, 1.0] * 6)["F1"] == 0  # always no


def test_a_draw_without_a_category_has_the_mean_of_the_others(tmp_path):
    make_pope(tmp_path)
    questions = [each for each in load_benchmark(POPE, tmp_path, images=False) if each.kind != "random"]
    every = POPE.measure(questions).of([1.0] * 8)
    assert every["F1"] == 100
    assert not any(name.startswith("random") for name in every)


def test_a_file_of_another_state_is_named(tmp_path):
    make_pope(tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    lines = path.read_text().splitlines(keepends=True)
    changes = {
        "coco_pope_random.json:1: is not the label of .*llava_pope_test.jsonl:9: .*2,910": lines[1:] + lines[:1],
        r"coco_pope_random.json:3 \(its end\): is not the label of .*llava_pope_test.jsonl:12: ": lines[:3],
        "coco_pope_random.json: has 5 labels for 4 questions": [*lines, lines[0]],
        "coco_pope_random.json:2: 'label' is 'maybe', must be yes or no": [
            lines[0],
            lines[1].replace('"no"', '"maybe"'),
            *lines[2:],
        ],
    }
    for words, content in changes.items():
        path.write_text("".join(content))
        with pytest.raises(ValueError, match=words) as error:
            load_benchmark(POPE, tmp_path, images=False)
        assert "\n" not in str(error.value)


def test_a_category_that_is_none_of_the_three_is_named(tmp_path):
    questions, _ = make_pope(tmp_path, each=1)
    write_lines(tmp_path / "pope/llava_pope_test.jsonl", [{**questions[0], "category": "easy"}])
    with pytest.raises(ValueError, match="jsonl:1: 'category' is 'easy', must be one of random, popular, adversarial"):
        load_benchmark(POPE, tmp_path, images=False)


def test_missing_pictures_are_counted_before_the_first_answer(tmp_path):
    make_pope(tmp_path)
    (tmp_path / "pope/val2014").mkdir()
    (tmp_path / "pope/val2014/2.jpg").touch()
    with pytest.raises(ValueError, match=r"pope: 3 of 4 images are missing: .*0.jpg, .*1.jpg, .*3.jpg; put them there"):
        load_benchmark(POPE, tmp_path)


def test_answers_are_paired_by_id_whatever_their_order(tmp_path):
    make_pope(tmp_path)
    questions = load_benchmark(POPE, tmp_path, images=False)
    lines = [("", {"question_id": each.id, "prompt": "", "text": each.answers[0]}) for each in reversed(questions)]
    _, texts = matched(POPE, questions, lines)
    assert [POPE.score(text, each) for text, each in zip(texts, questions, strict=True)] == [1] * 12
