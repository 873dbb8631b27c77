"""Soft accuracy equals the official code's, whose figures are here."""

import pytest

from fitprune.benchmarks import textvqa, vizwiz, vqav2
from fitprune.benchmarks.evalai import evalai, vqa_eval
from fitprune.benchmarks.soft_accuracy import soft_accuracy, vizwiz_accuracy, vqa_accuracy
from fitprune.calibration.samples import Sample

# answer, annotators, and what official code gives: LLaVA's m4c_evaluator.py; vqaEval.py of the VQA authors of the
# answer as it is; and of the answer as EvalAI's processor normalises it, which LLaVA sends in.
PAIRS = [
    ("yes", {"yes": 10}, 100, 100, 100),
    ("Yes.", {"yes": 10}, 100, 0, 100),  # where all agree vqaEval.py changes nothing
    ("Yes", {"yes": 9, "no": 1}, 100, 100, 100),
    ("none", {"none": 10}, 100, 100, 0),
    ("0", {"none": 10}, 100, 0, 0),
    ("0", {"none": 9, "zero": 1}, 100, 100, 100),
    ("None", {"0": 3, "nothing": 7}, 90, 90, 90),
    ("two", {"2": 2, "Two": 1, "three": 7}, 90, 90, 90),
    ("2 dogs", {"two dogs": 10}, 100, 0, 0),
    ("2 dogs", {"two dogs": 9, "the two dogs": 1}, 100, 100, 100),
    ("nokia", {"nokia": 1, "htc": 9}, 30, 30, 30),
    ("nokia", {"nokia": 2, "htc": 8}, 60, 60, 60),
    ("nokia", {"nokia": 3, "htc": 7}, 90, 90, 90),
    ("nokia", {"nokia": 4, "htc": 6}, 100, 100, 100),
    ("the", {"a": 5, "an": 5}, 100, 100, 100),
    ("", {"": 10}, 100, 100, 100),
    ("", {"!": 10}, 100, 0, 0),
    ("", {"!": 5, "?": 5}, 100, 100, 100),
    ("a", {"a": 10}, 100, 100, 0),
    ("1,000", {"1000": 10}, 100, 0, 100),
    ("1,000", {"1,000": 10}, 100, 100, 0),
    ("1000", {"1,000": 10}, 100, 0, 0),
    ("1,000", {"1,000": 5, "1000": 5}, 100, 100, 100),
    ("3,5", {"3, 5": 5, "3 5": 5}, 0, 0, 0),
    ("-3", {"3": 6, "-3": 4}, 100, 100, 100),
    (".5", {"0.5": 5, ".5": 5}, 100, 100, 100),
    ("5.", {"5": 9, "five": 1}, 100, 100, 100),
    ("a-b 1,2", {"a-b 1,2": 6, "a b 1,2": 4}, 100, 100, 100),
    ("t-shirt", {"t-shirt": 7, "t shirt": 3}, 100, 100, 100),
    ("yes / no", {"yes/no": 8, "yesno": 2}, 100, 100, 100),
    ("dont", {"don't": 10}, 100, 0, 100),
    ("don\u2019t", {"don't": 10}, 0, 0, 0),
    ("John's", {"johns": 4, "john's": 3, "john 's": 3}, 100, 90, 90),
    ("let's go", {"let's go": 6, "go": 4}, 100, 100, 0),
    ("somebody'd", {"somebodyd": 10}, 100, 0, 100),
    ("U.S.A.", {"usa": 10}, 100, 0, 100),
    ("x" + "." * 40, {"x" + "." * 8: 10}, 0, 0, 100),
    ("what?", {"what": 6, "what?": 4}, 100, 100, 100),
    ("what?", {"what?": 10}, 100, 100, 0),
    ("caf\u00e9", {"CAF\u00c9": 5, "cafe\u0301": 5}, 100, 100, 100),
    ("\uff13", {"3": 10}, 0, 0, 0),
    ("red\nwine", {"red wine": 10}, 100, 100, 100),
    ("10%", {"10 %": 5, "10%": 5}, 100, 100, 100),
]


@pytest.mark.parametrize(("answer", "people", "m4c", "as_it_is", "sent"), PAIRS)
def test_an_answer_scores_as_in_the_official_code(answer, people, m4c, as_it_is, sent):
    people = tuple(text for text, count in people.items() for _ in range(count))
    sample = Sample(1, "", None, people)
    assert 100 * textvqa.score(answer, sample) == pytest.approx(m4c)
    assert 100 * vqa_accuracy(answer, people) == pytest.approx(as_it_is)
    assert 100 * vqav2.score(answer, sample) == pytest.approx(sent)


# The same of vqaEval.py of VizWiz's API: of the answer as it is, and as it is sent in.
VIZWIZ = [
    ("Two cans.", {"2 cans": 10}, 100, 100),
    ("two", {"two": 10}, 0, 0),
    ("Can", {"Can": 10}, 0, 0),
    ("the can", {"a can": 3, "can": 7}, 100, 100),
    ("none", {"0": 3, "none": 7}, 90, 90),
    ("unanswerable", {"unanswerable": 2, "soda": 8}, 60, 60),
    ("1,000 mg", {"1000 mg": 10}, 100, 100),
    ("dont", {"don't": 10}, 0, 100),
    ("dont", {"don\u2019t": 10}, 100, 0),
    ("cant", {"can't": 10}, 100, 100),
    ("somebody\u2019d", {"somebodyd": 10}, 100, 100),
]


@pytest.mark.parametrize(("answer", "people", "as_it_is", "sent"), VIZWIZ)
def test_an_answer_scores_as_in_vizwiz_s_code(answer, people, as_it_is, sent):
    people = tuple(text for text, count in people.items() for _ in range(count))
    assert 100 * vizwiz_accuracy(answer, people) == pytest.approx(as_it_is)
    assert 100 * vizwiz.score(answer, Sample(1, "", None, people)) == pytest.approx(sent)


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        ("1,000", "1000", "1000"),
        ("a-b 1,2", "b 12", "ab 12"),  # a comma between digits cuts every mark
        ("let's", "let 's", "let's"),
        ("she's!", "she 's", "she's"),
        ("ok?yes", "okyes", "ok yes"),
        ("None", "0", "0"),
    ],
)
def test_evalai_cuts_commas_and_question_marks_first(text, ours, theirs):
    assert (evalai(text), vqa_eval(text)) == (ours, theirs)


def test_each_annotator_is_left_out_once():
    assert soft_accuracy("a", ["a"] * 2) == pytest.approx(1 / 3)
    assert soft_accuracy("a", ["a"]) == 0
    assert soft_accuracy("b", ["a"]) == 0
