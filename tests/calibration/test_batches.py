"""Prompts as the processor's own call makes them, in every family, and refusals that name their sample."""

import copy
import json
import re
import shutil

import pytest
import tokenizers
from PIL import Image

from fitprune import AttentionStats, load_samples, make_batches
from fitprune._support import assets
from fitprune.calibration.batches import usable
from fitprune.calibration.entry import BadSample
from fitprune.calibration.prompts import chat_prompt, encode
from fitprune.calibration.samples import Sample
from fitprune.cli.main import main
from helpers import families as F
from helpers.models import tiny_model
from helpers.questions import assert_same, turn

# got_ocr2's processor makes pages to read and not prompts; mistral3 has none here; rows with a dash, and these two,
# have the processor of another row.
ROWS = [
    row
    for row in F.ROWS
    if row.processor and "-" not in row.name and row.name not in ("got_ocr2", "paligemma2", "qwen3_vl_moe")
]
QUESTIONS = ["what?", "how many are there?", "a"]
ADDS = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request):
    return request.param


def processor_of(row, adds="nothing", start="", end=" A:"):
    """A family's processor whose tokenizer adds such tokens, with a chat template that starts and ends so."""
    processor = copy.deepcopy(row.processor())
    ids = [("<s>", 1), ("</s>", 2)]
    single = ADDS[adds]
    processor.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=ids
    )
    processor.chat_template = (
        start + "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}" + row.image
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}" + end
        + "{% endif %}"
    )  # fmt: skip
    return processor


def pictures():
    return [F.picture(number, size) for number, size in enumerate([(32, 32), (60, 30), (31, 62)])]


def samples():
    found = zip(QUESTIONS, pictures(), strict=True)
    return [Sample(str(n), text, image, where=f"q.jsonl:{n + 1}") for n, (text, image) in enumerate(found)]


def own_call(processor, conversations):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": len(conversations) > 1, "padding_side": "left"},
    )  # fmt: skip


def starts(row, adds, start):
    """How many BOS a prompt has: PaliGemma's processor writes one of its own, LFM2's tokenizer is told to add none."""
    own = row.name.startswith("paligemma")
    return own + bool(start or (adds in ("BOS", "both") and row.name != "lfm2_vl"))


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# -- ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("adds", ADDS)
def test_batches_are_those_of_the_processors_own_call(row, adds, start):
    processor = processor_of(row, adds, start)
    conversations = [[turn(image, text)] for text, image in zip(QUESTIONS, pictures(), strict=True)]
    for size in (1, 2, 3):
        for number, batch in enumerate(make_batches(samples(), processor, batch_size=size)):
            assert_same(batch, own_call(processor, conversations[number * size : (number + 1) * size]))
            assert (batch["input_ids"] == 1).sum(1).tolist() == [starts(row, adds, start)] * len(batch["input_ids"])


@pytest.mark.parametrize("adds", ADDS)
def test_an_end_of_text_is_not_doubled(row, adds):
    processor = processor_of(row, adds, end=" A:</s>")
    for size in (1, 3):
        for batch in make_batches(samples(), processor, batch_size=size):
            ends = 1 + (row.name.startswith("paligemma") and adds in ("EOS", "both"))  # it writes a line break between
            assert (batch["input_ids"] == 2).sum(1).tolist() == [ends] * len(batch["input_ids"])
            assert (batch["input_ids"] == 1).sum(1).tolist() == [starts(row, adds, "")] * len(batch["input_ids"])


@pytest.mark.parametrize("adds", ADDS)
def test_a_users_own_template_keeps_its_own_start_and_end(row, adds):
    """It gives what a chat template of the same text gives."""
    processor = processor_of(row, adds, "<s>", " A:</s>")
    template = f"<s>user: {row.image}{{question}} A:</s>"
    for size in (1, 3):
        for ours, theirs in zip(
            make_batches(samples(), processor, batch_size=size, prompt_template=template),
            make_batches(samples(), processor, batch_size=size),
            strict=True,
        ):
            assert_same(ours, theirs)
            assert (ours["input_ids"] == 1).sum(1).tolist() == [starts(row, adds, "<s>")] * len(ours["input_ids"])
            assert (ours["input_ids"] == 2).sum(1).tolist() == [1] * len(ours["input_ids"])


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_conversations_with_any_number_of_images_are_those_of_the_own_call(row, start):
    """As the lmms-eval plug-in makes them: several images, none, a system message, several turns."""
    processor, (a, b, c) = processor_of(row, "BOS", start), pictures()
    conversations = [
        [turn("Be short.", role="system"), turn(a, "what?")],
        [turn(a, "and", b, "which?")],
        [turn("no image")],
        [turn(c, "what?"), turn("a dog", role="assistant"), turn("and now?")],
    ]
    images = [[a], [a, b], [], [c]]
    if row.name.startswith("paligemma"):  # takes no text alone
        del conversations[2], images[2]
    prompts = [chat_prompt(processor, conversation) for conversation in conversations]
    assert_same(encode(processor, prompts, images, "abcd"[: len(images)]), own_call(processor, conversations))
    for prompt, own, conversation in zip(prompts, images, conversations, strict=True):
        assert_same(encode(processor, [prompt], [own], "a"), own_call(processor, [conversation]))


@pytest.mark.parametrize("adds", ["nothing", "BOS"])
def test_a_bos_that_a_processor_writes_after_the_image_is_not_doubled(adds):
    processor = processor_of(next(row for row in ROWS if row.name == "paligemma"), adds)
    one, two = (
        next(make_batches(samples(), processor, batch_size=3, prompt_template=f"<image>{start}{{question}}"))
        for start in ("", "<s>")
    )
    assert_same(one, two)


def test_a_batch_of_which_some_prompts_begin_with_bos_is_refused():
    processor = processor_of(ROWS[0], "BOS")
    with pytest.raises(ValueError, match=r"some prompts of a batch begin with '<s>' and some do not: use batches of 1"):
        encode(processor, ["<s>a", "a"], [[], []], "ab")


# -- templates -----------------------------------------------------------------------------------------------------


# -- refusals ------------------------------------------------------------------------------------------------------


REFUSED = {  # what is wrong -> (text, image size, message)
    "image token": ("what <image>?", (40, 30), "contains the image token '<image>'"),
    "BOS": ("<s> what?", (40, 30), "contains '<s>', the tokenizer's bos_token: remove it"),
    "EOS": ("what?</s>", (40, 30), "contains '</s>', the tokenizer's eos_token: remove it"),
    "surrogate": ("hi \ud800", (40, 30), "TextEncodeInput|surrogates"),
    "too long": ("what " * 600, (40, 30), r"a prompt of \d+ tokens, and the model has 2048 positions"),
    "template": ("tell RAISE", (40, 30), "the chat template fails"),
    "decode": ("what?", (1, 1), "too small"),
}


def samples_with(tmp_path, kind):
    text, size, _ = REFUSED[kind]
    for name, pixels in (("a", (40, 30)), ("bad", size), ("b", (30, 64))):
        Image.new("RGB", pixels, "red").save(tmp_path / f"{name}.png")
    texts = {"a": "what?", "bad": text, "b": "how many?"}
    return [
        Sample(name, texts[name], tmp_path / f"{name}.png", where=f"q.jsonl:{line}")
        for line, name in enumerate(texts, 1)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_processor_refuses_is_named_and_can_be_left_out(tmp_path, processor, caplog, kind, batch_size):
    processor.chat_template = (
        "{% if 'RAISE' in messages[0].content[1].text %}{{ raise_exception('no') }}{% endif %}"
        + processor.chat_template
    )
    found, model = samples_with(tmp_path, kind), tiny_model()
    options = {"batch_size": batch_size, "model": model}
    with pytest.raises(BadSample, match=REFUSED[kind][2]) as caught:
        list(make_batches(found, processor, **options))
    assert str(caught.value).startswith("q.jsonl:2: ")
    assert len(str(caught.value)) < 400
    left = usable(found, processor, model=model)
    assert [sample.id for sample in left] == ["a", "b"]
    assert "skipped: q.jsonl:2: " in caplog.text
    assert "1 of 3 samples skipped" in caplog.text
    for batches in (make_batches(left, processor, **options), make_batches(found, processor, skip_bad=True, **options)):
        assert sum(len(batch["input_ids"]) for batch in batches) == 2
    with pytest.raises(ValueError, match="none of 1 samples is usable"):
        usable([found[1]], processor, model=model)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_a_strip_that_a_processor_refuses_is_named_with_its_file(tmp_path, name):
    processor = processor_of(next(row for row in ROWS if row.name == name))
    F.picture(0, (2, 900)).save(tmp_path / "strip.png")
    strip = Sample("s", "what?", tmp_path / "strip.png", where="q.jsonl:9")
    with pytest.raises(BadSample, match=r"^q\.jsonl:9: strip\.png: absolute aspect ratio must be smaller than 200"):
        list(make_batches([*samples(), strip], processor, batch_size=4))
    assert usable([*samples(), strip], processor) == samples()


def test_of_multimodal_positions_an_images_tokens_are_not_counted():
    """They take few positions: only the text of such a prompt can be known to be too long."""
    row = next(row for row in ROWS if row.name == "qwen2_vl")
    model, processor = row.make_model(), processor_of(row)
    model.config.text_config.max_position_embeddings = 30
    assert next(make_batches(samples()[1:2], processor, model=model))["input_ids"].shape[1] > 30
    long = Sample("l", "what" * 10, F.picture(0, (32, 32)))
    with pytest.raises(BadSample, match=r"^sample 'l': a prompt of .* tokens, and the model has 30 positions"):
        next(make_batches([long], processor, model=model))


def test_a_refusal_of_the_whole_batch_names_no_sample(processor, red):
    processor.tokenizer.pad_token = None
    assert len(next(make_batches([red], processor))["input_ids"]) == 1
    longer = Sample("8", "what is it?", red.image)
    with pytest.raises(ValueError, match="padding token") as caught:
        next(make_batches([red, longer], processor, batch_size=2))
    assert not isinstance(caught.value, BadSample)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([{"image": "a.png", "question": "x"}], r"samples\[0\] is a dict: must be a Sample, as fitprune.load_samples"),
        (["a.jsonl"], r"samples\[0\] is a str"),
        ("a.jsonl", r"samples\[0\] is a str"),
        (Sample("0", "x", Image.new("RGB", (8, 8))), "samples is a Sample: must be a list of Samples"),
        (None, "samples is a NoneType"),
    ],
)
def test_what_is_no_sample_is_refused_by_its_type(processor, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_batches(wrong, processor)
    with pytest.raises(ValueError, match=r"samples\[1\] is a dict"):
        list(make_batches(iter([Sample("0", "x", Image.new("RGB", (8, 8))), {}]), processor))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(({"batch_size": size}, "must be at least 1, a whole number") for size in (0, "2", 2.0, True)),
        ({"prompt_template": 3}, "must be text with {question} and the image token"),
    ],
)
def test_an_option_of_another_type_is_refused_with_its_value_and_rule(processor, red, option, message):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: {message}")):
        make_batches([red], processor, **option)


def test_what_is_no_processor_is_refused_by_its_type(processor, red):
    for wrong in (tiny_model(), processor.tokenizer, processor.image_processor, None):
        with pytest.raises(ValueError, match=f"processor is a {type(wrong).__name__}: must be a model's"):
            make_batches([red], wrong)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Four good questions of the bundled set, and two that no processor takes."""
    shutil.copytree(assets.folder("calibration") / "images", tmp_path / "images")
    lines = (assets.folder("calibration") / "metadata.jsonl").read_text().splitlines()[:4]
    bad = [json.loads(lines[0]) | {"text": text} for text in ("what " * 3000, "why " * 3000)]
    (tmp_path / "q.jsonl").write_text("\n".join([lines[0], *map(json.dumps, bad), *lines[1:]]))
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_skip_bad_leaves_out_what_the_processor_refuses(data, capsys):
    def run(command, *options):
        code = main([command, "digit-scenes", *options])
        return code, capsys.readouterr().err

    code, error = run("measure", "--data", f"{data}/q.jsonl", "-o", f"{data}/stats.st")
    assert code == 2
    assert "q.jsonl:2: " in error
    assert "tokens, and the model has" in error
    code, error = run("measure", "--data", f"{data}/q.jsonl", "--skip-bad", "--batch-size", "2", "-o", f"{data}/1.st")
    assert code == 0
    assert run("measure", "--data", f"{data}/good.jsonl", "--batch-size", "2", "-o", f"{data}/2.st")[0] == 0
    assert (data / "1.st").read_bytes() == (data / "2.st").read_bytes()
    assert len(AttentionStats.load(data / "1.st")) == 4
    main(["fit", f"{data}/1.st", "--flops-reduction", "0.6", "-o", f"{data}/r.json"])
    options = ["--recipe", f"{data}/r.json", "--timed-batches", "0", "--examples", "0", "-o", f"{data}/results.json"]
    assert run("evaluate", "--data", f"{data}/q.jsonl", "--skip-bad", *options)[0] == 0
    assert json.loads((data / "results.json").read_text())["provenance"]["tasks"][f"{data}/q.jsonl"]["samples"] == 4


def test_the_bundled_samples_are_all_usable(processor):
    found = load_samples(assets.folder("calibration"))
    assert usable(found, processor, model=tiny_model()) == found
