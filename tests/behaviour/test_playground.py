"""Every benchmark from its files to its figures, through the command line, on a small copy of LLaVA's eval folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fitprune.benchmarks.answers import matched, read_answers, scored, write_answers
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import BENCHMARKS
from fitprune.cli.main import main
from helpers.playground import make_playground

QUESTIONS = 4
METHODS = ["--methods", "fastv", "--flops-reduction", "0.6", "--timed-batches", "0", "--examples", "0"]
SCORED = [name for name, benchmark in BENCHMARKS.items() if benchmark.score]
# A process that ends itself, as nothing else could stop it, after some batches.
DIES = """
import os, signal, sys
from fitprune.cli.main import main
from fitprune.evaluation import evaluate

answer, left = evaluate.answer_batch, [int(sys.argv.pop(1))]

def dying(*args):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return answer(*args)

evaluate.answer_batch = dying
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """The root, and benchmark -> number of questions."""
    root = tmp_path_factory.mktemp("playground") / "data" / "eval"
    return root, make_playground(root, QUESTIONS)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_are_made_each_time(playground, tmp_path):
    make_playground(tmp_path, QUESTIONS)
    assert contents(tmp_path) == contents(playground[0])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_question_is_read_and_right_answers_score_highest(name, playground, tmp_path):
    root, numbers = playground
    benchmark = BENCHMARKS[name]
    samples = load_benchmark(benchmark, root)
    assert len(samples) == numbers[name] >= QUESTIONS
    for sample in samples:
        assert sample.image is None or max(sample.load_image().size) == 96
    texts = [sample.answers[0] if sample.answers else "" for sample in samples]
    write_answers(tmp_path / "a.jsonl", samples, texts, "someone")
    assert matched(benchmark, samples, read_answers(tmp_path / "a.jsonl")) == (samples, texts)
    if benchmark.score:
        assert next(iter(scored(benchmark, samples, texts).values())) == benchmark.maximum


def test_everything_is_found_under_the_root(playground, capsys):
    root, numbers = playground
    assert main(["benchmarks", "--data-root", str(root)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "missing" not in words
    for name, benchmark in BENCHMARKS.items():
        assert f"{name} {benchmark.title} {benchmark.metric} {numbers[name]} questions; " in words


def command(root, out):
    where = ["--data-root", str(root), "-o", str(out / "results.json")]
    return ["evaluate", "digit-scenes", "--benchmark", *BENCHMARKS, *where, *METHODS]


@pytest.fixture(scope="module")
def done(playground, tmp_path_factory):
    """The folder of a run of every benchmark, dense and 60%."""
    out = tmp_path_factory.mktemp("done")
    assert main(command(playground[0], out)) == 0
    return out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_run_writes_answers_that_score_as_its_results_say(name, playground, done, tmp_path, capsys):
    root, numbers = playground
    rows = [row for row in json.loads((done / "results.json").read_text())["rows"] if row["task"] == name]
    assert [row["method"] for row in rows] == ["dense", "fastv"]
    benchmark, paths = (
        BENCHMARKS[name],
        [done / "results.answers" / name / f"{each}.jsonl" for each in ("dense", "fastv-60")],
    )
    for row, path in zip(rows, paths, strict=True):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == numbers[name] == row["samples"]
        assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= lines[0].keys()
        upload = path.with_suffix(f".upload{benchmark.upload.ending}") if benchmark.upload else path
        assert upload.exists()
        if benchmark.score is None:
            assert row["accuracy"] is None
            continue
        out = tmp_path / f"{path.stem}.json"
        assert main(["score", name, "--answers", str(path), "--data-root", str(root), "-o", str(out)]) == 0
        (score,) = json.loads(out.read_text())["scores"]
        assert row["figures"] == pytest.approx(score["figures"], abs=1e-5)


def test_most_figures_are_above_nothing(done):
    rows = json.loads((done / "results.json").read_text())["rows"]
    assert len({row["task"] for row in rows if row["accuracy"]}) > len(SCORED) / 2


def environment():
    """As many threads as here: on some processors (AMX) sums depend on how they are split."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_run_killed_in_the_middle_goes_on_and_gives_the_same_bytes(playground, done, tmp_path):
    run = [sys.executable, "-c", DIES, "9", *command(playground[0], tmp_path)]
    assert subprocess.run(run, capture_output=True, check=False, env=environment()).returncode < 0
    left = (tmp_path / "results.samples.jsonl").read_bytes()
    assert 9 < left.count(b"\n") < (done / "results.samples.jsonl").read_bytes().count(b"\n")
    assert contents(tmp_path).keys() == {"results.samples.jsonl"}
    assert main(command(playground[0], tmp_path)) == 0
    assert contents(tmp_path) == contents(done)


def test_two_processes_give_the_same_bytes(playground, done, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = [*launcher, "-m", "fitprune.cli.main", *command(playground[0], tmp_path)]
    ended = subprocess.run(run, capture_output=True, text=True, check=False, env=environment())
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("TextVQA val, 4 questions") == 1  # one process speaks
    assert contents(tmp_path) == contents(done)


def edit(root, name, change):
    path = root / name
    path.write_bytes(change(path.read_bytes()))


def without(root, name):
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def other_state(_):
    """POPE's random file as it is in newer states: of 3,000 lines, none of which is the same."""
    line = {"image": "COCO_val2014_000000016631.jpg", "text": "Is there a person in the image?", "label": "yes"}
    return "".join(json.dumps({"question_id": n + 1, **line}) + "\n" for n in range(3000)).encode()


def first_line_again(lines):
    return lines + lines.splitlines(keepends=True)[0]


def changed(name, value=None):
    """Change a JSON file by setting a value, or by taking it out, where the name is found first."""

    def change(content):
        whole = json.loads(content)
        entries = whole if isinstance(whole, list) else whole.get("data") or list(whole.values())
        if value is None:
            del entries[1][name]
        else:
            entries[1][name] = value
        return json.dumps(whole).encode()

    return change


MALFORMED = {
    # what: benchmark, exit code, what is done to the root, the message
    "no annotations": ("textvqa", 1, lambda root: without(root, "textvqa/TextVQA_0.5.1_val.json"),
        "textvqa: its annotations are missing: ROOT/textvqa/TextVQA_0.5.1_val.json is not there"),
    "another state of POPE": ("pope", 2, lambda root: edit(root, "pope/coco/coco_pope_random.json", other_state),
        "ROOT/pope/coco/coco_pope_random.json:1: is not the label of ROOT/pope/llava_pope_test.jsonl:2: the file is of "
        "another state than the questions, whose random one has 2,910 lines (AoiDragon/POPE at e3e39262)"),
    "an id twice": ("gqa", 2, lambda root: edit(root, "gqa/llava_gqa_testdev_balanced.jsonl", first_line_again),
        "ROOT/gqa/llava_gqa_testdev_balanced.jsonl:5: question '201307251' is there already (ROOT/gqa/llava_gqa_testdev"
        "_balanced.jsonl:1): remove one of the two"),
    "images are missing": ("vizwiz", 2,
        lambda root: [without(root, f"vizwiz/test/VizWiz_test_0000000{number}.jpg") for number in (1, 3)],
        "vizwiz: 2 of 4 images are missing: ROOT/vizwiz/test/VizWiz_test_00000001.jpg, ROOT/vizwiz/test/VizWiz_test_"
        "00000003.jpg; put them there"),
    "no folder of images": ("docvqa", 1, lambda root: without(root, "docvqa/documents"),
        "docvqa: its images are missing: ROOT/docvqa/documents (or "),
    "latin-1": ("textvqa", 2,
        lambda root: edit(root, "textvqa/TextVQA_0.5.1_val.json", lambda old: old.replace(b"Poster", b"Caf\xe9")),
        "ROOT/textvqa/TextVQA_0.5.1_val.json: no text: byte 178 is no UTF-8; save it as UTF-8"),
    "cut": ("vqav2-val", 2,
        lambda root: edit(root, "vqav2/v2_mscoco_val2014_annotations.json", lambda old: old[: len(old) // 2]),
        "ROOT/vqav2/v2_mscoco_val2014_annotations.json: not JSON (Unterminated string starting at); copy the file "
        "again"),
    "a line cut": ("mmvet", 2, lambda root: edit(root, "mm-vet/llava-mm-vet.jsonl", lambda old: old[:-20]),
        "ROOT/mm-vet/llava-mm-vet.jsonl:4: not JSON (Expecting ',' delimiter); copy the file again"),
    "a picture cut": ("mmbench", 2, lambda root: edit(root, "mmbench/mmbench_dev_20230712.tsv", lambda old: old[:-900]),
        "ROOT/mmbench/mmbench_dev_20230712.tsv, row 9: has not as many columns as the first line; copy the file again"),
    "another type": ("chartqa", 2,
        lambda root: edit(root, "chartqa/ChartQA Dataset/test/test_human.json", lambda old: b'{"all": ' + old + b"}"),
        "ROOT/chartqa/ChartQA Dataset/test/test_human.json: is a JSON dict, must be a list; is it another file?"),
    "a key is missing": ("scienceqa", 2,
        lambda root: edit(root, "scienceqa/llava_test_CQM-A.json", changed("conversations")),
        "ROOT/scienceqa/llava_test_CQM-A.json, entry 1: has no 'conversations', must have a list; is it another file?"),
    "another answer": ("scienceqa", 2, lambda root: edit(root, "scienceqa/problems.json", changed("answer", 4)),
        "ROOT/scienceqa/problems.json, problem 11: 'answer' is 4, ROOT/scienceqa/llava_test_CQM-A.json, entry 1 has A: "
        "one is of another state"),
    "another split": ("docvqa", 2,
        lambda root: shutil.copy(root / "docvqa/test_v1.0.json", root / "docvqa/val_v1.0_withQT.json"),
        "ROOT/docvqa/val_v1.0_withQT.json, entry 0: has no 'answers', must have a list; is it another file?"),
    "empty": ("seed", 2, lambda root: edit(root, "seed_bench/llava-seed-bench.jsonl", lambda _: b""),
        "ROOT/seed_bench/llava-seed-bench.jsonl: has no question 101669, which is in ROOT/seed_bench/SEED-Bench.json"),
    "answers of an image are missing": ("mme", 2,
        lambda root: without(root, "MME/MME_Benchmark_release_version/scene/questions_answers_YN/0020.txt"),
        "ROOT/MME/llava_mme.jsonl:27: the answers of its image are missing: ROOT/MME/MME_Benchmark_release_version/"
        "scene/questions_answers_YN/0020.txt is not there"),
    "one folder too high": ("ocrbench", 1, lambda root: root.rename(root.with_name("eval")) and root.mkdir(),
        "ocrbench: its questions are missing: ROOT/ocrbench/OCRBench.json is not there"),
    "no root": ("ocrbench", 1, lambda root: root.rename(root.with_name("eval")),
        "data root ROOT is no folder: pass the one that holds ocrbench/"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_root_is_one_line_that_names_file_and_remedy(case, playground, tmp_path, capsys):
    name, code, damage, message = MALFORMED[case]
    root, out = tmp_path / "root", tmp_path / "out"
    first = BENCHMARKS[name].needs[0].places[0].split("/")[0]
    shutil.copytree(playground[0] / first, root / first)
    damage(root)
    out.mkdir()
    before = contents(tmp_path)
    wrong = ["evaluate", "/no-such-model", "--benchmark", name, "--data-root", str(root)]
    assert main([*wrong, *METHODS, "-o", str(out / "results.json")]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line.replace(str(root), "ROOT")
    assert contents(tmp_path) == before


def test_a_picture_that_cannot_be_read_is_named_before_the_first_answer(playground, tmp_path, capsys):
    shutil.copytree(playground[0] / "gqa", tmp_path / "root/gqa")
    edit(tmp_path, "root/gqa/data/images/n161315.jpg", lambda old: old[:500])
    before = contents(tmp_path)
    options = ["--benchmark", "gqa", "--data-root", str(tmp_path / "root"), "-o", str(tmp_path / "results.json")]
    assert main(["evaluate", "digit-scenes", *options, *METHODS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "llava_gqa_testdev_balanced.jsonl:3: " in line
    assert "n161315.jpg cannot be decoded" in line
    assert contents(tmp_path) == before


def test_answers_for_other_questions_are_refused(playground, tmp_path, capsys):
    root = playground[0]
    samples = load_benchmark(BENCHMARKS["chartqa"], root)
    write_answers(tmp_path / "a.jsonl", samples, [""] * len(samples), "someone")
    command = ["score", "gqa", "--answers", str(tmp_path / "a.jsonl"), "--data-root", str(root)]
    assert main([*command, "-o", str(tmp_path / "s.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/a.jsonl:1: question 'human-0' is not one of GQA test-dev balanced's; 4 of 4 answers" in line
    assert "pass the answers of this benchmark, split and state" in line
    assert contents(tmp_path).keys() == {"a.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no questions: pass --benchmark"),
        (["--data", "digit-scenes/test", "--protocol", "chat"], "--protocol chat: is for --benchmark"),
        (["--benchmark", "gqa", "--protocol", "llava", "--prompt-template", "<image>{question}"], "leave one out"),
        (["--benchmark", "gqa", "--metric", "exact"], "--metric: is for --data"),
        (["--benchmark", "gqa", "--image-folder", "."], "--image-folder: is for --data"),
        (["--benchmark", "gqa", "--skip-bad"], "--skip-bad: is for --data"),
        (["--benchmark", "gqa", "GQA"], "gqa is passed twice"),
        (["--benchmark", "gqa", "--samples", "5"], "samples=5: gqa has only 4"),
        (["--benchmark", "gqa"], "results.answers: is a file, and answers go into a folder of that name"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_before_the_model_is_loaded(options, message, playground, tmp_path, capsys):
    (tmp_path / "results.answers").touch()
    where = ["--data-root", str(playground[0]), "-o", str(tmp_path / "results.json")]
    assert main(["evaluate", "/no-such-model", *options, *where]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["results.answers"]


def test_data_of_a_benchmarks_name_is_refused(playground, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = {"id": "1", "question": "How many?", "image": "n161313.jpg", "answers": ["3"]}
    (tmp_path / "gqa").write_text(json.dumps(line) + "\n")
    options = [
        "--image-folder",
        str(playground[0] / "gqa/data/images"),
        "--data-root",
        str(playground[0]),
        "-o",
        "r.json",
    ]
    assert main(["evaluate", "/no-such-model", "--benchmark", "gqa", "--data", "gqa", *options]) == 2
    assert "--data gqa: is also a benchmark's name; write ./gqa, or rename it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "there", "code", "message"),
    [
        ("gqa", "gqa", 2, "results.answers/gqa: is a file"),
        ("mme", "mme/dense.upload", 2, "results.answers/mme/dense.upload: is a file"),
        ("gqa", "gqa/dense.jsonl/x", 1, "results.answers/gqa/dense.jsonl: is a folder, not a file"),
        ("gqa", "gqa/fastv-60.upload.json/x", 1, "results.answers/gqa/fastv-60.upload.json: is a folder, not a file"),
    ],
)
def test_what_is_in_the_way_of_answers_is_found_before_the_model(
    name, there, code, message, playground, tmp_path, capsys
):
    path = tmp_path / "results.answers" / there
    path.parent.mkdir(parents=True)
    path.touch()
    where = ["--data-root", str(playground[0]), "-o", str(tmp_path / "results.json")]
    assert main(["evaluate", "/no-such-model", "--benchmark", name, *where]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert contents(tmp_path).keys() == {f"results.answers/{there}"}


def test_benchmarks_in_another_order_are_another_run(playground, tmp_path, capsys):
    where = ["--data-root", str(playground[0]), "-o", str(tmp_path / "results.json"), "--samples", "1"]
    options = [*where, *METHODS, "--max-new-tokens", "2"]
    assert main(["evaluate", "digit-scenes", "--benchmark", "gqa", "chartqa", *options]) == 0
    before = contents(tmp_path)
    assert main(["evaluate", "digit-scenes", "--benchmark", "chartqa", "gqa", *options]) == 2
    assert "results of another run (other max_new_tokens, tasks)" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_methods_are_solved_for_questions_with_an_image(playground, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(playground[0] / "scienceqa", root / "scienceqa")
    lines = root / "scienceqa/llava_test_CQM-A.json"
    lines.write_text(json.dumps([each for each in json.loads(lines.read_text()) if "image" not in each]))
    where = ["--benchmark", "scienceqa", "--data-root", str(root), "-o", str(tmp_path / "r.json")]
    assert main(["evaluate", "digit-scenes", *where, *METHODS]) == 2
    assert "no question has an image" in capsys.readouterr().err
