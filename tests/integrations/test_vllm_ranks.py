"""The vLLM plug-in on two ranks: of one model's heads, and of one model each."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm import EngineArgs
from vllm.version import __version__ as version

from fitprune import PruningRecipe, load_samples, prune
from fitprune._support import assets
from fitprune.families.adapter import adapt
from fitprune.integrations.vllm.rules import require_supported
from fitprune.scoring.scorers import SCORERS
from helpers.vllm_engines import ENVIRONMENT, runner_environment

HERE = Path(__file__).parent
TOKENS = 8
HEADS = 8
OPTIONS = {
    "dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 1024, "max_num_seqs": 16,
    "kv_cache_memory_bytes": 50 * 2**20, "limit_mm_per_prompt": {"image": 2}, "skip_mm_profiling": True,
}  # fmt: skip
PARAMETERS = {
    "heads": {"terms": [["mean", 0, 1.0], ["max", 5, 0.5], ["last", 6, 2.0], ["self", 7, 0.25]]},
    "debiased": {"profile": [0.1, 0.4, 0.2]},
    "random": {"seed": 3},
}
# The others read the vision tower, the layer before or all layers; "dpp" ranks by rounding where few tokens are left.
SERVED = sorted(set(SCORERS) - {"cls", "duplication", "accumulated", "by-stage", "dpp"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaVA of random weights whose heads can be divided, a recipe, and what transformers answers by each scorer."""
    path = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    text = tf.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=HEADS, num_key_value_heads=2,
        head_dim=32, vocab_size=416, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.08,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=96, patch_size=8,
        initializer_range=0.05,
    )  # fmt: skip
    config = tf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, image_seq_length=144, vision_feature_layer=-1
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(path / "model")
    weights = load_file(path / "model" / "model.safetensors")  # named as on the hub, which vLLM asks for
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
    save_file(weights, path / "model" / "model.safetensors", metadata={"format": "pt"})
    processor = tf.AutoProcessor.from_pretrained(assets.folder("model"))
    processor.save_pretrained(path / "model")
    recipe = PruningRecipe((0.8, 0.5, 0.5, 0.2), adapt(model).fingerprint, 144)
    dataclasses.replace(recipe, scorer={"name": "of-this-run"}).save(path / "recipe.json")  # see vllm_ranks.py
    samples = load_samples(assets.folder("test"), samples=10)
    prompts = []
    for number, sample in enumerate(samples):
        count = number % 3 if number else 1  # images
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": sample.text}]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append([asked, [str(each.image) for each in samples[number : number + count]]])
    return SimpleNamespace(path=path, model=model, processor=processor, recipe=recipe, prompts=prompts)


def by_transformers(made, scorer):
    """The answer's ids to each prompt."""
    answers = []
    with prune(made.model, dataclasses.replace(made.recipe, scorer=scorer)), torch.inference_mode():
        for text, files in made.prompts:
            images = [Image.open(file).convert("RGB") for file in files]
            inputs = made.processor(text=text, images=images or None, return_tensors="pt")
            ids = made.model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def by_vllm(made, recipe, runs, environment, **options):
    """Answers of each run; see vllm_ranks.py."""
    job, out = made.path / "job.json", made.path / "answers.json"
    out.unlink(missing_ok=True)
    work = {"options": {**OPTIONS, **options}, "prompts": made.prompts, "tokens": TOKENS, "runs": runs}
    job.write_text(json.dumps(work))
    path = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))])
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_ranks.py"), str(made.path / "model"), str(job), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": path, "FITPRUNE_RECIPE": str(recipe)},
    )
    if not out.exists():
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(out.read_text())


@pytest.mark.parametrize(("runner", "names"), [("v1", SERVED), ("v2", ["fitprune", "value"])])
def test_ranks_that_share_heads_answer_as_one(made, runner, names):
    scorers = {name: {"name": name, "parameters": PARAMETERS.get(name, {})} for name in names}
    runs = {name: {"scorer": scorer, "alone": False} for name, scorer in scorers.items()}
    control = {"control": {"scorer": scorers["fitprune"], "alone": True}}  # the last: nothing undoes it
    environment = runner_environment(runner) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process less
        "TORCHDYNAMO_DISABLE": "1",  # embeddings on ranks are compiled, for which the interpreter is no Triton
    }
    found = by_vllm(made, made.path / "recipe.json", runs | control, environment, tensor_parallel_size=2)
    expected = {name: by_transformers(made, scorer) for name, scorer in scorers.items()}
    assert {name: found[name] for name in names} == expected
    assert found["control"] != expected["fitprune"]
    assert len({json.dumps(answers) for answers in expected.values()}) > 0.7 * len(names)  # what is kept decides


@pytest.mark.skipif(
    not version.startswith("0.32") and not Path("/sys/devices/system/node/node1").exists(),
    reason="from vLLM 0.33 on data-parallel ranks on a CPU need a memory node each, and this machine has one",
)
def test_each_of_two_independent_ranks_answers_as_one(made):
    made.recipe.save(made.path / "plain.json")
    found = by_vllm(made, made.path / "plain.json", {"first": 0, "second": 1}, {}, data_parallel_size=2)
    expected = by_transformers(made, made.recipe.scorer)
    assert found == {"first": expected, "second": expected}


def test_ranks_that_exchange_rows_are_refused(made, monkeypatch):
    config = EngineArgs(
        str(made.path / "model"), **OPTIONS, enforce_eager=True, data_parallel_size=2
    ).create_engine_config()
    require_supported(config, made.recipe)
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    with pytest.raises(ValueError, match="data_parallel_size=2 of a mixture of experts"):
        require_supported(config, made.recipe)
