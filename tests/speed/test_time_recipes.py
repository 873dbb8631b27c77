"""Pruned against dense: what timing says about each method, and what it refuses. Times are not tested."""

import dataclasses

import pytest

from fitprune import PruningRecipe
from fitprune.families.adapter import adapt
from fitprune.speed.profiling import profile_latency
from fitprune.speed.time_recipes import time_recipes
from fitprune.speed.timings import as_json, table
from helpers.models import tiny_inputs, tiny_model


@pytest.mark.parametrize("batch", [1, 2])
def test_a_tiny_model_is_profiled_and_timed(family, batch):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=batch)
    profile = profile_latency(model, inputs, repeats=1)
    assert profile.tokens[-1] == inputs["input_ids"].shape[1] == profile.visual_tokens + profile.text_tokens
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.2, 0.2), adapt(model).fingerprint, profile.visual_tokens)
    dense, pruned = time_recipes(model, inputs, {"half": recipe}, new_tokens=[3], rounds=2, profile=profile)
    assert (dense.name, pruned.name) == ("dense", "half")
    assert len(pruned.prefill_seconds) == 2
    assert dense.kv_bytes == dense.cost_kv_bytes
    assert pruned.kv_bytes == pruned.cost_kv_bytes < dense.kv_bytes
    assert dense.scoring_share == 0 < pruned.scoring_share < 1
    assert pruned.verdict
    assert sorted(pruned.answer_seconds) == [1, 3]
    assert "half" in table([dense, pruned])
    rows = as_json([dense, pruned], model)["timings"]
    assert [row["name"] for row in rows] == ["dense", "half"]
    assert not model._forward_pre_hooks  # all is undone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "of dtype bfloat16, and dtype float32 is timed"),
        ({"device": "abacus"}, "of device abacus, and device .* is timed"),
        ({"batch": 3}, "of batch 3, and batch 1 is timed"),
        ({"tokens": (1,)}, "a prompt of 2. tokens: the profile was measured up to 1"),
    ],
)
def test_a_profile_of_something_else_is_refused_before_any_round(changes, message, monkeypatch):
    model = tiny_model()
    inputs = tiny_inputs(model)
    profile = profile_latency(model, inputs, tokens=[inputs["input_ids"].shape[1]], repeats=1)
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.2, 0.2), adapt(model).fingerprint, profile.visual_tokens)
    profile = dataclasses.replace(profile, **changes)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=message):
        time_recipes(model, inputs, {"half": recipe}, profile=profile)
