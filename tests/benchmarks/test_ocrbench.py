"""OCRBench: the authors' rule, and points as in their table."""

import json

import pytest

from fitprune.benchmarks.base import ONE_WORD
from fitprune.benchmarks.ocrbench import OCRBENCH
from fitprune.benchmarks.reading import load_benchmark
from fitprune.calibration.samples import Sample

WORD = {
    "dataset_name": "IIIT5K",
    "id": 2843,
    "image_path": "IIIT5K/test/918_1.png",
    "question": "what is written in the image?",
    "answers": "CENTRE",
    "type": "Regular Text Recognition",
}
DIGITS = {**WORD, "dataset_name": "ORAND", "type": "Digit String Recognition", "answers": "12"}
PAGE = {**WORD, "dataset_name": "docVQA", "answers": ["$161,886", "$161886"], "type": "Doc-oriented VQA"}
FORMULA = {
    **WORD,
    "dataset_name": "HME100k",
    "answers": "\\frac { 1 } { 2 }",
    "type": "Handwritten Mathematical Expression Recognition",
}
ALL = (WORD, DIGITS, PAGE, FORMULA)


def root_of(folder, *entries):
    image = folder / "ocrbench/OCRBench_Images/IIIT5K/test/918_1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    (folder / "ocrbench/OCRBench.json").write_text(json.dumps(entries))
    return folder


def test_questions(tmp_path):
    word, _, page, _ = load_benchmark(OCRBENCH, root_of(tmp_path, *ALL))
    assert (word.id, word.text, word.answers) == (
        "IIIT5K-2843",
        "what is written in the image?" + ONE_WORD,
        ("CENTRE",),
    )
    assert (page.id, page.answers) == ("docVQA-2843", ("$161,886", "$161886"))
    assert word.image == tmp_path / "ocrbench/OCRBench_Images/IIIT5K/test/918_1.png"


def test_points_of_types_add_up(tmp_path):
    questions = load_benchmark(OCRBENCH, root_of(tmp_path, *ALL))
    answers = ["It is centre.", "13", "$161886", "\\frac{1}{2}"]
    scores = [OCRBENCH.score(text, each) for text, each in zip(answers, questions, strict=True)]
    assert OCRBENCH.measure(questions).of(scores) == {
        "points": 750,
        "Text Recognition": 250,
        "Regular Text Recognition": 250,
        "Digit String Recognition": 0,
        "Doc-oriented VQA": 250,
        "Handwritten Mathematical Expression Recognition": 250,
    }


def test_a_thousand_questions_have_a_point_each():
    questions = [Sample(number, "q", None, ("a",), "Doc-oriented VQA") for number in range(1000)]
    figures = OCRBENCH.measure(questions).of([1] * 297 + [0] * 703)
    assert (figures["points"], figures["Text Recognition"], figures["Doc-oriented VQA"]) == (297, 0, 297)


@pytest.mark.parametrize(
    ("dataset", "answers", "text", "official"),
    [
        ("docVQA", ["CENTRE"], "It says centre.", 1),
        ("docVQA", ["CENTRE"], "CENTER", 0),
        ("docVQA", ["cat"], "concatenate", 1),
        ("docVQA", ["$137,001.88", "$137001.88"], "137001.88 $137001.88", 1),
        ("docVQA", ["a b"], "A\nB", 1),
        ("docVQA", ["a b"], "a  b", 0),
        ("docVQA", ["a\nb"], "a b", 1),
        ("docVQA", ["a\tb"], "a b", 0),
        ("docVQA", [""], " ", 1),
        ("docVQA", [], "x", 0),
        ("docVQA", ["\uff11\uff12"], "12", 0),  # 1 in lmms-eval
        ("docVQA", ["x "], "x", 1),
        ("docVQA", ["ß"], "SS", 0),
        ("docVQA", ["İ"], "i\u0307", 1),
        ("HME100k", ["\\frac{1}{2}"], "$\\frac {1}\n{2}$", 1),
        ("HME100k", ["X + Y"], "x+y", 0),
        ("HME100k", ["a", "B"], "b B", 1),
        ("HME100k", ["a\tb"], "ab", 0),
    ],
)
def test_scores_of_example_py(dataset, answers, text, official):
    assert OCRBENCH.score(text, Sample(1, "q", None, tuple(answers), facts={"dataset": dataset})) == official


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**WORD, "answers": 5}], r"OCRBench\.json, entry 0: 'answers' is 5, must be text or a list"),
        ([{**WORD, "answers": [5]}], r"entry 0: 'answers' is \[5\], must be text or a list of texts"),
        ([WORD, {k: v for k, v in PAGE.items() if k != "answers"}], r"entry 1: has no 'answers'.*is it another file"),
        ([WORD, PAGE, {**WORD, "question": "q"}], r"entry 2: question 'IIIT5K-2843' is there already \(.*entry 0\)"),
        ([{**WORD, "image_path": "b.png"}], r"ocrbench: 1 of 1 images are missing: .*b\.png"),
    ],
)
def test_broken_entries_are_named_in_one_line(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message) as error:
        load_benchmark(OCRBENCH, root_of(tmp_path, *entries))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"OCRBench\.json: is a JSON dict, must be a list; is it another file"),
        ('[{"id": "é"}]'.encode("latin-1"), r"OCRBench\.json: no text: byte 9 is no UTF-8; save it as UTF-8"),
        (None, r"ocrbench: its questions are missing: .*ocrbench.OCRBench\.json is not there"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, content, message):
    file = root_of(tmp_path, WORD) / "ocrbench/OCRBench.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_benchmark(OCRBENCH, tmp_path)
    assert "\n" not in str(error.value)
