"""The bundled model as vLLM is to serve it, and what transformers answers under `prune`."""

import contextlib
import functools
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import PruningRecipe, fit, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.baselines.table import BASELINES, make_method
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter

QUESTIONS = 200  # of one image each
BUDGETS = (40, 60, 80)
# All else is vLLM's default, or what the plug-in makes of it.
OPTIONS = {"dtype": "float32", "kv_cache_memory_bytes": 100 * 2**20, "limit_mm_per_prompt": {"image": 3}}


def write_folder(path):
    """Write the bundled model as vLLM reads it, recipes, and the model as it is with the recipe of 40% beside it."""
    shutil.copytree(assets.folder("model"), path / "model")
    weights = load_file(path / "model" / "model.safetensors")  # without a recipe, vLLM asks for the hub's names
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in weights.items()}
    save_file(weights, path / "model" / "model.safetensors", metadata={"format": "pt"})
    model, processor = loaded()
    stats = measure(
        model, make_batches(load_samples(assets.folder("calibration"), samples=64), processor, batch_size=16)
    )
    for budget in BUDGETS:
        fit(stats, flops_reduction=budget / 100).save(path / f"{budget}.json")
    for name in BASELINES:
        make_method(name, Fitter(stats), checked_budget("flops_reduction", 0.6), seed=7).save(path / f"{name}.json")
    shutil.copytree(assets.folder("model"), path / "beside")
    PruningRecipe.load(path / "40.json").save_pretrained(path / "beside")


@functools.cache
def loaded():
    source = assets.folder("model")
    return AutoModelForImageTextToText.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)


def chat(text, images=0):
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
    found += [[chat(sample.text), []] for sample in samples[:16]]
    random.Random(0).shuffle(found)
    return found


@functools.cache
def long_texts():
    """Prompts of text alone, of some 900 tokens, most of them the same."""
    return [
        [chat("Which digit is red? " * 100 + sample.text), []] for sample in load_samples(assets.folder("test"))[:6]
    ]


_answers = {}  # each prompt is answered once, whatever test asks


def by_transformers(asked, recipe, tokens=8, ignore_eos=False):
    """What transformers answers under `prune`, each prompt alone: ids, and log-probability of each."""
    model, processor = loaded()
    end = None if ignore_eos else model.generation_config.eos_token_id
    found = []
    with prune(model, recipe) if recipe else contextlib.nullcontext(), torch.inference_mode():
        for text, files in asked:
            key = (text, *files, recipe if recipe is None else str(recipe), tokens, ignore_eos)
            if key not in _answers:
                images = [Image.open(file).convert("RGB") for file in files]
                inputs = processor(text=text, images=images or None, return_tensors="pt")
                out = model.generate(
                    **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
                rows = torch.cat(out.logits).log_softmax(-1)
                _answers[key] = ids, [rows[n, token].item() for n, token in enumerate(ids)]
            found.append(_answers[key])
    return SimpleNamespace(ids=[ids for ids, _ in found], logprobs=[logprobs for _, logprobs in found])


def in_text(ids):
    return loaded()[1].decode(ids, skip_special_tokens=True).strip()


def differing(found, expected):
    """Places, and both answers, where ids differ."""
    return [(n, a, b) for n, (a, b) in enumerate(zip(found.ids, expected.ids, strict=True)) if a != b]


def first_apart(found, expected):
    """Of each answer's first token, how far the log-probabilities are from each other; that of the likelier one."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    return torch.tensor([abs(a[0] - b[0]) for a, b in pairs])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def listening(command, port, environment, log):
    """A server that `command` starts, once it answers; gives its process, and ends it."""
    with open(log, "w") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(600):
            assert running.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.5)
        yield running
    finally:
        running.terminate()
        running.wait(60)
