"""Metrics, and what figures may claim: warnings where accuracy compares nothing, "cannot tell" where there are few."""

import re

import numpy as np
import pytest

from fitprune import evaluate, load_model, load_samples
from fitprune._support import assets
from fitprune.cli.main import main
from fitprune.evaluation.entries import entries_of
from fitprune.evaluation.metrics import METRICS, choose, evalai, exact, is_near, normalized, vqa
from fitprune.evaluation.results import Results, table
from fitprune.evaluation.tables import matrix, verdict
from helpers.answered import RECIPE, answered


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" Yes. ", "yes"),
        ("The cat!", "cat"),
        ("an apple, a pear", "apple pear"),
        ('"Stop"', "stop"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("p.m.", "pm"),
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("ows'at", "ows'at"),
        ("let's go", "let 's go"),
        ("yes\tsir\nyes", "yes sir yes"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("x/y c/ d", "xy c d"),
        ("-3", "3"),
        ("10%", "10%"),
        ("the", ""),
        ("!", ""),
        ("x" + "." * 40, "x" + "." * 8),
    ],
)
def test_answers_are_normalised_as_evalai_does_it(text, plain):
    assert evalai(text) == plain


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("9", ["9."], True),
        ("Yes.", ["yes"], True),
        ("three", ["3"], True),
        ("the red car", ["Red car"], True),
        ("\u2018cat\u2019", ["cat"], True),
        ("**3**", ["3"], True),
        ("'stop' sign", ["stop sign"], True),
        ("\uff13\u3002", ["3"], True),
        ("cafe\u0301", ["caf\u00e9"], True),
        ("1000", ["1,000"], True),
        ("B:", ["b"], True),
        ("A", ["a."], True),
        ("(A)", ["A"], True),
        ("", ["A"], False),
        ("the", ["A"], False),
        ("B", ["A"], False),
        ("", [""], False),
        ("", ["", "yes"], False),
        ("yes", ["", "yes"], True),
        ("", ["!"], False),
        ("?", ["!"], False),
        ("!", ["!"], True),
        ("3", ["-3"], False),
        ("\u22123", ["-3"], True),
        ("35", ["3,5"], False),
        ("13", ["3"], False),
        ("A. cat", ["A"], False),
        ("7", ["The answer is 7."], False),
    ],
)
def test_normalized_forgives_spelling_and_nothing_else(answer, accepted, right):
    assert normalized(answer, accepted) == right


def test_exact_forgives_case_and_spaces_alone():
    assert exact(" YES ", ["no", "yes"]) == 1
    assert exact("yes.", ["yes"]) == exact("", ["", "yes"]) == 0


@pytest.mark.parametrize("count", [4, 5, 10, 11])
def test_vqa_is_the_mean_over_annotators_left_out(count):
    for agree in range(count + 1):
        people = ["Two"] * agree + ["nokia"] * (count - agree)
        others = [people[:i] + people[i + 1 :] for i in range(count)]
        assert vqa("2.", people) == pytest.approx(np.mean([min(1, rest.count("Two") / 3) for rest in others]))
    assert vqa("2.", ["two"] * count) == 1
    assert vqa("gold", ["gold"] + ["nokia"] * 9) == pytest.approx(0.3)


def test_what_nothing_is_left_of_is_as_vqa_has_it():
    assert vqa("", ["a"] * 4 + ["b"] * 6) == 1  # theirs too
    assert vqa("b", [""] * 9 + ["b"]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("accepted", "metric"),
    [
        ([["a"] * 10] * 3, "vqa"),
        ([["a"] * 10, ["a"] * 10, ["b"] * 9], "vqa"),
        ([[str(i) for i in range(10)]] * 3, "normalized"),  # ten alternatives
        ([["a"] * 10, ["a"] * 10, ["b"]], "vqa"),  # most questions decide, not one
        ([["a"] * 10] * 5 + [["4"] * 3 + [""] * 7], "vqa"),
        ([["a"] * 5 + [""] * 5] * 3, "vqa"),
        ([["a"] * 10, ["b"], ["c"]], "normalized"),
        ([["a"] * 10] + [[str(i) for i in range(10)]] * 2, "normalized"),
        ([["a", "b"] + [""] * 8] * 3, "normalized"),  # alternatives, in ten columns
        ([["a", "a", "b"]] * 3, "normalized"),
        ([["a"]] * 3, "normalized"),
        ([], "normalized"),
    ],
)
def test_the_metric_is_guessed_by_the_data(accepted, metric):
    assert choose(None, accepted) == metric
    assert choose("exact", accepted) == "exact"


def test_a_metric_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="metric='f1': must be one of exact, normalized, vqa"):
        choose("f1", [["a"]])
    with pytest.raises(ValueError, match=r"no question has more accepted answers than 3.*pass normalized or exact"):
        choose("vqa", [["a"] * 3, ["a"]])
    assert choose("vqa", [["a"] * 10, ["a"]]) == "vqa"
    assert choose("vqa", []) == "vqa"


@pytest.mark.parametrize(
    ("accepted", "answer", "score"),
    [
        (["4"], "Four.", 1),
        (["4"], "5", 0),
        (["4", "four", "5"], "5", 1),
        (["4", ""], "", 0),
        (["A"], "", 0),
        (["4"] * 3 + [""] * 7, "4", 0.9),
        (["4"] + [""] * 9, "4", 0.3),
        (["4"] * 4, "4", 1),
    ],
)
def test_of_fewer_than_four_answers_any_one_is_right_by_vqa(accepted, answer, score):
    assert vqa(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize("odd", [["4"] * 3 + [""] * 7, ["4"]])
def test_one_question_with_few_answers_leaves_the_others_their_metric(odd):
    found = answered([["yes"] + ["no"] * 9] * 5 + [odd], {"dense": ["yes"] * 6})
    assert (found.tasks[0].metric, found.tasks[0].guess) == ("vqa", True)
    assert found.tasks[0].dense == pytest.approx(5 * 0.3 / 6)


def test_words_around_an_answer_are_noticed():
    assert is_near("A. cat", ["A"])
    assert is_near("7", ["nothing", "The answer is 7."])
    assert is_near("It's the cat.", ["cat"])
    assert not is_near("13", ["3"])
    assert not is_near("", ["yes"])
    assert not is_near("!", ["yes", "", "?"])


@pytest.mark.parametrize(
    ("accepted", "dense", "words"),
    [
        ([[]], "b", "no accepted answers: accuracy unknown, agreement with dense is shown"),
        ([[""], [" "]], "b", "no accepted answers"),
        ([["b"], [""]], "b", "12 of 24 questions have no accepted answer: accuracy is of the other 12"),
        ([["The answer is B."]], "b", "right in 0 of 24 questions: .*e.g. accepted 'The answer is B.', answered 'b'"),
        ([["A"]], "A. cat", "accepted 'A', answered 'A. cat'; 24 answers are wrong by words around alone"),
        ([["dog"]], "cat", "check --metric or the accepted answers: e.g. accepted 'dog', answered 'cat'$"),
        ([["x" * 99]], "cat", "accepted 'x{37}[.]{3}'"),
        ([["b"], ["It is b."]], "b", "in 12 of 24 questions the dense model is wrong by words around alone"),
        ([["b"] * 10], "c", "right in 0 of 24 questions"),
    ],
)
def test_figures_that_mean_nothing_say_so(accepted, dense, words):
    found = answered((accepted * 24)[:24], {"dense": [dense] * 24, "fitprune": [dense] * 24, "dart": ["z"] * 24})
    (warning,) = found.tasks[0].warnings()
    assert re.search(words, warning)
    assert warning in " ".join(table(found).split())


@pytest.mark.parametrize("said", ["yes", ""])
def test_a_model_that_says_one_thing_to_everything_is_told_of(said):
    words = f"the dense model answers {said!r} to every question"
    for accepted in ([], ["yes", "no"]):
        answers = [accepted[i % 2 : i % 2 + 1] for i in range(8)]
        found = answered(answers, {"dense": [said] * 8}, questions=[f"Is there a {i}?" for i in range(8)])
        assert words in found.tasks[0].warnings()[0]
    assert answered([["yes"]] * 8, {"dense": ["yes"] * 8}, questions=list("abcdefgh")).tasks[0].warnings() == []


@pytest.mark.parametrize("accepted", [["b"], ["b"] * 10, ["B."]])
def test_figures_that_mean_something_are_not_warned_of(accepted):
    found = answered([accepted] * 24, {"dense": ["b"] * 23 + ["c"], "fitprune": ["b"] * 24})
    assert found.tasks[0].warnings() == []
    assert found.row("fitprune 60%").relative_accuracy == pytest.approx(24 / 23, abs=1e-6)


def ahead(count, more, less=0):
    """Answers to `count` questions of which the method has `more` that FitPrune has not, and lacks `less`."""
    half = (count - more - less) * 9 // 10  # both right
    ours = ["b"] * (half + less) + ["x"] * (count - half - less)
    theirs = ["b"] * half + ["y"] * less + ["b"] * more
    return ours, theirs + ["y"] * (count - len(theirs))


@pytest.mark.parametrize(
    ("count", "more", "less", "words"),
    [
        (24, 0, 0, "24 questions cannot tell fitprune and dart apart"),
        (24, 3, 0, "24 questions cannot tell fitprune and dart apart; dart is ahead by 12.5 points (0.0..25.0)"),
        (24, 0, 3, "24 questions cannot tell fitprune and dart apart"),
        (24, 12, 0, "fitprune is NOT the best: dart is ahead by 50.0 points"),
        (24, 0, 12, "no method is more accurate than fitprune"),
        (3, 3, 0, "3 questions cannot tell fitprune and dart apart; dart is ahead by 100.0 points"),
        (3, 0, 3, "3 questions cannot tell fitprune and dart apart"),
        (100, 10, 8, "100 questions cannot tell"),
        (640, 0, 0, "no method is more accurate than fitprune; dart as accurate"),
        (640, 20, 17, "dart is ahead by 0.5 points"),
        (640, 40, 10, "more accurate"),
        (640, 10, 40, "no method is more accurate than fitprune"),
    ],
)
def test_few_questions_cannot_tell_methods_apart(count, more, less, words):
    ours, theirs = ahead(count, more, less)
    found = answered([["b"]] * count, {"dense": ["b"] * count, "fitprune": ours, "dart": theirs})
    (best,) = found.best
    assert words in verdict(best)
    assert (
        best.cannot_tell
        == ("cannot tell" in verdict(best))
        == ("*" not in matrix(found.tasks[0], found.rows, found.best))
    )
    assert verdict(best) in table(found)


def test_all_that_are_ahead_by_as_much_are_named():
    ours, theirs = ahead(640, 40)
    said = {"dense": theirs, "fitprune": ours, "dart": theirs, "vtw": theirs, "random": ours}
    (best,) = answered([["b"]] * 640, said).best
    assert "dart and vtw are ahead by" in verdict(best)
    said = {name: answers[:24] for name, answers in said.items()}
    (best,) = answered([["b"]] * 24, said).best
    assert "24 questions cannot tell fitprune, dart, vtw and random apart" in verdict(best)
    (best,) = answered([["b"]] * 24, {**said, "fastv": said["dart"]}).best
    assert "24 questions cannot tell fitprune and 4 other methods apart" in verdict(best)


def test_one_method_alone_is_not_the_best():
    found = answered([["b"]] * 640, {"dense": ["b"] * 640, "fitprune": ["b"] * 640})
    assert found.best == ()
    assert "more accurate" not in table(found)


def test_results_print_as_their_table(tmp_path):
    found = answered([["b"] * 10] * 24, {"dense": ["b"] * 24, "fitprune": ["b"] * 24, "<i>": ["c"] * 24})
    assert str(found) == table(found)
    assert str(found).startswith("t, 24 questions, metric vqa (guessed: ten answers a question)\n")
    assert repr(found) == "Results(t: 24 questions; dense, fitprune 60%, <i> 60%)"
    page = found._repr_html_()
    assert "<td>fitprune 60%</td>" in page
    assert "<i>" not in page
    found.save(tmp_path / "r.json")
    assert str(Results.load(tmp_path / "r.json")) == str(found)
    stated = answered([["b"]] * 2, {"dense": ["b"] * 2}, metric="exact")
    assert str(stated).startswith("t, 2 questions, metric exact\n")
    assert repr(Results(())) == "Results()"
    assert str(Results(())) == ""


@pytest.mark.parametrize(
    ("methods", "names"),
    [(RECIPE, ["recipe"]), ([RECIPE, RECIPE], ["recipe 1", "recipe 2"]), ({"a": RECIPE}, ["a"]), ([], []), ({}, [])],
)
def test_recipes_are_taken_alone_in_a_list_or_by_name(methods, names):
    assert [entry.name for entry in entries_of(methods)] == names


@pytest.mark.parametrize("methods", ["a.json", ["a.json"], {"a": "a.json"}, {"a": None}, None, 3])
def test_what_is_no_method_is_named(methods):
    with pytest.raises(ValueError, match=r"methods hold a (str|NoneType|int): must be a recipe"):
        entries_of(methods)


def test_evaluate_says_what_samples_are():
    model, processor = load_model("digit-scenes")
    sample = load_samples(assets.folder("test"), samples=1)[0]
    for samples, kind in (([{"image": "a.png"}], "dict"), ("digit-scenes/test", "str"), (sample, "Sample"), (3, "int")):
        with pytest.raises(ValueError, match=f"samples of 'questions': {kind}, must be a list of Sample"):
            evaluate(model, processor, samples, {}, timed_batches=0)
    with pytest.raises(ValueError, match="metric='f1'"):
        evaluate(model, processor, [sample], {}, metric="f1", timed_batches=0)


def test_each_task_has_its_own_metric_and_another_needs_no_new_answers(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.jsonl").write_text(
        f'{{"image": "{assets.folder("test")}/images/0000.jpg", "text": "Which digit is blue?", "answer": "9."}}\n'
    )
    (tmp_path / "ten.jsonl").write_text(
        f'{{"image": "{assets.folder("test")}/images/0000.jpg", "text": "Which digit is blue?", '
        '"answer": ["9", "nokia", "nokia", "nokia", "nokia", "nokia", "nokia", "nokia", "nokia", "nokia"]}\n'
    )
    command = ["evaluate", "digit-scenes", "--data", f"{tmp_path}/one.jsonl", f"{tmp_path}/ten.jsonl"]
    command += ["--timed-batches", "0", "--examples", "0", "-o", f"{tmp_path}/r.json"]
    assert main(command) == 0
    found = Results.load(tmp_path / "r.json")
    assert [(task.metric, task.guess, task.dense) for task in found.tasks] == [
        ("normalized", True, 1),
        ("vqa", True, 0.3),
    ]
    monkeypatch.setattr("fitprune.evaluation.evaluate.answer_batch", None)
    assert main([*command, "--metric", "exact"]) == 0
    found = Results.load(tmp_path / "r.json")
    assert [(task.metric, task.guess, task.dense) for task in found.tasks] == [("exact", False, 0), ("exact", False, 1)]
    assert "accepted '9.', answered '9'" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--metric", "vqa"]) == 2
    assert "no question has more accepted answers than 1" in capsys.readouterr().err


def test_every_metric_is_a_function_to_a_number_from_0_to_1():
    for name, metric in METRICS.items():
        assert metric.__name__ == name
        assert metric.__doc__
        for answer in ("b", "", "the", "zzz"):
            assert 0 <= metric(answer, ["b"] * 4) <= 1
