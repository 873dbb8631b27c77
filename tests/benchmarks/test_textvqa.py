"""TextVQA: image and question name an annotation; files of other states are refused by name."""

import re

import pytest

from fitprune.benchmarks.base import line_of
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

TEXTVQA = get_benchmark("textvqa")
ONE_WORD = "\nAnswer the question using a single word or phrase."
QUESTIONS = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"


def entry(image, question, answers):
    return {"image_id": image, "question": question, "answers": answers, "question_id": 34602}


ENTRIES = [
    entry("0a", "what TIME is it?", ["12:30"] * 10),
    entry("0a", "What is the brand?", ["nokia"] * 3 + ["Nokia 3310"] * 7),
    entry("0b", "What is the brand?", ["unanswerable"] * 10),
    entry("0c", "not asked", ["x"] * 10),
]
LINES = [
    lined("0a", "0a.jpg", "What is the brand?\nReference OCR token: NOKIA, 12:30" + ONE_WORD),
    lined("0a", "0a.jpg", "What time is it?\nReference OCR token: NOKIA, 12:30" + ONE_WORD),
    lined("0b", "0b.jpg", "What is the brand?" + ONE_WORD),
]


def root(tmp_path, lines=LINES, data=ENTRIES):
    put(tmp_path / QUESTIONS, lines)
    put(tmp_path / ANNOTATIONS, data if isinstance(data, bytes) else {"data": data})
    return tmp_path


def test_a_question_has_the_answers_of_its_image_and_words(tmp_path):
    brand, time, other = load_benchmark(TEXTVQA, root(tmp_path), images=False)
    assert (brand.id, time.id, other.id) == ("0a", "0a", "0b")
    assert (brand.answers[0], time.answers[0], other.answers[0]) == ("nokia", "12:30", "unanswerable")
    assert brand.text == LINES[0]["text"]
    scores = [TEXTVQA.score(*pair) for pair in (("Nokia", brand), ("12:30.", time), ("Nokia", other))]
    assert scores == pytest.approx([0.9, 1, 0])
    assert TEXTVQA.measure([brand, time, other]).of(scores) == pytest.approx({"accuracy": 190 / 3})


def test_pictures_lie_in_train_images(tmp_path):
    root(tmp_path)
    for name in ("0a", "0b"):
        put(tmp_path / f"textvqa/train_images/{name}.jpg", b"")
    assert [sample.image.name for sample in load_benchmark(TEXTVQA, tmp_path)] == ["0a.jpg", "0a.jpg", "0b.jpg"]


@pytest.mark.parametrize(
    "prompt",
    [
        "What TIME is it?",
        "What time is it?" + ONE_WORD,
        "What time is it?\nReference OCR token: NOKIA, 12:30" + ONE_WORD,
        "Reference OCR token: NOKIA, 12:30\nWhat time is it?" + ONE_WORD,
        "OCR tokens: NOKIA, 12:30. Question: What time is it? Short answer:",
    ],
)
def test_answers_belong_to_their_question_with_or_without_ocr_tokens(tmp_path, prompt):
    _, time, _ = load_benchmark(TEXTVQA, root(tmp_path), images=False)
    assert TEXTVQA.key({"question_id": "0a", "prompt": prompt}) == TEXTVQA.key(line_of(time))


@pytest.mark.parametrize(
    ("lines", "data", "words"),
    [
        (
            LINES,
            ENTRIES[1:],
            r"ocr.jsonl:2: question \('0a', 'what time is it\?'\) is not in .*TextVQA_0.5.1_val.json: .*another state",
        ),
        (LINES, ENTRIES + ENTRIES[:1], r"val.json, entry 4: question \('0a', .* is there already \(.*entry 0\)"),
        (LINES + LINES[:1], ENTRIES, r"ocr.jsonl:4: question .* is there already \(.*ocr.jsonl:1\)"),
        (LINES, [entry("0a", "What is the brand?", ["nokia"] * 9), *ENTRIES[::2]], "entry 0: 'answers' .* 10 texts"),
        (LINES, [entry("0a", "What is the brand?", [1] * 10), *ENTRIES[::2]], "entry 0: 'answers' .* 10 texts"),
        (LINES, [{"question": "?"}], "entry 0: has no 'image_id'"),
        (LINES, b"[]", r"val.json: is a JSON list, must be an object; is it another file\?"),
        (LINES, b'{"questions": []}', "val.json: has no 'data'"),
        (LINES, '{"data": ["é"]}'.encode("latin-1"), "val.json: no text: byte 11 is no UTF-8; save it as UTF-8"),
        ([], ENTRIES, "ocr.jsonl: holds no question"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, lines, data, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(TEXTVQA, root(tmp_path, lines, data), images=False)
    assert not re.search("\n", str(error.value))
