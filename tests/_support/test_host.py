"""Facts about transformers and torch that results rely on, one line each; and what happens when one no longer holds."""

import inspect
from pathlib import Path

import pytest
import torch
import torch._dynamo.eval_frame
import transformers

from fitprune import measure, prune
from fitprune._support import facts, host
from fitprune.families.adapter import adapt
from fitprune.recipes.recipe import PruningRecipe
from helpers.models import tiny_inputs, tiny_model

# What else stands in host.py or in the engine, and costs an import too many to be checked whenever a model is pruned.
MORE = {
    "a compiled call's frame": lambda: "def compile_wrapper" in inspect.getsource(torch._dynamo.eval_frame),
    "a wrapper of torch.compile": facts.attributes(lambda: torch.compile(torch.nn.Identity()), "_orig_mod"),
    "eager attention of a modeling file": facts.fact(
        "transformers.models.llama.modeling_llama", "eager_attention_forward", "module", "query", "attention_mask"
    ),
    "an attention's config": facts.attributes(lambda: tiny_model().model.language_model.layers[0].self_attn, "config"),
    "a config's attention": facts.attributes(transformers.LlamaConfig, "_attn_implementation"),
    "a layer's positions": facts.fact(
        "transformers.models.llama.modeling_llama", "LlamaDecoderLayer.forward", "position_embeddings", "position_ids"
    ),
    "images that generate encodes": facts.fact(
        "transformers", "LlavaForConditionalGeneration.forward", "mm_encoder_outputs", "pixel_values"
    ),
    "what generate encodes": facts.attributes(tiny_model, "input_modalities"),
    "multimodal rotary positions": facts.fact(
        "transformers", "Qwen2VLModel.compute_3d_position_ids", "input_ids", "inputs_embeds", "attention_mask"
    ),
    "their offset": lambda: "self.rope_deltas = None" in inspect.getsource(transformers.Qwen2VLModel.__init__),
    "gradient checkpointing": facts.attributes(lambda: tiny_model().model.language_model, "gradient_checkpointing"),
}


@pytest.mark.parametrize("name", [*facts.FACTS, *MORE])
def test_what_is_relied_on_holds(name):
    assert {**facts.FACTS, **MORE}[name]()


def test_a_function_is_ended_by_what_it_calls():
    steps = []

    def run(stop):
        steps.append("before")
        stop("value")
        steps.append("after")

    assert host.run_until_stopped(run) == "value"
    assert steps == ["before"]
    assert host.run_until_stopped(lambda outer: outer(host.run_until_stopped(lambda inner: inner(1)) + 1)) == 2
    with pytest.raises(RuntimeError, match="own"):
        host.run_until_stopped(lambda stop: (_ for _ in ()).throw(RuntimeError("own")))


def test_the_remedy_names_the_versions_that_are_installed_with_the_package():
    versions = host.remedy().rpartition(": ")[2]
    assert f'"{versions}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.fixture
def model():
    yield tiny_model()
    host._cache_names.cache_clear()
    facts._broken.cache_clear()


def test_a_renamed_argument_is_refused_before_anything_runs(model, monkeypatch):
    monkeypatch.setattr(host, "CACHE_NAMES", ("kv_cache", "past"))
    host._cache_names.cache_clear()
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.5, 0.5), adapt(model).fingerprint, 16)
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, attention_mask, position_ids, memory=None: None)
    for use in (lambda: prune(model, recipe).__enter__(), lambda: measure(model, [tiny_inputs(model)])):
        with pytest.raises(ValueError, match=r"argument kv_cache or past is not as fitprune knows it"):
            use()


def test_a_cache_under_a_name_that_is_not_known_is_refused(model):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match=r"is given its KV cache as 'memory'.* supports: transformers>="):
        host.cache_of(model, {"memory": DynamicCache()})


def test_a_missing_fact_is_refused(model, monkeypatch):
    monkeypatch.setitem(facts.FACTS, "a door", lambda: False)
    facts._broken.cache_clear()
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.5, 0.5), adapt(model).fingerprint, 16)
    with pytest.raises(ValueError, match=r"a door is not as fitprune knows it"), prune(model, recipe):
        pass
