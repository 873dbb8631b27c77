"""MM-Vet: nothing is scored; the upload is what LLaVA's converter writes."""

import pytest

from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import get_benchmark
from helpers.eval_files import lined, put

MMVET = get_benchmark("MM-Vet")


@pytest.mark.parametrize("folder", ["mm-vet", "mm-vet/mm-vet", "mmvet", "mmvet/mm-vet"])
def test_questions_are_asked_as_they_are_and_uploaded_by_name(tmp_path, folder):
    put(
        tmp_path / folder / "llava-mm-vet.jsonl",
        [lined(0, "v1_0.png", "What is x in the equation?"), lined(7, "b", "Why?")],
    )
    for name in ("v1_0.png", "b"):
        put(tmp_path / folder / "images" / name, b"")
    questions = load_benchmark(MMVET, tmp_path)
    assert [(sample.id, sample.text) for sample in questions] == [(0, "What is x in the equation?"), (7, "Why?")]
    assert (MMVET.score, MMVET.max_new_tokens) == (None, 1024)
    MMVET.upload.write(questions, ["x = \u22121", 'It is "so".\n'], tmp_path / "up.json")
    assert (tmp_path / "up.json").read_bytes() == b'{\n  "v1_0": "x = \\u22121",\n  "v1_7": "It is \\"so\\".\\n"\n}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([lined(0, "a", "?"), lined("0", "b", "?")], "llava-mm-vet.jsonl:2: question '0' is there already"),
        ([{"question_id": 0, "image": "a"}], "llava-mm-vet.jsonl:1: has no 'text'"),
        ([lined(None, "a", "?")], "llava-mm-vet.jsonl:1: 'question_id' is None, must be a whole number or text"),
        ([], "llava-mm-vet.jsonl: holds no question"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, lines, words):
    put(tmp_path / "mm-vet/llava-mm-vet.jsonl", lines)
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(MMVET, tmp_path, images=False)
    assert "\n" not in str(error.value)
