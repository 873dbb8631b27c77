"""Facts about transformers and torch that results rely on, one line each; and what happens when one no longer holds."""

import inspect
from pathlib import Path

import pytest
import torch
import torch._dynamo.eval_frame

from fitprune import measure, prune
from fitprune._support import host
from fitprune.families.adapter import adapt
from fitprune.recipes.recipe import PruningRecipe
from helpers.models import tiny_inputs, tiny_model


@pytest.mark.parametrize("fact", host.FACTS)
def test_what_is_relied_on_holds(fact):
    assert host.FACTS[fact]()


def test_a_compiled_call_is_known_by_its_frame():
    assert "def compile_wrapper" in inspect.getsource(torch._dynamo.eval_frame)


def test_the_remedy_names_the_versions_that_are_installed_with_the_package():
    versions = host._remedy().rpartition(": ")[2]
    assert f'"{versions}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.fixture
def model():
    yield tiny_model()
    host._cache_names.cache_clear()
    host._broken.cache_clear()


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
    monkeypatch.setitem(host.FACTS, "a door", lambda: False)
    host._broken.cache_clear()
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.5, 0.5), adapt(model).fingerprint, 16)
    with pytest.raises(ValueError, match=r"a door is not as fitprune knows it"), prune(model, recipe):
        pass
