"""The vLLM plug-in: the same answers as transformers under `prune`, whatever the engine does with the requests."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm import EngineArgs

from fitprune import PruningRecipe, fit, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.baselines.table import BASELINES, make_method
from fitprune.families.adapter import adapt
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.integrations.vllm.configured import configured_recipe
from fitprune.integrations.vllm.pruner import Pruner
from fitprune.integrations.vllm.rules import require_supported

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import families

QUESTIONS = 200  # of one image each
BUDGETS = (40, 60, 80)
# What pruning asks of the engine; and a small one.
NEEDED = {"enforce_eager": True, "enable_prefix_caching": False, "enable_chunked_prefill": False}
SWITCHES = ("--enforce-eager", "--no-enable-prefix-caching", "--no-enable-chunked-prefill")
OPTIONS = {
    **NEEDED, "dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 16,
    "kv_cache_memory_bytes": 200 * 2**20, "limit_mm_per_prompt": {"image": 3},
}  # fmt: skip
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FITPRUNE_")},
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
# Three processes that each import vLLM take 25 seconds to start, one 10; the server below has them all.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded model as vLLM reads it, and its recipes."""
    path = tmp_path_factory.mktemp("vllm")
    shutil.copytree(assets.folder("model"), path / "model")
    with_older_names(path / "model")
    model, processor = loaded()
    samples = load_samples(assets.folder("calibration"), samples=64)
    stats = measure(model, make_batches(samples, processor, batch_size=16))
    for budget in BUDGETS:
        fit(stats, flops_reduction=budget / 100).save(path / f"{budget}.json")
    for name in BASELINES:
        make_method(name, Fitter(stats), checked_budget("flops_reduction", 0.6), seed=7).save(path / f"{name}.json")
    return path


def with_older_names(folder):
    """transformers 5 saves a CLIP or SigLIP tower without a part of its name that vLLM asks for, as on the hub."""
    weights = load_file(folder / "model.safetensors")
    if AutoConfig.from_pretrained(folder).model_type.startswith("llava"):
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@functools.cache
def loaded():
    source = assets.folder("model")
    return AutoModelForImageTextToText.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)


def chat(text, images):
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    _, processor = loaded()
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@functools.cache
def prompts():
    """[text, image files]: questions of one image, of several, and of none, in disorder."""
    samples = load_samples(assets.folder("test"))
    files = [str(sample.image) for sample in samples]
    found = [[chat(sample.text, 1), [str(sample.image)]] for sample in samples[:QUESTIONS]]
    found += [[chat(samples[n].text, 2), files[n : n + 2]] for n in range(12)]
    found += [[chat(samples[n].text, 3), files[n : n + 3]] for n in range(4)]
    found += [[chat(sample.text, 0), []] for sample in samples[:16]]
    random.Random(0).shuffle(found)
    return found


@functools.cache
def by_transformers(recipe, tokens=8, ignore_eos=False, count=None):
    return answers_to(prompts()[:count], recipe, tokens, ignore_eos)


def answers_to(asked, recipe, tokens=8, ignore_eos=False):
    """What transformers answers under `prune`, each prompt alone: ids, and log-probability of each."""
    model, processor = loaded()
    end = model.generation_config.eos_token_id
    answers, logprobs = [], []
    with prune(model, recipe) if recipe else contextlib.nullcontext(), torch.inference_mode():
        for text, files in asked:
            images = [Image.open(file).convert("RGB") for file in files]
            inputs = processor(text=text, images=images or None, return_tensors="pt")
            out = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None if ignore_eos else end,
                pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            answers.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
            said = torch.cat(out.logits).log_softmax(-1)
            logprobs.append([said[n, token].item() for n, token in enumerate(answers[-1])])
    return SimpleNamespace(ids=answers, logprobs=logprobs)


def by_vllm(path, recipe, tokens=8, ignore_eos=False, count=None, environment=None, asked=None, **options):
    """What an engine answers to all prompts at once, and how often it preempted."""
    job, out = path / "job.json", path / "answers.json"
    out.unlink(missing_ok=True)
    told = {
        "options": {**OPTIONS, "distributed_executor_backend": "uni", **options},
        "prompts": asked or prompts()[:count],
        "tokens": tokens,
        "ignore_eos": ignore_eos,
    }
    job.write_text(json.dumps(told))
    command = [sys.executable, str(Path(__file__).parent / "vllm_engine.py"), str(path / "model"), str(job), str(out)]
    given = {"FITPRUNE_RECIPE": str(recipe)} if recipe else {}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, **ONE_PROCESS, **given, **(environment or {})},
    )
    said = done.stdout + done.stderr
    if not out.exists():
        raise RuntimeError(said)
    return SimpleNamespace(**json.loads(out.read_text()), said=said)


def differing(found, expected):
    pairs = enumerate(zip(found.ids, expected.ids, strict=True))
    return [(prompts()[n][0], a, b) for n, (a, b) in pairs if a != b]


def first_apart(found, expected):
    """Of each answer's first token, how far the log-probabilities are from each other; that of the likelier one."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    return torch.tensor([abs(a[0] - b[0]) for a, b in pairs])


@pytest.mark.parametrize("budget", BUDGETS)
def test_answers_are_those_of_transformers(made, budget):
    recipe = made / f"{budget}.json"
    beside = budget == 40  # where no variable names it
    if beside:
        PruningRecipe.load(recipe).save_pretrained(made / "model")
    try:
        found = by_vllm(made, None if beside else recipe)
    finally:
        (made / "model" / "fitprune_recipe.json").unlink(missing_ok=True)
    assert "fitprune: visual tokens leave at layers" in found.said
    expected = by_transformers(recipe)
    assert not differing(found, expected)
    assert first_apart(found, expected).max() < 1e-3
    found.logprobs = found.logprobs[:64]
    dense = by_transformers(None, count=64)
    assert (first_apart(found, dense) > 1e-3).float().mean() > 0.25  # something was pruned


@pytest.mark.parametrize("name", ["random", "vtw", "fastv"])
def test_methods_answer_as_in_transformers(made, name):
    recipe = made / f"{name}.json"
    found = by_vllm(made, recipe, count=32)
    assert not differing(found, by_transformers(recipe, count=32))


BETWEEN = "takes tokens away between layers"
REFUSED = {
    "random-input": ("random", BETWEEN), "pyramiddrop": ("last", BETWEEN), "divprune": ("max-min", BETWEEN),
    "cdpruner": ("dpp", BETWEEN), "dart": ("duplication", BETWEEN), "visionzip": ("cls", "reads the vision tower"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_methods_recipe_is_served_or_its_scorer_is_named(made, name, monkeypatch):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    monkeypatch.setenv("FITPRUNE_RECIPE", str(made / f"{name}.json"))
    recipe = configured_recipe(config)
    assert recipe.scorer["name"] == BASELINES[name].scorer
    if name not in REFUSED:
        require_supported(config, recipe)
        return
    scorer, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"scorer '{scorer}': .*{why}"):
        require_supported(config, recipe)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"name": "duplication"}, "scorer 'duplication': reads the layer before"),
        (
            {"name": "by-stage", "parameters": {"stages": {"3": {"name": "duplication"}}}},
            "scorer 'by-stage': reads the layer before",
        ),
        ({"name": "accumulated"}, "scorer 'accumulated': reads the attention of all layers"),
        ({"name": "cls"}, "scorer 'cls': reads the vision tower"),
        ({"name": "none"}, "scorer='none': must be one of"),
        ({"name": "random"}, "scorer 'random': missing parameter 'seed'"),
    ],
)
def test_a_scorer_that_cannot_work_is_named_before_the_first_request(made, scorer, message):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    recipe = dataclasses.replace(PruningRecipe.load(made / "60.json"), scorer=scorer)
    with pytest.raises(ValueError, match=message):
        require_supported(config, recipe)


def test_without_a_recipe_vllm_is_as_it_was(made):
    plain = {"enforce_eager": True, "dtype": "float32", "max_model_len": 512, "limit_mm_per_prompt": {"image": 3}}
    job = {"count": 64, **plain, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    stock = by_vllm(made, None, environment={"VLLM_PLUGINS": "none"}, **job)
    ours = by_vllm(made, None, **job)
    assert ours.ids == stock.ids
    assert "fitprune: visual tokens leave" not in ours.said


def test_a_preempted_request_goes_on_as_it_had_begun(made):
    """Blocks for a few requests only: they take each other's, and are prefilled anew with what they said so far."""
    recipe = made / "60.json"
    job = {"tokens": 48, "ignore_eos": True, "count": 40}
    found = by_vllm(made, recipe, kv_cache_memory_bytes=16 * 2**20, block_size=32, **job)
    assert found.preemptions > 0
    assert not differing(found, by_transformers(recipe, **job))


def test_a_prompt_that_ends_with_its_image_runs_dense(made):
    """Its last token is a visual one; `prune` refuses it, a server cannot."""
    recipe = dataclasses.replace(PruningRecipe.load(made / "80.json"), scorer={"name": "self"})
    recipe.save(made / "self.json")
    questions = [prompt for prompt in prompts()[:20] if prompt[1]]
    ends = [["<image>", prompt[1][:1]] for prompt in questions]
    found = by_vllm(made, made / "self.json", asked=questions + ends)
    assert found.ids == answers_to(questions, recipe).ids + answers_to(ends, None).ids
    assert "a prompt without text after its last image runs dense" in found.said


def test_a_quantized_cache_runs(made):
    """Scores come from the queries and keys of the forward, before they are quantized."""
    found = by_vllm(made, made / "60.json", count=64, dtype="bfloat16", kv_cache_dtype="fp8")
    expected = by_transformers(made / "60.json", count=64)
    assert len(differing(found, expected)) < 0.1 * len(expected.ids)  # which is what eight bits do to dense answers too


def test_an_engine_that_would_prune_wrongly_does_not_start(made):
    with pytest.raises(RuntimeError) as caught:
        by_vllm(made, made / "60.json", count=1, enable_prefix_caching=True, enforce_eager=False)
    said = str(caught.value)
    assert "pass --no-enable-prefix-caching" in said
    assert "pass --enforce-eager" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill"),
        ({"long_prefill_token_threshold": 100}, "long_prefill_token_threshold=100"),
        ({"enforce_eager": False}, "enforce_eager"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"enable_lora": True}, "LoRA"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
    ],
)
def test_what_is_not_supported_is_named(made, options, named):
    config = EngineArgs(str(made / "model"), **{**OPTIONS, **options}).create_engine_config()
    with pytest.raises(ValueError, match="cannot prune in this vLLM engine") as caught:
        require_supported(config, PruningRecipe.load(made / "60.json"))
    assert named in str(caught.value)
    assert str(caught.value).count("\n- ") == 1


def test_what_is_no_recipe_is_named(made, monkeypatch):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    assert configured_recipe(config) is None
    monkeypatch.setenv("FITPRUNE_RECIPE", str(made / "none.json"))
    with pytest.raises(ValueError, match=r"FITPRUNE_RECIPE=.*none\.json: no such file or folder"):
        configured_recipe(config)
    monkeypatch.setenv("FITPRUNE_RECIPE", "llava-1.5-7b:60")
    with pytest.raises(
        ValueError, match=r"FITPRUNE_RECIPE=llava-1\.5-7b:60: recipe is of another model: layers 32 there"
    ):
        configured_recipe(config)
    monkeypatch.delenv("FITPRUNE_RECIPE")
    for elsewhere in ("s3://bucket/model", "org/na--me", "model.gguf"):
        monkeypatch.setattr(config.model_config, "model", elsewhere)
        assert configured_recipe(config) is None


class NormsBehind(torch.nn.Module):
    """A decoder layer as Exaone 4's, whose norms stand behind its attention and behind its MLP."""

    def __init__(self):
        super().__init__()
        self.post_attention_layernorm, self.post_feedforward_layernorm = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, positions, hidden_states, residual):
        return hidden_states, residual


@pytest.mark.parametrize(("layer", "named"), [(NormsBehind(), "post_feed"), (torch.nn.Linear(2, 2), "must take pos")])
def test_a_layer_of_another_form_is_named(layer, named):
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"))
    decoder = SimpleNamespace(layers=[layer], norm=None)
    model = SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=decoder))
    with pytest.raises(ValueError, match=f"layer 0, a .*{named}"):
        Pruner(SimpleNamespace(attn_groups=[[group]], get_model=lambda: model), None)


def test_a_prompt_in_several_steps_stays_dense():
    """Also if it is preempted, and its whole prompt comes at once when it goes on."""
    place = SimpleNamespace(offset=1, length=4, is_embed=None)
    features = [SimpleNamespace(modality="image", mm_position=place)]
    request = SimpleNamespace(mm_features=features, prompt_token_ids=[1, 3, 3, 3, 3, 5])
    other = SimpleNamespace(**vars(request))
    batch = SimpleNamespace(req_ids=["a", "b"], num_prompt_tokens=[6, 6])
    pruner = Pruner.__new__(Pruner)
    pruner._runner = SimpleNamespace(input_batch=batch, requests={"a": request, "b": other}, device=torch.device("cpu"))
    pruner._query_aware, pruner._quotas, pruner._norm = True, lambda image: image, None
    assert pruner._request(0, 4) is None
    assert pruner._request(0, 6) is None
    assert pruner._request(1, 6).prompt.quotas.tolist() == [[-1, 0, 0, 0, 0, -1]]
    assert pruner._request(1, 8).question.tolist() == [
        [False] * 5 + [True] + [False] * 2
    ]  # with two tokens of an answer


def test_another_attention_backend_is_named():
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "FLEX_ATTENTION"))
    with pytest.raises(ValueError, match="FLEX_ATTENTION: must be one of CPU_ATTN"):
        Pruner(SimpleNamespace(attn_groups=[[group]]), None)


# Other families: tiny models of random weights, with heads as wide as vLLM's CPU attention takes them.

FAMILIES = ("llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")


def row_of(name, monkeypatch):
    """A row of tests/families.py with two heads 32 wide."""
    monkeypatch.setattr(families, "TEXT", {**families.TEXT, "num_attention_heads": 2, "num_key_value_heads": 1})
    config = families.qwen_config

    def wider(kind, ids, vision, **text):
        text["rope"] = {**text.get("rope", {}), "mrope_section": [4, 6, 6]}
        return config(kind, ids, vision, **{**text, **({"head_dim": 32} if "head_dim" in text else {})})

    monkeypatch.setattr(families, "qwen_config", wider)
    rows = itertools.chain.from_iterable(getattr(families, part) for part in vars(families) if part.endswith("ROWS"))
    return next(row for row in rows if row.name == name)


def whole_processor(row):
    """The row's processor, its stand-in for a video processor replaced: here torchvision is at hand."""
    processor = row.processor()
    patch = getattr(processor.image_processor, "patch_size", None)
    videos = {
        "qwen2_5_vl": lambda: tf.Qwen2VLVideoProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2),
        "qwen3_vl": lambda: tf.Qwen3VLVideoProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2),
        "internvl": lambda: tf.InternVLVideoProcessor(size=families.SQUARE),
        "llava_onevision": lambda: tf.LlavaOnevisionVideoProcessor(size=families.SQUARE),
    }
    if row.name in videos:
        processor.video_processor = videos[row.name]()
        processor.__class__ = type(processor).__mro__[1]  # not the child that knows the stand-in
    return processor


@pytest.mark.parametrize("name", FAMILIES)
def test_families_answer_as_in_transformers(name, tmp_path, monkeypatch):
    row = row_of(name, monkeypatch)
    model, folder = row.make_model(), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="100KB")  # several files, with the names that transformers 5 gives
    whole_processor(row).save_pretrained(folder)
    decoder = adapt(model).fingerprint.decoder
    keep = [0.7 ** sum(each <= layer for each in decoder.prunable) for layer in range(decoder.layers)]
    recipe = PruningRecipe(tuple(keep), adapt(model).fingerprint, 16)
    recipe.save(tmp_path / "recipe.json")
    texts = families.IMAGE_PROMPTS
    if name == "llava_onevision":  # of several images vLLM makes other tokens than transformers, without any recipe
        texts = [text for text in texts if text.count("{i}") == 1]
    asked, ids, logprobs = [], [], []
    processor = AutoProcessor.from_pretrained(folder)  # as vLLM loads it
    for number, (text, images, _) in enumerate(families.prompts_of(texts, row.image, None, families.FRAMES)):
        asked.append([text, [str(tmp_path / f"{number}-{each}.png") for each in range(len(images))]])
        for image, file in zip(images, asked[-1][1], strict=True):
            image.save(file)
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        with prune(model, recipe), torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        ids.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        logprobs.append([out.logits[0].log_softmax(-1)[0, ids[-1][0]].item()])
    expected = SimpleNamespace(ids=ids, logprobs=logprobs)
    found = by_vllm(
        tmp_path, tmp_path / "recipe.json", tokens=6, ignore_eos=True, asked=asked, max_num_batched_tokens=4096
    )
    assert found.ids == expected.ids
    assert first_apart(found, expected).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_answers_on_a_gpu(made, backend):
    """In bf16, where answers of one engine and another differ now and then without any recipe."""
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    options = {"dtype": "bfloat16", "attention_config": {"backend": backend}, "environment": environment}
    found, expected = by_vllm(made, made / "60.json", **options), by_transformers(made / "60.json")
    assert len(differing(found, expected)) < 0.05 * len(expected.ids)


@contextlib.contextmanager
def server(made, recipe):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made / "model"),
        "--served-model-name", "digits", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "512", "--max-num-batched-tokens", "2048", "--max-num-seqs", "16",
        "--kv-cache-memory-bytes", str(100 * 2**20), *SWITCHES,
    ]  # fmt: skip
    log = made / "server.log"
    with open(log, "w") as file:
        running = subprocess.Popen(
            command, stdout=file, stderr=file, env={**ENVIRONMENT, "FITPRUNE_RECIPE": str(recipe)}
        )
    try:
        for _ in range(240):
            assert running.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.terminate()
        running.wait(60)


def test_the_server_loses_no_request(made):
    """500 streamed chats, 24 at a time, every tenth given up after its first token: the others are answered rightly."""
    from openai import AsyncOpenAI

    samples = load_samples(assets.folder("test"))[:100]
    _, processor = loaded()
    expected = {}
    model, _ = loaded()
    with prune(model, made / "60.json"), torch.inference_mode():
        for sample, inputs in zip(samples, make_batches(samples, processor, batch_size=1), strict=True):
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            expected[sample] = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    async def ask(client, limit, number):
        sample = samples[number % len(samples)]
        data = base64.b64encode(Path(sample.image).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        content = [image, {"type": "text", "text": sample.text}]
        async with limit:
            stream = await client.chat.completions.create(
                model="digits",
                messages=[{"role": "user", "content": content}],
                stream=True,
                temperature=0,
                max_tokens=8,
            )
            said = ""
            async for part in stream:
                said += part.choices[0].delta.content or ""
                if number % 10 == 9 and said:
                    await stream.close()
                    return None
            return sample, said.strip()

    async def all_of(url):
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            limit = asyncio.Semaphore(24)
            return await asyncio.gather(*(ask(client, limit, number) for number in range(500)))

    with server(made, made / "60.json") as url:
        answers = asyncio.run(all_of(url))
    finished = [answer for answer in answers if answer is not None]
    assert len(finished) == 450
    assert [(s.text, said, expected[s]) for s, said in finished if said != expected[s]] == []
