"""MMBench: cells as pandas reads them, prompts, the letter without a judge, circles, spreadsheets; official figures."""

import base64
import csv
import io
import json
import sys

import openpyxl
import pytest
from PIL import Image

from fitprune.benchmarks.answers import read_answers, write_answers
from fitprune.benchmarks.base import line_of
from fitprune.benchmarks.mmbench import answer_of
from fitprune.benchmarks.reading import drawn, load_benchmark
from fitprune.benchmarks.table import get_benchmark
from fitprune.cli.main import main
from helpers.eval_files import put
from helpers.playground import make_playground
from helpers.real_answers import SLICE, figures, whole

MMB, CN, TEST = get_benchmark("MMBench"), get_benchmark("mmbench_cn"), get_benchmark("mmbench-test")
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
HEAD += ["l2-category", "comment", "split"]
XLSX = "answers_upload/mmbench_dev_20230712/llava-v1.5-13b.xlsx"


def png():
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(index, options, answer="A", question="What?", hint="", category="x", **others):
    cells = dict(zip("ABCD", [*options, "", "", ""], strict=False))
    rest = {"image": png(), "source": "s", "l2-category": "l2", "comment": "", "split": "dev"}
    return (
        {"index": index, "question": question, "hint": hint, **cells, "answer": answer, "category": category}
        | rest
        | others
    )


ROWS = [
    row(5, ["red", "blue"], "A"),
    row(7, ["cat", "dog", "cow", "pig"], "D", category="y", hint="Look."),
    row(1000005, ["blue", "red"], "B"),
    row(1000007, ["dog", "cow", "pig", "cat"], "C", category="y", hint="Look."),
    row(9, ["one", "two", "three"], "A"),
]


def table(rows, head=HEAD):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, head, delimiter="\t", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def root(tmp_path, rows=ROWS, file="mmbench/mmbench_dev_20230712.tsv", head=HEAD):
    put(tmp_path / file, rows if isinstance(rows, bytes) else table(rows, head))
    return tmp_path


def test_a_row_is_asked_as_llava_asks_it(tmp_path):
    red, cat, *_ = load_benchmark(MMB, root(tmp_path))
    assert line_of(red)["prompt"] == "What?\nA. red\nB. blue"
    assert red.text == "What?\nA. red\nB. blue" + SUFFIX
    assert cat.text == "Look.\nWhat?\nA. cat\nB. dog\nC. cow\nD. pig" + SUFFIX
    assert (cat.id, cat.answers, cat.kind, MMB.max_new_tokens) == (7, ("D",), "y", 1024)
    assert cat.load_image().size == (3, 2)


@pytest.mark.parametrize("folder", ["mmbench_cn", "mmbench"])
def test_chinese_has_its_own_suffix_and_lies_in_either_folder(tmp_path, folder):
    rows = [row(5, ["红", "蓝"], question="什么?")]
    questions = load_benchmark(CN, root(tmp_path, rows, f"{folder}/mmbench_dev_cn_20231003.tsv"))
    assert questions[0].text == "什么?\nA. 红\nB. 蓝\n请直接回答选项字母。"
    assert questions[0].facts["prompt"] == "什么?\nA. 红\nB. 蓝"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["a", "b", "", "d"], 2),  # pandas has nothing there, and LLaVA ends
        (["a", "N/A", "c", "d"], 1),
        (["a", "b", "None", "d"], 2),
        (["a", "b", "NONE", "d"], 2),
        (["a", "b", "NAN", "d"], 2),
        (["a", "b", "none of these", "n.a."], 4),
        (["1", "2.50", "True", " null"], 4),
        (['"q" r', "tab\tbed", "line\nbreak", "\u2028\x85\x0b"], 4),
    ],
)
def test_choices_end_where_llava_s_do(tmp_path, options, count):
    questions = load_benchmark(MMB, root(tmp_path, [row(5, options, hint="nan")]))
    more = questions[0].facts["more"]
    assert (more["options"], more["option_char"]) == (options[:count], list("ABCD"[:count]))
    assert questions[0].facts["prompt"] == "\n".join(
        ["What?", *(f"{letter}. {option}" for letter, option in zip("ABCD", options[:count], strict=False))]
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. blue", "B"),
        ("**B**", "B"),
        ("Option B is what I see", ""),  # not among the last four words, and no choice's text
        ("B it is of course", ""),
        ("it is B of course", "B"),
        ("A or B", ""),
        ("b", ""),
        ("It is Blue.", "B"),
        ("blue, not red", ""),
        ("The answer is blue", "B"),
        ("The answer is a red one, A or B", "A"),
        ("the correct answer is **c**", "C"),
        ("answer is D", ""),  # there is none
        ("A dog", "A"),
        ("Z", ""),
        ("Z blue", ""),
        ("Cannot determine the answer: B", ""),
        ("blue " * 9, ""),  # longer than all choices twice
        ("", ""),
    ],
)
def test_letters_are_read_as_vlmevalkit_does_without_a_judge(text, letter):
    assert answer_of(text, {"A": "red", "B": "blue", "C": "Green"}) == letter


def test_a_question_is_right_if_it_is_in_all_its_rows(tmp_path):
    questions = load_benchmark(MMB, root(tmp_path))
    scores = [MMB.score(text, each) for text, each in zip("ADBAA", questions, strict=True)]
    assert scores == [1, 1, 1, 0, 1]
    every = MMB.measure(questions).of(scores)
    assert every == pytest.approx({"circular": 200 / 3, "rows": 80, "x": 100, "y": 0})
    assert next(iter(every)) == "circular"
    assert MMB.measure(questions).counts([1, 1, 1, 0, 1]).shape == (3, 8)


def test_a_draw_has_whole_questions(tmp_path):
    questions = drawn(MMB, load_benchmark(MMB, root(tmp_path)), 2, seed=1)
    assert {each.id for each in questions} in ({5, 1000005}, {7, 1000007}, {9, 5, 1000005}, {9, 7, 1000007})


def test_lines_of_answers_are_those_of_llava(tmp_path):
    questions = load_benchmark(MMB, root(tmp_path))
    write_answers(tmp_path / "a.jsonl", questions, ["A"] * 5, "llava")
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert line.pop("answer_id")
    assert list(line.items()) == [
        ("question_id", 5),
        ("round_id", 0),
        ("prompt", "What?\nA. red\nB. blue"),
        ("text", "A"),
        ("options", ["red", "blue"]),
        ("option_char", ["A", "B"]),
        ("model_id", "llava"),
        ("metadata", {}),
    ]


def test_the_upload_is_what_the_converter_writes_and_is_read_back(tmp_path):
    questions = load_benchmark(MMB, root(tmp_path))
    MMB.upload.save(questions, ["A", "D", "B.\x0b", "=A1", "A"], tmp_path / "up.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "up.xlsx").active
    assert (sheet.title, sheet["G5"].data_type) == ("Sheet1", "s")
    assert list(sheet.iter_rows(values_only=True))[:4] == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (5, "What?", "red", "blue", None, None, "A", "A", "dev"),
        (7, "What?", "cat", "dog", "cow", "pig", "D", "D", "dev"),
        (1000005, "What?", "blue", "red", None, None, "B.", "B", "dev"),
    ]
    assert figures(MMB, None, tmp_path / "up.xlsx") == pytest.approx({"circular": 200 / 3, "rows": 80})
    again = MMB.rebuild(read_answers(tmp_path / "up.xlsx"))
    MMB.upload.save(again, ["A", "D", "B.", "=A1", "A"], tmp_path / "again.xlsx")
    other = openpyxl.load_workbook(tmp_path / "again.xlsx").active
    assert list(other.iter_rows(values_only=True)) == list(sheet.iter_rows(values_only=True))


def test_test_has_no_answers_and_is_written_for_the_server(tmp_path):
    head = [name for name in HEAD if name != "answer"]
    questions = load_benchmark(TEST, root(tmp_path, file="mmbench/mmbench_test_20230712.tsv", head=head))
    assert (TEST.score, questions[0].answers) == (None, ())
    TEST.upload.save(questions, ["A"] * 5, tmp_path / "up.xlsx")
    first = next(openpyxl.load_workbook(tmp_path / "up.xlsx").active.iter_rows(values_only=True))
    assert first == ("index", "question", "A", "B", "C", "D", "prediction", "split")


def test_figures_are_the_official_ones_on_a_slice_of_real_answers():
    every = figures(MMB, None, SLICE / "mmbench/llava-v1.5-13b.xlsx")
    assert every == pytest.approx({"circular": 45.45454545454545, "rows": 68.42105263157895})


def test_figures_are_the_published_ones_on_all_real_answers():
    every = figures(MMB, None, whole() / "mmbench" / XLSX)
    assert {name: round(value, 2) for name, value in every.items()} == {"circular": 67.69, "rows": 76.45}


def test_lines_without_questions_need_the_table():
    with pytest.raises(ValueError, match=r"a:1: has no 'question': .* pass --data-root"):
        MMB.rebuild([("a:1", {"question_id": 5, "text": "A"})])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("five", ["a"])], "tsv, row 1: 'index' is 'five', must be a whole number"),
        ([row(5, ["a"], question="")], "tsv, row 1: 'question' is empty"),
        ([row(5, [""])], "tsv, row 1: 'A' is empty"),
        ([row(5, ["a"], answer="")], "tsv, row 1: 'answer' is None, must be one of A, B, C, D"),
        ([row(5, ["a"], image="241")], "tsv, row 1: 'image' is '241', must be a picture in base64"),
        ([ROWS[0], row(5, ["a"])], "tsv, row 2: question '5' is there already"),
        (table(ROWS)[:-9], "tsv, row 5: has not as many columns as the first line"),
        (table(ROWS).replace(b"\tdev", b"\tdev\tmore", 1), "tsv, row 1: has not as many columns as the first line"),
        (table(ROWS, [name for name in HEAD if name != "image"]), "tsv, row 1: has no 'image'"),
        (b"index\tquestion\n1\t\xff\n", "tsv: no text: byte 17 is no UTF-8"),
        (b"", "tsv: holds no question"),
    ],
)
def test_a_broken_table_is_named_in_one_line(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words) as error:
        load_benchmark(MMB, root(tmp_path, rows))
    assert "\n" not in str(error.value)


def test_a_spreadsheet_that_cannot_be_written_is_refused_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    root = tmp_path / "root"
    make_playground(root, 4)
    command = ["--benchmark", "mmbench", "--data-root", str(root), "-o", str(tmp_path / "r.json")]
    assert main(["evaluate", "/no-such-model", *command]) == 1
    error = (
        "fitprune: error: mmbench: openpyxl is needed to write its upload file: pip install 'fitprune[benchmarks]'\n"
    )
    assert capsys.readouterr().err == error
