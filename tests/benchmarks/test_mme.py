"""MME: pairs of questions, the authors' way to read answers, their sums and their files."""

import json

import pytest

from fitprune.benchmarks.base import ONE_WORD, line_of
from fitprune.benchmarks.mme import CATEGORIES, MME, answer_of
from fitprune.benchmarks.reading import load_benchmark
from fitprune.calibration.entry import BadSample

OFTEN = {"artwork", "celebrity", "landmark", "posters", "scene"}  # categories with folders for images and answers


def names(category, number):
    """Where a category has image `number`, and the answers to its questions."""
    if category in OFTEN:
        return f"{category}/images/{number}.jpg", f"{category}/questions_answers_YN/{number}.txt"
    return f"{category}/{number}.png", f"{category}/{number}.txt"


def root_of(folder, images):
    """Make a data root of (category, number) each, with the questions "Is it A?" (yes) and "Is it B?" (no)."""
    lines = []
    for category, number in images:
        image, file = names(category, number)
        for name, content in ((image, ""), (file, "Is it A? Please answer yes or no.\tYes\n" + B)):
            path = folder / "MME" / "MME_Benchmark_release_version" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        for letter in "AB":
            text = f"Is it {letter}?{ONE_WORD}"
            lines.append({"question_id": image, "image": image, "text": text, "category": category})
    rewrite(folder, lines)
    return folder


B = "Is it B?  Please answer yes or no.\tNo\n"  # with two blanks, as in MME's category of colours


def rewrite(folder, lines):
    (folder / "MME/llava_mme.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "MME/llava_mme.jsonl").read_text().splitlines()]


@pytest.fixture
def root(tmp_path):
    return root_of(tmp_path, [("OCR", "1"), ("OCR", "2"), ("scene", "1"), ("code_reasoning", "0020")])


def test_questions_have_the_answers_of_their_images(root):
    questions = load_benchmark(MME, root)
    first, second = questions[4:6]
    assert (first.id, first.text, first.kind) == ("scene/images/1.jpg", f"Is it A?{ONE_WORD}", "scene")
    assert (first.answers, second.answers) == (("Yes",), ("No",))
    assert first.image == root / "MME/MME_Benchmark_release_version/scene/images/1.jpg"


def test_a_newer_release_has_folders_in_every_category(root):
    folder = root / "MME/MME_Benchmark_release_version/OCR"
    for name, ending in (("images", "png"), ("questions_answers_YN", "txt")):
        (folder / name).mkdir()
        for path in folder.glob(f"*.{ending}"):
            path.rename(folder / name / path.name)
    assert load_benchmark(MME, root)[0].image == folder / "images/1.png"


def test_a_question_is_found_by_its_words_whichever_instruction_ends_it():
    line = {"question_id": "OCR/1.png", "prompt": f"Is it A?{ONE_WORD}"}
    for end in ("", " Please answer yes or no.", "  Please answer yes or no."):
        assert MME.key({**line, "prompt": f"Is it A?{end}"}) == MME.key(line)
    assert MME.key({**line, "prompt": "Is it B?"}) != MME.key(line)


@pytest.mark.parametrize(
    ("text", "official"),
    [
        *(("Yes", "yes"), ("NO.", "no"), ("No, it is not", "no"), ("yes\n", "yes"), ("", "other"), ("Maybe", "other")),
        *(("  Yes", "other"), (" Yes", "yes"), ("   no", "other"), ("  no", "no"), ("Not sure", "no"), ("None", "no")),
        *(
            ("Norway", "no"),
            ("Eyes", "yes"),
            ("noyes", "no"),
            ("I know", "other"),
            ("Unknown", "other"),
            ("y", "other"),
        ),
        *(
            ("İyes", "other"),
            ("İno", "no"),
            ("\uff59\uff45\uff53", "other"),
            ("**Yes**", "other"),
            ('"No"', "no"),
            ("A: no", "other"),
        ),
        *(("A no", "no"), ("snow", "no"), ("yno", "no"), ("n-o", "other"), ("nyes", "yes"), ("yesno", "yes")),
    ],
)
def test_an_answer_is_read_as_by_calculation_py(text, official):
    assert answer_of(text) == official


def test_figures_of_every_category(tmp_path):
    questions = load_benchmark(MME, root_of(tmp_path, [(name, str(i)) for name in CATEGORIES for i in range(2)]))
    measure = MME.measure(questions)
    figures = measure.of([1] * len(questions))
    assert list(figures) == ["perception", "cognition", *CATEGORIES]
    assert figures == {"perception": 2000, "cognition": 800} | dict.fromkeys(CATEGORIES, 200)
    assert measure.of([1, 0] * 28) == {"perception": 500, "cognition": 200} | dict.fromkeys(CATEGORIES, 50)


def test_both_answers_of_an_image_count_once_more(root):
    scores = [1, 1, 1, 0, 0, 0, 0, 1]
    figures = MME.measure(load_benchmark(MME, root)).of(scores)
    assert figures == {"perception": 75 + 50, "cognition": 50, "scene": 0, "OCR": 125, "code_reasoning": 50}


def test_images_are_drawn_whole(root):
    for seed in range(5):
        questions = load_benchmark(MME, root, samples=3, seed=seed)
        assert len(questions) == 4
        assert [each.id for each in questions[::2]] == [each.id for each in questions[1::2]]


def test_the_folder_for_calculation_py(root, tmp_path):
    answers = ["Yes", "No", "é\ud800", "two\nlines", "a\ttab", "", "No", "Yes."]
    MME.upload.write(load_benchmark(MME, root), answers, tmp_path / "out")
    text = {path.name: path.read_bytes().decode() for path in (tmp_path / "out").iterdir()}
    a, b = "Is it A? Please answer yes or no.\tYes\t", "Is it B?  Please answer yes or no.\tNo\t"
    assert text == {
        "OCR.txt": f"1.txt\t{a}Yes\n1.txt\t{b}No\n2.txt\t{a}é?\n2.txt\t{b}two lines\n",
        "scene.txt": f"1.txt\t{a}a tab\n1.txt\t{b}\n",
        "code_reasoning.txt": f"0020.txt\t{a}No\n0020.txt\t{b}Yes.\n",
    }


def without_the_release(root):
    (root / "MME/MME_Benchmark_release_version").rename(root / "away")


def without_a_file(root):
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").unlink()


def with_another_question(root):
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").write_text("Is it C? Please answer yes or no.\tYes\n")


def with_no_label(root):
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").write_text("Is it A? Please answer yes or no. Yes\n")


def in_latin(root):
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").write_bytes("Is it é?\tYes\n".encode("latin-1"))


def with_one_question(root):
    rewrite(root, lines_of(root)[:-1])


def with_a_question_again(root):
    first, _, *rest = lines_of(root)
    rewrite(root, [first, first, *rest])


def of_another_benchmark(root):
    rewrite(root, [{"question_id": "12", "text": "x"}])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_the_release, r"mme: its annotations are missing: .*MME_Benchmark_release_version is not there"),
        (without_a_file, r"llava_mme\.jsonl:3: the answers of its image are missing: .*OCR.2\.txt is not there"),
        (with_another_question, r"llava_mme\.jsonl:3: 'Is it A\?' is not in .*2\.txt: one of the two is of another st"),
        (with_no_label, r"2\.txt:1: is 'Is it A\? .*', must be a question, a tab, and Yes or No"),
        (in_latin, r"2\.txt: no text: byte 6 is no UTF-8; save it as UTF-8"),
        (with_one_question, r"llava_mme\.jsonl:7: image code_reasoning/0020\.png has 1 question\(s\), must have two"),
        (with_a_question_again, r"llava_mme\.jsonl:2: question .* is there already \(.*llava_mme\.jsonl:1\)"),
        (of_another_benchmark, r"llava_mme\.jsonl:1: 'question_id' is '12', must begin with existence, count"),
    ],
)
def test_broken_files_are_named_in_one_line(root, broken, message):
    broken(root)
    with pytest.raises((BadSample, FileNotFoundError), match=message) as error:
        load_benchmark(MME, root)
    assert "\n" not in str(error.value)


def test_answers_files_are_of_the_same_lines(root):
    keys = {MME.key(line_of(each)) for each in load_benchmark(MME, root)}
    assert len(keys) == 8
