"""How much work is done, counted instead of timed: what a slow machine cannot hide and a fast one cannot pass."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitprune import PruningRecipe, measure, prune
from fitprune.costs.flops import kv_bytes
from fitprune.families.adapter import adapt
from fitprune.families.images import images_of
from fitprune.scoring import received
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax
from helpers.models import CACHE, cache_in, tiny_inputs, tiny_model


class Work(TorchDispatchMode):
    """Counts PyTorch's operations and finds the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.numel() * made.element_size())
        return result


def recipe_of(model, tokens):
    shape = adapt(model).fingerprint
    return PruningRecipe((1.0, 0.6, 0.6, 0.3, 0.3), shape, tokens)


def decode(model, inputs, steps=2):
    """One step of decoding after a prefill: its work, and the cache after it."""
    with torch.no_grad():
        made = model(**inputs, logits_to_keep=1)
        mask, position = inputs["attention_mask"], inputs["attention_mask"].sum(1, keepdim=True)
        for step in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            call = {"input_ids": torch.full_like(position, 11), "attention_mask": mask, "position_ids": position + step}
            with Work() as work:
                made = model(**call, **{CACHE: cache_in(made)})
    return work, cache_in(made)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoding_step_does_no_more_than_the_dense_one(family, batch):
    """No mask, no hook inside the decoder, no operation of ours."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=batch)
    dense, _ = decode(model, inputs)
    tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    with prune(model, recipe_of(model, tokens)):
        pruned, _ = decode(model, inputs)
        layers = model.model.language_model.layers
        hooks = [h for layer in layers for m in (layer, layer.mlp) for h in (m._forward_hooks, m._forward_pre_hooks)]
        assert sum(map(len, hooks)) == 1  # at the first layer, which puts the others on
    extra = pruned.calls - dense.calls
    assert sum(extra.values()) <= 8, extra  # reading the mask, once for all layers
    assert (
        pruned.calls["aten.scaled_dot_product_attention.default"]
        == dense.calls["aten.scaled_dot_product_attention.default"]
    )


def test_a_decoding_step_of_a_ragged_batch_makes_one_mask_for_each_stage(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=3)
    inputs["attention_mask"][0, :2] = 0  # left padding, which leaves with the first tokens
    inputs["attention_mask"][1, :1] = 0
    dense, _ = decode(model, inputs)
    tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    with prune(model, recipe_of(model, tokens)):
        pruned, _ = decode(model, inputs)
    stages = 3
    assert sum((pruned.calls - dense.calls).values()) <= 16 * stages + 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_scores_come_from_the_kernels_log_sum_exp(family, mode, monkeypatch):
    """PyTorch takes its attention apart at different places in these modes."""

    def refuse(*_):
        raise AssertionError("a softmax was made")

    monkeypatch.setattr(received, "strongest_by_softmax", refuse)
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2)
    tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    with mode(), prune(model, recipe_of(model, tokens)):
        model(**inputs)
    measure(model, [inputs])


def test_the_memory_of_removed_tokens_is_given_back(family):
    """Each layer's cache holds what it shows, and that is what the cost model says."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2)
    tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    recipe = recipe_of(model, tokens)
    with prune(model, recipe), torch.no_grad():
        cache = cache_in(model(**inputs, logits_to_keep=1))
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in held)
    text = inputs["input_ids"].shape[1] - tokens
    priced = kv_bytes(recipe.model.decoder, tokens, recipe.counts(tokens), text_tokens=text, value_bytes=4)
    assert sum(part.numel() * part.element_size() for part in held) == 2 * priced


def test_no_score_makes_a_tensor_of_rows_keys_and_heads():
    """At LLaVA-NeXT's 2,880 tokens and 32 heads a map in bf16 would be 532 MiB."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 32, 2944, 128, dtype=torch.bfloat16)
    visual = torch.zeros(1, 2944, dtype=torch.bool)
    visual[:, 35:2915] = True
    image, question = images_of(visual), text_after(visual, None)
    with Work() as work:
        received_attention(query, key, image, question, Softmax(0.1), torch.full((1, 32, 2944), 20.0))
    assert work.largest < 16 * 2**20
    # Blocks of rows x tiles of keys x parts of heads: a product and a maximum each, and not many small ones.
    assert work.calls["aten.bmm.out"] < 600
