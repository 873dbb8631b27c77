"""`fitprune serve`: a server of the bundled model as it is, and the names of weights that transformers 5 saves."""

import base64
import contextlib
import json
import math
import signal
import sys
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

import psutil
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from fitprune import PruningRecipe, prune
from fitprune._support import assets
from fitprune.families.adapter import adapt
from fitprune.integrations.vllm.checkpoint import accept_newer_names
from helpers.served import free_port, listening
from helpers.vllm_engines import ENVIRONMENT

IMAGE = assets.folder("test") / "images" / "0000.jpg"
QUESTION = "Which digit is blue?"


def by_transformers(model, processor, recipe):
    """The answer and its log-probability."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=Image.open(IMAGE), return_tensors="pt")
    with prune(model, recipe) if recipe else contextlib.nullcontext(), torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.cat(out.logits).log_softmax(-1)[range(len(ids)), ids]
    return processor.decode(ids, skip_special_tokens=True), logprobs.sum().item()


def ask(url):
    """What the server answers, and the answer's log-probability."""
    data = base64.b64encode(IMAGE.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "digit-scenes", "messages": [{"role": "user", "content": content}]}
    body |= {"temperature": 0, "max_tokens": 8, "logprobs": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["message"]["content"], math.fsum(token["logprob"] for token in choice["logprobs"]["content"])


def test_one_line_serves_the_bundled_model_as_it_is(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(assets.folder("model")).eval()
    processor = AutoProcessor.from_pretrained(assets.folder("model"))
    recipe = PruningRecipe((0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05), adapt(model).fingerprint, 144)
    recipe.save(tmp_path / "recipe.json")
    port = free_port()
    command = [
        sys.executable, "-m", "fitprune", "serve", "digit-scenes", "--recipe", str(tmp_path / "recipe.json"),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512",
        "--kv-cache-memory-bytes", str(100 * 2**20),
    ]  # fmt: skip
    with listening(command, port, ENVIRONMENT, tmp_path / "log") as server:
        answer, logprob = ask(f"http://127.0.0.1:{port}/v1/chat/completions")
        processes = psutil.Process(server.pid).children(recursive=True)
        assert processes
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert psutil.wait_procs(processes, timeout=10)[1] == []
    expected, likely = by_transformers(model, processor, recipe)
    assert answer == expected
    assert logprob == pytest.approx(likely, abs=5e-4)
    assert abs(likely - by_transformers(model, processor, None)[1]) > 1e-3  # something was pruned


MODELS = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", "pixtral"])
def test_names_of_today_become_those_of_vllm(kind, tower, monkeypatch):
    model = SimpleNamespace(hf_to_vllm_mapper=kind.hf_to_vllm_mapper)
    monkeypatch.setattr("vllm.model_executor.model_loader.get_model_cls", lambda config: model)
    config = SimpleNamespace(
        hf_config=SimpleNamespace(vision_config=SimpleNamespace(model_type=tower)),
        using_transformers_backend=lambda: False,
    )
    for _ in range(2):  # a second engine of one process
        accept_newer_names(config)
    inner = "" if tower == "pixtral" else "vision_model."
    older = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    text = "language_model.model.layers.0.mlp.up_proj.weight"
    names = {
        "vision_tower.encoder.layers.0.mlp.fc1.weight": f"vision_tower.{inner}encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": f"vision_tower.{inner}encoder.layers.0.mlp.fc1.weight",
        older: older, f"model.{older}": older,
        text: text, "model.language_model.layers.0.mlp.up_proj.weight": text,
    }  # fmt: skip
    assert {name: model.hf_to_vllm_mapper.map_name(name) for name in names} == names
