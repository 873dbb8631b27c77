"""What cannot be done right raises, names the value, the rule and the remedy, and leaves the model as it was."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, StaticCache
from transformers.cache_utils import QuantizedLayer

from fitprune import PruningRecipe, measure, prune
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.recipes.rounding import keep_fractions
from helpers.models import CACHE, IMAGE, cache_in, tiny_inputs, tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def inputs(model):
    return tiny_inputs(model)


def recipe_for(model):
    layers = model.config.text_config.num_hidden_layers
    return PruningRecipe(keep_fractions([4, 0, 4, 0, 0][:layers], 16), adapt(model).fingerprint, 16)


def unchanged(model):
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert not any(layer._forward_hooks or layer.mlp._forward_hooks for layer in model.model.language_model.layers)


def test_another_recipe_and_measuring_while_pruned(model, inputs):
    recipe = recipe_for(model)
    with prune(model, recipe):
        other = PruningRecipe.dense(recipe.model, 16)
        with pytest.raises(ValueError, match=r"in use by fitprune, pruned by another .* block or"), prune(model, other):
            pass
        with pytest.raises(ValueError, match="in use by fitprune"):
            measure(model, [inputs])
        model(**inputs)  # the outer block still works
    unchanged(model)


def test_two_models_may_be_pruned_at_once(inputs):
    one, two = tiny_model(seed=0), tiny_model(seed=1)
    with torch.no_grad():
        with prune(two, recipe_for(two)):
            alone = two(**inputs).logits
        with prune(one, recipe_for(one)), prune(two, recipe_for(two)):
            one(**inputs)
            assert torch.equal(two(**inputs).logits, alone)


def test_a_recipe_of_another_model(model):
    for other, message in [
        (tiny_model(layers=4), "layers 4 there, 5 here"),
        (tiny_model(kv_heads=4), "kv_heads 4 there, 2 here"),
        (tiny_model("llava_next"), "model_type llava_next there, llava here"),
    ]:
        with pytest.raises(ValueError, match=f"recipe is of another model: {message}"), prune(model, recipe_for(other)):
            pass
    with (
        pytest.raises(ValueError, match="layers 32 there, 5 here"),
        prune(model, PruningRecipe.published("llava-1.5-7b", 60)),
    ):
        pass
    unchanged(model)


@pytest.mark.parametrize("where", ["generate", "forward"])
def test_a_static_cache(model, inputs, where):
    def call():
        if where == "generate":
            return model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
        return model(**inputs, **{CACHE: StaticCache(config=model.config.text_config, max_cache_len=64)})

    with prune(model, recipe_for(model)), pytest.raises(ValueError, match=r"StaticCache of .*StaticLayer"):
        call()
    unchanged(model)


def test_a_sliding_window_cache(model, inputs):
    config = MistralConfig(num_hidden_layers=5, sliding_window=8)
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        model(**inputs, **{CACHE: DynamicCache(config=config)})


def test_an_offloaded_cache(model, inputs):
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="offloading=True"):
        model(**inputs, **{CACHE: DynamicCache(offloading=True)})


def test_models_that_are_no_supported_mllm(model):
    recipe = recipe_for(model)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    with (
        pytest.raises(ValueError, match="model_type='llama': not supported, because it has no text_config"),
        prune(llama, recipe),
    ):
        pass
    with pytest.raises(ValueError, match="without decoder layers"), prune(model.model, recipe):
        pass
    bare = tiny_model()
    del bare.model.language_model.layers
    with pytest.raises(ValueError, match="without decoder layers"), prune(bare, recipe):
        pass
    with pytest.raises(ValueError, match="must be a transformers model"), prune(torch.nn.Linear(2, 2), recipe):
        pass


def test_prompts_without_visual_tokens(model, inputs):
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(min=10)
    with torch.no_grad():
        dense = model(**text).logits
        with prune(model, recipe_for(model)):
            assert torch.equal(model(**text).logits, dense)  # text alone is the dense model's business
            with pytest.raises(
                ValueError, match=r"has 0 visual tokens, but its 1 image\(s\) have 16 features: must be"
            ):
                model(**text, pixel_values=inputs["pixel_values"])
            with pytest.raises(ValueError, match="has 16 visual tokens, but no image is given: pass the processor's"):
                model(input_ids=inputs["input_ids"])
    unchanged(model)


def test_more_image_tokens_than_features(model, inputs):
    ids = inputs["input_ids"].clone()
    ids[0, 0] = IMAGE
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match=r"has 17 visual tokens, .* 16 features"):
        model(**{**inputs, "input_ids": ids})
    unchanged(model)


def test_the_images_of_earlier_turns_passed_again(model, inputs):
    with torch.no_grad(), prune(model, recipe_for(model)):
        cache = cache_in(model(**inputs))
        with pytest.raises(ValueError, match="pass only the images of this turn"):
            model(input_ids=torch.tensor([[7]]), pixel_values=inputs["pixel_values"], **{CACHE: cache})


def test_a_refused_call_leaves_no_state(model, inputs):
    with torch.no_grad(), prune(model, recipe_for(model)):
        with pytest.raises(ValueError, match="drop cache_implementation"):
            model(**inputs, **{CACHE: DynamicCache(offloading=True)})
        with pytest.raises(ValueError, match="call the model that prune was given"):
            model.model(**inputs)


def test_after_a_failed_call_the_next_one_is_right(model, inputs):
    """State of a prefill that died half-way must not reach the next call."""
    with torch.no_grad(), prune(model, recipe_for(model)):
        good = model(**inputs).logits

        def die(*_):
            raise RuntimeError("half-way")

        handle = model.model.language_model.layers[3].mlp.act_fn.register_forward_pre_hook(die)
        with pytest.raises(RuntimeError, match="half-way"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, good)


def test_calls_that_have_no_exact_meaning(model, inputs):
    ids = inputs["input_ids"]
    with prune(model, recipe_for(model)):
        with pytest.raises(ValueError, match=r"inputs_embeds are given without pixel_values"):
            model(inputs_embeds=torch.randn(1, 5, 32))
        square = {**inputs, "attention_mask": torch.zeros(1, 1, *ids.shape)}
        with pytest.raises(ValueError, match="attention_mask has 4 dimensions: must be a tensor"):
            model(**square)
        with pytest.raises(ValueError, match=r"attention_mask covers 3 tokens: must cover 25, the 0 in the KV cache"):
            model(**{**inputs, "attention_mask": torch.ones(1, 3)})
        with pytest.raises(ValueError, match="sample 0 of the batch has no text after its last visual token"):
            model(**{**inputs, "input_ids": ids[:, :19], "attention_mask": ids[:, :19] > 0})


def test_labels_that_a_removed_token_would_have_to_predict(model, inputs):
    with prune(model, recipe_for(model)):
        with pytest.raises(ValueError, match=r"labels: sample 0 has a target to be predicted by the visual token at 3"):
            model(**inputs, labels=inputs["input_ids"])
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        with pytest.raises(ValueError, match="predicted by the visual token at 18"):  # the text token after the image
            model(**inputs, labels=labels)


@pytest.mark.parametrize("chunk", [4, 22, 100])
def test_chunked_prefill(model, inputs, chunk):
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=chunk, max_new_tokens=2)
    unchanged(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing(model, inputs):
    model.train()
    model.gradient_checkpointing_enable()
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="gradient checkpointing runs layers again"):
        model(**inputs)


def test_a_quantized_cache(model, inputs):
    class Rounded(QuantizedLayer):  # without a backend's package: one that quantizes nothing
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, q_tensor):
            return q_tensor

    cache = DynamicCache()
    cache.layers = [Rounded() for _ in range(5)]
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="DynamicCache of Rounded"):
        model(**inputs, **{CACHE: cache})


def test_a_pruned_cache_outside_of_prune(model, inputs):
    with torch.no_grad():
        with prune(model, recipe_for(model)):
            cache = cache_in(model(**inputs))
        with pytest.raises(ValueError, match=r"the KV cache was pruned: .* continue it in such a block"):
            model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_a_part_of_a_pruned_model(model, inputs):
    with prune(model, recipe_for(model)):
        with pytest.raises(ValueError, match="call the model that prune was given"):
            model.model(**inputs)
        with pytest.raises(ValueError, match="call the model that prune was given"):
            model.model.language_model(input_ids=inputs["input_ids"])


def test_a_copy_of_a_model_in_use(model, inputs):
    with prune(model, recipe_for(model)):
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="copied while it was in use by fitprune"):
            copied(**inputs)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_compiled_model(model, inputs, when):
    """Compiled code does not see hooks that come later: it would run dense, and silently."""
    recipe = recipe_for(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if when == "before":
            compiled(**inputs)
        with pytest.raises(ValueError, match=r"OptimizedModule is compiled: .* _orig_mod"), prune(compiled, recipe):
            pass
        with prune(model, recipe), pytest.raises(ValueError, match=r"compile"):
            compiled(**inputs)
    torch.compiler.reset()
    model.model.language_model.layers[2].compile(backend="eager")
    with pytest.raises(ValueError, match="LlamaDecoderLayer is compiled"), prune(model, recipe):
        pass
    unchanged(model)


@pytest.mark.parametrize("first", ["nothing", "text", "images", "reset"])
def test_images_put_in_by_hand_on_a_cache(model, inputs, first):
    """They would stay whole, silently."""
    with torch.no_grad(), prune(model, recipe_for(model)):
        cache = DynamicCache()
        if first == "text":
            cache = cache_in(model(input_ids=torch.tensor([[7, 8]])))
        elif first != "nothing":
            cache = cache_in(model(**inputs))
        if first == "reset":
            cache.reset()
        with pytest.raises(ValueError, match="which of them are visual tokens is unknown"):
            model(inputs_embeds=torch.randn(1, 5, 32), **{CACHE: cache})
        with pytest.raises(ValueError, match="has 16 visual tokens, but no image is given"):
            model(input_ids=inputs["input_ids"], **{CACHE: cache})
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_a_pruned_draft_model(model, inputs):
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match=r"draft model .* must not be pruned itself"):
        model.generate(**inputs, assistant_model=model, max_new_tokens=4)


def test_a_pruned_cache_that_was_taken_apart(model, inputs):
    with torch.no_grad(), prune(model, recipe_for(model)):
        parts = [layer[:2] for layer in cache_in(model(**inputs))]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(parts):
            cache.update(keys, values, number)
        with pytest.raises(ValueError, match="do not know which: a pruned cache was taken apart"):
            model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_a_mask_of_another_batch(model, inputs):
    with prune(model, recipe_for(model)), pytest.raises(ValueError, match="3 rows for 1 samples"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"].expand(3, -1)})


def test_scorers_that_return_no_scores(model, inputs):
    for wrong, message in [
        (lambda r: r.self_attention[0], r"shape \[25\]: must be a tensor \[1, 25\]"),
        (lambda r: r.self_attention[..., None], r"shape \[1, 25, 1\]"),
        (lambda r: None, "type NoneType"),
        (lambda r: r.self_attention * torch.nan, "NaN for a visual token"),
    ]:
        with prune(model, recipe_for(model), wrong), pytest.raises(ValueError, match=message):
            model(**inputs)


def test_a_recipe_that_is_none(model, inputs):
    with pytest.raises(ValueError, match="recipe is a dict: must be a PruningRecipe, its name"), prune(model, {}):
        pass
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file or folder"), prune(model, "a.json"):
        pass
    with pytest.raises(ValueError, match="the inputs have no image"):
        kept_positions(model, recipe_for(model), {"input_ids": torch.tensor([[7, 8]])})


def test_a_training_batch_is_measured_and_looked_at_as_it_is(model, inputs):
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 7
    batch = {**inputs, "labels": labels, "use_cache": True}
    entered = kept_positions(model, recipe_for(model), batch)
    short = kept_positions(model, recipe_for(model), {**inputs, "logits_to_keep": 3})
    assert all(torch.equal(one, other) for one, other in zip(entered, short, strict=True))
    one, other = measure(model, [batch]), measure(model, [inputs])
    assert torch.equal(one.cross_attention, other.cross_attention)
    with pytest.raises(ValueError, match="no image is given"):
        measure(model, [{k: v for k, v in inputs.items() if k != "pixel_values"}])


def test_an_unknown_scorer(model):
    with pytest.raises(ValueError, match="scorer='best': must be one of"), prune(model, recipe_for(model), "best"):
        pass
