"""ChartQA: two files, relaxed accuracy."""

import json

import pytest

from fitprune.benchmarks.base import ONE_WORD
from fitprune.benchmarks.chartqa import CHARTQA
from fitprune.benchmarks.reading import load_benchmark
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample

HUMAN = [{"imgname": "1.png", "query": "How many?", "label": "14"}, {"imgname": "1.png", "query": "Up?", "label": "No"}]
AUGMENTED = [{"imgname": "2.png", "query": "What share?", "label": "62.5"}]


def root_of(folder, within=""):
    test = folder / "chartqa" / within / "test"
    (test / "png").mkdir(parents=True)
    for name, entries in (("human", HUMAN), ("augmented", AUGMENTED)):
        (test / f"test_{name}.json").write_text(json.dumps(entries))
    for number in (1, 2):
        (test / f"png/{number}.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("within", ["", "ChartQA Dataset"])
def test_questions_of_both_parts(tmp_path, within):
    first, second, third = load_benchmark(CHARTQA, root_of(tmp_path, within))
    assert (first.id, first.text, first.answers) == ("human-0", f"How many?{ONE_WORD}", ("14",))
    assert (second.kind, third.kind, third.id) == ("human", "augmented", "augmented-0")
    assert third.image == tmp_path / "chartqa" / within / "test/png/2.png"


def test_figures(tmp_path):
    questions = load_benchmark(CHARTQA, root_of(tmp_path))
    scores = [CHARTQA.score(text, each) for text, each in zip(["14.5", "no", "50"], questions, strict=True)]
    assert CHARTQA.measure(questions).of(scores) == pytest.approx({"accuracy": 200 / 3, "human": 100, "augmented": 0})


@pytest.mark.parametrize(
    ("text", "label", "official"),
    [
        *(("14", "14", 1), ("14.7", "14", 1), ("14.71", "14", 0), ("13.3", "14", 1), ("14 ", "14", 1)),
        *(("14%", "14", 0), ("62%", "0.62", 1), ("0.6", "62%", 1), ("5%%", "0.05", 1), ("1,000", "1000", 0)),
        *(("1_000", "1000", 1), ("1e3", "1000", 1), ("0", "0", 1), ("0.0", "0", 0), ("0%", "0", 0), ("-5", "5", 0)),
        *(("nan", "nan", 0), ("nan", "5", 0), ("inf", "inf", 0), ("yes", "Yes", 1), ("Yes.", "Yes", 0)),
        *((" Yes", "Yes", 0), ("", "Yes", 0), ("2014", "2011", 1), ("2014", "1914", 0), ("U.S", "U.S.", 0)),
        *(("١٢", "12", 1), ("$5", "$5", 1), ("5", "$5", 0), ("green line", "Green Line", 1), ("STRASSE", "straße", 0)),
    ],
)
def test_scores_of_relaxed_correctness(text, label, official):
    assert CHARTQA.score(text, Sample(1, "q", None, (label,))) == official


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"chartqa: its augmented are missing: .*test_augmented\.json \(or chartqa.ChartQA Dataset.* not there"),
        (b'{"a": 1}', r"test_augmented\.json: is a JSON dict, must be a list; is it another file"),
        (b'[{"imgname": "2.png", "query": "q"}]', r"test_augmented\.json, entry 0: has no 'label', must have text"),
        (b'[{"imgname": "2.png", "query": "q", "label": 5}]', r"entry 0: 'label' is 5, must be text"),
        (b'["q"]', r"entry 0: is a JSON str, must be an object"),
        (b'[{"imgname": "3.png", "query": "q", "label": "5"}]', r"1 of 2 images are missing: .*3\.png"),
        ('[{"query": "é"}]'.encode("latin-1"), r"test_augmented\.json: no text: byte 12 is no UTF-8; save it as UTF-8"),
        (b"[{", r"test_augmented\.json: not JSON .*; copy the file again"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, content, message):
    file = root_of(tmp_path) / "chartqa/test/test_augmented.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_benchmark(CHARTQA, tmp_path)
    assert "\n" not in str(error.value)


def test_no_question_at_all(tmp_path):
    root_of(tmp_path)
    for name in ("human", "augmented"):
        (tmp_path / f"chartqa/test/test_{name}.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no question") as error:
        load_benchmark(CHARTQA, tmp_path)
    assert not isinstance(error.value, BadSample)
