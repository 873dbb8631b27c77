"""Benchmarks through `evaluate`, under LLaVA's protocol: a tiny LLaVA with a tokenizer of Llama's kind."""

import pytest
import transformers as tf

from fitprune import PruningRecipe, evaluate
from fitprune.benchmarks.reading import load_benchmark
from fitprune.benchmarks.table import BENCHMARKS
from fitprune.evaluation.answer_files import file_names
from fitprune.evaluation.report import write_report
from fitprune.evaluation.results import Results, table
from fitprune.families.adapter import adapt
from helpers import families as F
from helpers import vicuna
from helpers.playground import make_playground

NAMES = ("textvqa", "gqa", "scienceqa", "pope", "mmbench", "mme", "mmvet")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("playground")
    make_playground(root, 10)
    return {name: load_benchmark(BENCHMARKS[name], root) for name in NAMES}


@pytest.fixture(scope="module")
def loaded():
    tokens = vicuna.tokenizer()
    text = tf.LlamaConfig(**(F.TEXT | {"vocab_size": 800}))
    config = F.llava_config(tf.LlavaConfig, text, F.Ids(tokens), image_seq_length=16)
    processor = F.llava_processor(tokens)
    processor.chat_template = vicuna.TEMPLATE
    return F.build(tf.LlavaForConditionalGeneration, config), processor


def run(loaded, tasks, **options):
    model, processor = loaded
    recipe = PruningRecipe((0.5, *[0.25] * (F.LAYERS - 1)), adapt(model).fingerprint, 16, {})
    benchmarks = {name: BENCHMARKS[name] for name in tasks}
    options = {"max_new_tokens": 6, "timed_batches": 0, **options}
    return evaluate(model, processor, tasks, {"half": recipe}, benchmarks=benchmarks, **options)


@pytest.fixture(scope="module")
def results(loaded, tasks):
    return run(loaded, tasks, examples=3)


def test_batches_of_1_and_8_give_the_same_answers(loaded, tasks, results):
    alone = run(loaded, tasks, batch_size=1)
    assert [record["said"] for record in alone.answers] == [record["said"] for record in results.answers]
    assert len({record["said"]["dense"] for record in results.answers}) > 5
    assert any(record["said"]["half"] != record["said"]["dense"] for record in results.answers)


def test_the_protocol_is_llavas_and_noted(loaded, tasks, results):
    noted = results.provenance["tasks"]["pope"]["protocol"]
    assert "name='llava'" in noted
    assert "A chat between a curious user" in noted
    chat = run(loaded, {"pope": tasks["pope"]}, protocol="chat")
    assert "name='chat'" in chat.provenance["tasks"]["pope"]["protocol"]
    ours = [record["said"]["dense"] for record in results.answers if record["task"] == "pope"]
    assert [record["said"]["dense"] for record in chat.answers] != ours


def test_questions_of_text_alone_run_dense_and_are_counted_apart(tasks, results):
    alone = [sample.id for sample in tasks["scienceqa"] if sample.image is None]
    records = {record["id"]: record for record in results.answers if record["task"] == "scienceqa"}
    assert 0 < len(alone) < len(tasks["scienceqa"])
    assert all(records[name]["said"]["half"] == records[name]["said"]["dense"] for name in alone)
    assert all(records[name]["divergence"]["half"] == 0 for name in alone)
    task = next(task for task in results.tasks if task.name == "scienceqa")
    assert f"({len(alone)} of text alone, dense)" in task.heading
    seen = [record for name, record in records.items() if name not in alone]
    same = sum(record["said"]["half"] == record["said"]["dense"] for record in seen) / len(seen)
    assert results.row("half", "scienceqa").agreement == pytest.approx(same, abs=1e-6)


def test_figures_go_through_the_file_and_into_table_and_report(results, tmp_path):
    results.save(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert again.rows == results.rows
    for name in NAMES:
        row, benchmark = again.row("dense", name), BENCHMARKS[name]
        if benchmark.score is None:
            assert (row.accuracy, row.figures) == (None, {})
        else:
            assert next(iter(row.figures.values())) == pytest.approx(row.accuracy * benchmark.maximum, abs=1e-2)
    text = table(again)
    assert "MME, 28 questions, metric perception" in text
    assert "no answers are published, so a server scores the upload file" in text
    head = next(line for line in text.splitlines() if line.endswith("of dense") and "textvqa" in line)
    assert head.split() == ["FLOPs", "cut", *(n for n in NAMES if n != "mmvet"), "of", "dense"]
    write_report(again, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "All benchmarks" in page
    assert page.count("as published") == sum(len(again.row("dense", name).figures) > 1 for name in NAMES)


def test_a_longest_answer_is_the_benchmarks_unless_one_is_asked_for(loaded, tasks):
    longest = run(loaded, {"gqa": tasks["gqa"][:1]}, max_new_tokens=None).provenance["max_new_tokens"]
    assert longest == {"gqa": 128}


def test_every_label_has_a_file_name_of_its_own():
    labels = ["dense", "fastv 60%", "fastv-60", "FASTV 60", "../..", "\u4e2d\u6587", "x" * 300]
    names = file_names(labels)
    assert list(names) == labels
    assert list(names.values())[:6] == ["dense", "fastv-60", "fastv-60-2", "FASTV-60-3", "method", "method-2"]
    assert len(names["x" * 300]) == 100


def test_text_alone_costs_what_dense_does(loaded, tasks):
    alone = {"scienceqa": [sample for sample in tasks["scienceqa"] if sample.image is None]}
    results = run(loaded, alone, timed_batches=1, examples=1)
    assert [(row.flops_reduction, row.prefill_flops_ratio, row.agreement) for row in results.rows] == [(0, 1, 1)] * 2
    assert (results.timings, results.examples) == ({}, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ["gqa"]}, "benchmarks is a list: must be task name -> Benchmark"),
        ({"benchmarks": {"gqa": "gqa"}}, r"benchmarks\['gqa'\] is a str: must be a Benchmark"),
        ({"benchmarks": {"GQA": BENCHMARKS["gqa"]}}, "has 'GQA', which is no task: samples has 'gqa'"),
        (
            {"benchmarks": {"gqa": BENCHMARKS["mmbench"]}},
            "samples of 'gqa' are not those of MMBench dev .*load_benchmark",
        ),
        ({"benchmarks": {"gqa": BENCHMARKS["gqa"]}, "metric": "exact"}, "metric='exact': is for other tasks"),
        ({"protocol": "llava"}, "protocol='llava': is for benchmarks"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_answer(options, message, loaded, tasks, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(*loaded, {"gqa": tasks["gqa"]}, {}, journal=tmp_path / "j", **options)
    assert not (tmp_path / "j").exists()


def test_a_processor_that_refuses_text_alone_is_found_before_the_first_answer(loaded, tasks, tmp_path, monkeypatch):
    own = type(loaded[1]).apply_chat_template

    def refusing(self, conversations, **options):
        if options.get("tokenize") and not any(part["content"] for turns in conversations for part in turns):
            raise ValueError("`images` are expected")
        return own(self, conversations, **options)

    monkeypatch.setattr(type(loaded[1]), "apply_chat_template", refusing)
    message = "`images` are expected: 3 of 10 questions of scienceqa have no image.*; leave scienceqa out"
    with pytest.raises(ValueError, match=message):
        run(loaded, {"gqa": tasks["gqa"], "scienceqa": tasks["scienceqa"]}, journal=tmp_path / "j")
    assert not (tmp_path / "j").exists()
