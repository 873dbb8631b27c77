"""The lmms-eval plug-in: the same answers as fitprune's own, in any batch, through the real command, offline."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import fitprune
from fitprune import PruningRecipe, evaluate, fit, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.integrations.lmms_eval import FitPrune
from fitprune.integrations.lmms_eval_prompts import generation_arguments, load_picture
from fitprune.integrations.lmms_eval_tasks import folder
from helpers.picture_cases import CASES, require_shown

COUNT = 64  # questions compared
DATA = Path(fitprune.__file__).parent / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics and a recipe for 60% of the embedded model."""
    path = tmp_path_factory.mktemp("made")
    model, processor = loaded()
    samples = load_samples(assets.folder("calibration"), samples=32)
    stats = measure(model, make_batches(samples, processor, batch_size=16))
    stats.save(path / "stats.safetensors")
    fit(stats, flops_reduction=0.6).save(path / "60.json")
    return path


@pytest.fixture(scope="module")
def plugin(made):
    return FitPrune("digit-scenes", recipe=str(made / "60.json"), device="cpu", batch_size=4)


def loaded():
    source = assets.folder("model")
    return AutoModelForImageTextToText.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)


@pytest.fixture(scope="module")
def said_by_evaluate(made):
    """Answers of `fitprune.evaluate`, dense and pruned; the one place that knows its results."""
    samples = load_samples(assets.folder("test"))[:COUNT]
    recipe = PruningRecipe.load(made / "60.json")
    results = evaluate(*loaded(), samples, {"60": recipe}, batch_size=16, timed_batches=0)
    return {"dense": [a["said"]["dense"] for a in results.answers], "60": [a["said"]["60"] for a in results.answers]}


def said_by_generate(recipe, samples):
    """Answers of the library's own pieces, without `evaluate`."""
    model, processor = loaded()
    texts = []
    with prune(model, recipe) if recipe else contextlib.nullcontext(), torch.inference_mode():
        for inputs in make_batches(samples, processor, batch_size=8):
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def lmms_eval(model_args, out, *options, launcher=("-m", "lmms_eval")):
    """Run the real command offline with an empty cache; answers in the order of the questions, and the metric."""
    command = [
        sys.executable, *launcher, "--model", "fitprune", "--model_args", model_args, "--include_path", str(folder()),
        "--tasks", "digit_scenes", "--batch_size", "16", "--log_samples", "--output_path", str(out), *options,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    written = list(out.glob("*/*_samples_digit_scenes.jsonl"))  # lmms-eval exits with 0 when it fails, too
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(written) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in written[0].read_text().splitlines()]
    results = json.loads(next(out.glob("*/*_results.json")).read_text())
    answers = {row["doc_id"]: row["filtered_resps"] for row in rows}
    return [answers[number] for number in range(len(answers))], results["results"]["digit_scenes"]["accuracy,none"]


def request(content, number=0, **generation):
    """One of lmms-eval's requests; its message comes from the function, as in lmms-eval."""
    arguments = (str(content), lambda doc: [{"role": "user", "content": content}], generation, number, "task", "test")
    metadata = {"task": "task", "doc_id": number, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def picture(number):
    return {"type": "image", "url": Image.open(assets.folder("test") / "images" / f"{number:04}.jpg")}


def words(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_what_is_shown_whether_a_task_gives_an_image_or_a_file(name, tmp_path):
    (tmp_path / "a").write_bytes(CASES[name][0])
    require_shown(load_picture(str(tmp_path / "a")), name)
    require_shown(load_picture(Image.open(tmp_path / "a")), name)


def test_lmms_eval_finds_the_model_by_its_entry_point():
    assert get_model("fitprune") is FitPrune


def test_dense_answers_are_those_of_evaluate_and_generate(said_by_evaluate, tmp_path):
    samples = load_samples(assets.folder("test"))[:COUNT]
    answers, accuracy = lmms_eval("pretrained=digit-scenes", tmp_path, "--limit", str(COUNT))
    assert answers == said_by_evaluate["dense"]
    assert answers == said_by_generate(None, samples)
    assert accuracy == sum(a.lower() == s.answers[0] for a, s in zip(answers, samples, strict=True)) / COUNT


def test_pruned_answers_are_those_of_evaluate_and_generate(made, said_by_evaluate, tmp_path):
    recipe, samples = PruningRecipe.load(made / "60.json"), load_samples(assets.folder("test"))[:COUNT]
    budget = f"pretrained=digit-scenes,flops_reduction=0.6,stats={made}/stats.safetensors"
    answers, _ = lmms_eval(budget, tmp_path, "--limit", str(COUNT))
    assert answers == said_by_evaluate["60"]
    assert answers == said_by_generate(recipe, samples)


def test_two_processes_share_the_questions(made, tmp_path):
    recipe, samples = PruningRecipe.load(made / "60.json"), load_samples(assets.folder("test"))[:9]
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval")
    answers, _ = lmms_eval(f"pretrained=digit-scenes,recipe={made}/60.json", tmp_path, "--limit", "9", launcher=two)
    assert answers == said_by_generate(recipe, samples)


def test_every_bundled_set_is_a_task_and_every_task_a_set():
    manager = TaskManager(include_path=str(folder()), include_defaults=False)
    sets = {path.parent.parent.name: path for path in DATA.glob("*/test/metadata.jsonl")}
    assert set(manager.all_subtasks) == set(sets)
    for name, metadata in sets.items():
        stated = yaml.safe_load((folder() / f"{name}.yaml").read_text())
        assert stated["lmms_eval_specific_kwargs"] == {"set": f"{name}/test"}
        task = manager.load_task_or_group(name, task_type="chat")[name]
        docs = task.test_docs()
        assert len(docs) == len(metadata.read_text().splitlines())
        image, question = task.doc_to_messages(docs[0])[0]["content"]
        with Image.open(metadata.parent / docs[0]["file_name"]) as shown:
            assert image["url"].tobytes() == shown.convert("RGB").tobytes()
        assert question["text"] == docs[0]["text"]


def test_a_batch_of_any_images_gives_what_each_request_gives_alone(plugin):
    contents = [
        [picture(0), words("Which digit is blue?")],
        [picture(1), words("and"), picture(2), words("How many digits are there?")],
        [words("Is there a 7?")],
        [picture(3), picture(4), words("Is there a 7 in <image> or in <image>?")],
        [picture(5), words("Read the top row.")],
    ]
    plugin.task_dict = {"task": {"test": dict.fromkeys(range(5))}}
    requests = [request(content, number, max_new_tokens=4 + number % 2) for number, content in enumerate(contents)]
    together = plugin.generate_until(requests)
    assert together == [plugin.generate_until([one])[0] for one in requests]
    assert together[0] == said_by_generate(plugin.recipe, load_samples(assets.folder("test"))[:1])[0]


def test_prompts(plugin):
    def prompt(*content, role="user"):
        return plugin.prompt(ChatMessages(messages=[{"role": role, "content": list(content)}]))[0]

    assert prompt(picture(0), words("Is there a 7?")) == "USER: <image>\nIs there a 7? ASSISTANT:"
    assert prompt(picture(0), words("Is <image> a 7?")) == "USER: Is <image> a 7? ASSISTANT:"
    with pytest.raises(ValueError, match="places 2 images by '<image>', but 1"):
        prompt(picture(0), words("<image> <image>"))
    with pytest.raises(ValueError, match="video or audio"):
        prompt({"type": "video", "url": "x.mp4"}, words("What happens?"))


def message(role, *content):
    return {"role": role, "content": list(content)}


CONVERSATIONS = {  # kind -> messages
    "one image": [message("user", picture(0), words("Which digit is blue?"))],
    "two images": [message("user", picture(1), words("and"), picture(2), words("How many digits are there?"))],
    "text alone": [message("user", words("Is there a 7?"))],
    "a system prompt": [message("system", words("Be short.")), message("user", picture(3), words("Is there a 7?"))],
    "several turns": [
        message("user", picture(4), words("Which digit is blue?")),
        message("assistant", words("3")),
        message("user", picture(5), words("And here?")),
    ],
}


@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("kinds", [*([kind] for kind in CONVERSATIONS), list(CONVERSATIONS)], ids="+".join)
def test_ids_are_those_of_the_processors_own_call(plugin, monkeypatch, kinds, start, adds):
    processor, calls = copy.deepcopy(plugin.processor), []
    control = [(token, processor.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    processor.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=adds, pair=f"{adds} $B:1", special_tokens=control
    )
    processor.chat_template = start + (
        "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
        "{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
    )
    batch = [ChatMessages(messages=CONVERSATIONS[kind]) for kind in kinds]
    expected = processor.apply_chat_template(
        [messages.to_hf_messages() for messages in batch], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True, processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip
    monkeypatch.setattr(plugin, "processor", processor)
    monkeypatch.setattr(plugin.model, "generate", lambda **inputs: calls.append(inputs) or inputs["input_ids"])
    plugin.answer(batch, {})
    assert torch.equal(calls[0]["input_ids"], expected["input_ids"])
    assert torch.equal(calls[0]["attention_mask"], expected["attention_mask"])
    if "pixel_values" in expected:
        assert torch.equal(calls[0]["pixel_values"], expected["pixel_values"])


def test_a_question_that_the_processor_refuses_is_named(plugin):
    plugin.task_dict = {"task": {"test": dict.fromkeys(range(2))}}
    requests = [request([picture(0), words(text)], number) for number, text in enumerate(["What?", "lone \ud800"])]
    with pytest.raises(ValueError, match=r"^task, test 1: "):
        plugin.generate_until(requests)


def test_a_prompt_template_from_text_or_file(made, tmp_path):
    (tmp_path / "template.txt").write_text("A chat, of two. USER: <image>\n{question} ASSISTANT:\n")
    for given in (str(tmp_path / "template.txt"), r"'A chat, of two. USER: <image>\n{question} ASSISTANT:'"):
        plugin = FitPrune("digit-scenes", device="cpu", prompt_template=given)

        def prompt(*content, used=plugin):
            return used.prompt(ChatMessages(messages=[{"role": "user", "content": list(content)}]))[0]

        start = "A chat, of two. USER: "
        assert prompt(picture(0), words("Why {?}")) == f"{start}<image>\nWhy {{?}} ASSISTANT:"
        assert prompt(picture(0), picture(1), words("Why?")) == f"{start}<image>\n<image>\nWhy? ASSISTANT:"
        assert prompt(picture(0), words("Is <image> red?")) == f"{start}Is <image> red? ASSISTANT:"
        assert prompt(words("Why?")) == f"{start}Why? ASSISTANT:"


def test_generation_arguments_of_tasks():
    greedy = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert generation_arguments({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": False}) == greedy
    # As MM-Vet has it.
    assert generation_arguments({"max_new_tokens": 16, "temperature": 0.2, "do_sample": False}) == greedy
    assert generation_arguments({"until": ["ASSISTANT:"], "image_aspect_ratio": "original"}) == {
        **greedy,
        "max_new_tokens": 1024,
    }
    sampled = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "num_beams": 1}
    assert generation_arguments(sampled) == {**sampled, "do_sample": True}


def test_a_recipe_is_fitted_to_what_is_measured_now(made):
    now = FitPrune(
        "digit-scenes",
        flops_reduction=0.6,
        calibration="digit-scenes/calibration",
        calibration_samples=32,
        device="cpu",
    )
    assert now.recipe.keep == PruningRecipe.load(made / "60.json").keep


def test_another_method_is_solved_for_the_budget(made):
    plugin = FitPrune(
        "digit-scenes", method="fastv:k=1", flops_reduction=0.6, stats=f"{made}/stats.safetensors", device="cpu"
    )
    assert plugin.recipe.provenance["method"] == "fastv:k=1"
    assert 0.6 <= plugin.recipe.cost().flops_reduction < 0.61


@pytest.mark.parametrize("method", ["divprune", "random", "visionzip", "fastv"])
def test_a_methods_saved_recipe_answers_as_the_method_does(method, made, tmp_path):
    stated = {"method": method, "flops_reduction": 0.8, "stats": f"{made}/stats.safetensors", "seed": 7}
    solved = FitPrune("digit-scenes", **stated, device="cpu", batch_size=8)
    solved.recipe.save(tmp_path / "r.json")
    loaded_again = FitPrune("digit-scenes", recipe=str(tmp_path / "r.json"), device="cpu", batch_size=8)
    assert loaded_again.recipe == solved.recipe
    samples, said = load_samples(assets.folder("test"))[:8], []
    for plugin in (solved, loaded_again):
        plugin.task_dict = {"task": {"test": dict.fromkeys(range(8))}}
        asked = [request([picture(n), words(sample.text)], n, max_new_tokens=16) for n, sample in enumerate(samples)]
        said.append(plugin.generate_until(asked))
    assert said[0] == said[1] == said_by_generate(solved.recipe, samples)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "llava-1.5-7b:60", "flops_reduction": 0.6, "stats": "s"}, "pass one of them, or neither for dense"),
        ({"flops_reduction": 0.6}, "either stats=FILE"),
        ({"flops_reduction": 0.6, "stats": "s", "calibration": "c"}, "either stats=FILE"),
        ({"flops_reduction": 60, "stats": "s"}, "a fraction, not percent"),
        ({"stats": "s"}, "nothing to fit"),
        ({"recipe": "llava-1.5-7b:60"}, "another model"),
        ({"recipe": "llava-1.5-7b:61"}, "must be one of"),
        ({"batch_size": "auto"}, "batch_size=auto: must be an integer"),
        ({"method": "best"}, "method 'best': must be one of"),
        ({"method": "fastv"}, "pass flops_reduction"),
        ({"dtype": "int8"}, "dtype='int8': must be"),
        ({"device": "cpu", "device_map": "auto"}, "device_map='auto'"),
        ({"prompt_template": "USER: {question}"}, "must contain '<image>'"),
    ],
)
def test_arguments_that_contradict_each_other(given, message):
    with pytest.raises(ValueError, match=message):
        FitPrune("digit-scenes", **{"device": "cpu", **given} if "device_map" not in given else given)


def test_requests_of_other_types_are_refused(plugin):
    with pytest.raises(NotImplementedError, match="generate_until"):
        plugin.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        plugin.generate_until_multi_round([])
