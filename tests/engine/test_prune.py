"""`prune` against the masked dense oracle, and what it must leave behind: nothing."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import PruningRecipe, fit, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.costs import flops
from fitprune.costs.flops import prefill_flops
from fitprune.engine.prune import kept_positions
from fitprune.engine.remover import removing
from fitprune.families.adapter import adapt
from fitprune.recipes.rounding import keep_fractions
from fitprune.scoring.scorers import Scorer
from helpers.models import (
    CACHE,
    COUNTED,
    IMAGE,
    Oracle,
    batch_of,
    cache_in,
    greedy_logits,
    prompts,
    tiny_inputs,
    tiny_model,
)

COUNTS = {"llava": [3, 0, 5, 4, 0], "llava_next": [7, 0, 11, 9, 3]}


def recipe_for(model, inputs, counts=None):
    visual = int((inputs["input_ids"][0] == IMAGE).sum())
    counts = counts or COUNTS[model.config.model_type]
    return PruningRecipe(keep_fractions(counts, visual), adapt(model).fingerprint, visual)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_an_all_keep_recipe_is_bit_identical_to_dense(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2)
    dense, _ = greedy_logits(model, inputs, 8)
    with prune(model, recipe_for(model, inputs, [0] * 5)):
        pruned, _ = greedy_logits(model, inputs, 8)
    assert torch.equal(dense, pruned)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "pad"), [(1, ()), (3, ()), (3, (2, 0, 5))])
def test_prefill_and_sixteen_steps_equal_the_masked_dense_oracle(family, attention, batch, pad):
    model = tiny_model(family, attention=attention)
    inputs = tiny_inputs(model, batch=batch, before=8, pad=pad)
    recipe = recipe_for(model, inputs)
    with prune(model, recipe):
        pruned, cache = greedy_logits(model, inputs, 16)
    reference = tiny_model(family, attention="eager")
    oracle = Oracle(reference, recipe.keep)
    expected, _ = greedy_logits(reference, inputs, 16, oracle=oracle)
    assert torch.equal(pruned.argmax(-1), expected.argmax(-1))
    assert relative(pruned, expected) < 1e-5
    kept = [recipe.visual_tokens, *recipe.kept(recipe.visual_tokens)]
    text = inputs["input_ids"].shape[1] - recipe.visual_tokens
    assert [cache.get_seq_length(layer) for layer in range(5)] == [n + text + 16 for n in kept[:-1]]


def test_the_trained_model_equals_the_oracle_on_real_images():
    source = assets.folder("model")
    model, reference = (
        AutoModelForImageTextToText.from_pretrained(source, attn_implementation=a).eval() for a in ("sdpa", "eager")
    )
    processor = AutoProcessor.from_pretrained(source)
    samples = load_samples(assets.folder("calibration"))
    stats = measure(model, make_batches(samples[:16], processor, batch_size=8))
    for budget in (0.4, 0.6, 0.8, 0.9):
        recipe = fit(stats, flops_reduction=budget)
        for inputs in make_batches(samples[16:24], processor, batch_size=4):
            with prune(model, recipe):
                pruned, _ = greedy_logits(model, inputs, 16)
            expected, _ = greedy_logits(reference, inputs, 16, oracle=Oracle(reference, recipe.keep))
            assert relative(pruned, expected) < 1e-5


@pytest.mark.parametrize("counts", [[16, 0, 0, 0, 0], [0, 0, 0, 0, 16], [1, 1, 1, 1, 1], [15, 1, 0, 0, 0]])
def test_extreme_recipes_equal_the_oracle(counts):
    model, reference = tiny_model(), tiny_model(attention="eager")
    inputs = tiny_inputs(model, batch=2)
    recipe = recipe_for(model, inputs, counts)
    with prune(model, recipe):
        pruned, _ = greedy_logits(model, inputs, 4)
    expected, _ = greedy_logits(reference, inputs, 4, oracle=Oracle(reference, recipe.keep))
    assert relative(pruned, expected) < 1e-5


def test_generate_gives_the_tokens_of_stepwise_decoding(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=3, before=8, pad=(2, 0, 5))
    with prune(model, recipe_for(model, inputs)):
        stepwise, _ = greedy_logits(model, inputs, 9)
        ids = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
        drawn = model.generate(**inputs, max_new_tokens=10, do_sample=True, top_k=1, eos_token_id=None)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], stepwise.argmax(-1))
    assert torch.equal(drawn, ids)


def test_assisted_decoding_equals_plain_greedy(family):
    """Draft tokens of the first step come with the prompt; they must not decide which tokens leave."""
    model = tiny_model(family)
    drafted = 0
    for seed in range(24):
        inputs = tiny_inputs(model, after=10, seed=seed)
        inputs["input_ids"][0, -3:] = inputs["input_ids"][0, -6:-3]  # a repetition, for the look-up to find
        plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        with prune(model, recipe_for(model, inputs)):
            expected = model.generate(**inputs, **plain)
            lengths = []
            handle = model.model.language_model.register_forward_pre_hook(
                lambda _, args, kwargs, lengths=lengths: lengths.append(kwargs["inputs_embeds"].shape[1]),
                with_kwargs=True,
            )
            assisted = model.generate(**inputs, **plain, prompt_lookup_num_tokens=3)
            handle.remove()
        drafted += lengths[0] > inputs["input_ids"].shape[1]
        assert torch.equal(assisted, expected)
    assert drafted > 12


def test_a_given_answer_does_not_decide_what_leaves():
    model = tiny_model()
    inputs = tiny_inputs(model, after=9)
    recipe = recipe_for(model, inputs)
    question = {k: v[:, :-4] if k != "pixel_values" else v for k, v in inputs.items()}
    with torch.no_grad(), prune(model, recipe):
        first = model(**question).logits[:, -1]
        teacher_forced = model(**inputs, logits_to_keep=5).logits
        assert relative(teacher_forced[:, 0], first) < 1e-5


def test_two_images_keep_their_own_shares_and_text_stays():
    model = tiny_model()
    inputs = tiny_inputs(model, images=2)
    recipe = PruningRecipe(keep_fractions([4, 0, 4, 4, 0], 16), adapt(model).fingerprint, 16)
    entered = kept_positions(model, recipe, inputs)
    ids = inputs["input_ids"][0]
    first = torch.arange(len(ids)) < 3 + 16
    last = entered[-1][0]
    assert int((ids[last] != IMAGE).sum()) == int((ids != IMAGE).sum())
    visual = last[ids[last] == IMAGE]
    assert (int(first[visual].sum()), int((~first[visual]).sum())) == (4, 4)
    assert torch.equal(last, last.sort().values)


def test_a_sample_whose_visual_tokens_have_all_left_does_not_stop_the_others():
    """Its question is still there, in rows that come before every visual token of the batch."""
    model = tiny_model("llava_next")
    samples = prompts(model, [[340, 20], [5, 450]])
    recipe = PruningRecipe((0.5, 0.011, 0.004, 0.004, 0.004), adapt(model).fingerprint, 60)
    with prune(model, recipe), torch.no_grad():
        together = model(**batch_of(samples)).logits[:, -1]
        for row, sample in zip(together, samples, strict=True):
            assert relative(row, model(**sample).logits[0, -1]) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_executed_flops_equal_the_cost_model_within_one_percent(family, attention, batch, monkeypatch):
    if attention == "eager":  # it tells no log-sum-exp, so the softmax is made, in smaller blocks
        monkeypatch.setattr(flops, "SCORE_BLOCK", 64)
        monkeypatch.setattr(flops, "LSE_COLUMNS", 0)
    model = tiny_model(family, attention=attention)
    inputs = tiny_inputs(model, batch=batch, before=4, after=9)
    recipe = recipe_for(model, inputs)
    crops = inputs["pixel_values"].shape[1] if family == "llava_next" else 1
    for counts in (recipe.counts(recipe.visual_tokens), [0] * 5):
        used = recipe_for(model, inputs, counts)
        with prune(model, used), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        shape = adapt(model).fingerprint
        predicted = prefill_flops(
            shape, recipe.visual_tokens, counts, text_before=4, text_after=9, crops=crops, value_bytes=4
        ).total
        # Eager attention of Llama's rotary tables is a product too: positions x frequencies, no part of the cost.
        assert counter.get_total_flops() == pytest.approx(predicted * batch, rel=0.01)


def handles(model):
    """All that a hook or another config could leave on a module."""
    tables = [name for name in vars(torch.nn.Module()) if "hooks" in name]
    return [
        (name, id(getattr(module, "config", None)), [list(getattr(module, table)) for table in tables])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["block", "mlp of a pruning layer", "third token"])
def test_nothing_is_left_on_the_model(error, where):
    model = tiny_model()
    inputs = tiny_inputs(model)
    before, _ = greedy_logits(model, inputs, 4)
    implementation = model.model.language_model.config._attn_implementation
    interrupted = model.model.language_model.layers[2].mlp.act_fn
    had = handles(model)  # transformers holds some of its own on the vision tower

    calls = iter(range(100))

    def interrupt(*_):
        if where != "third token" or next(calls) == 2:
            raise error

    handle = interrupted.register_forward_pre_hook(interrupt) if error and where != "block" else None
    caught = False
    try:
        with prune(model, recipe_for(model, inputs)):
            model.generate(**inputs, max_new_tokens=5, eos_token_id=None)
            if error and where == "block":
                raise error
    except (RuntimeError, KeyboardInterrupt):
        caught = True
    if handle:
        handle.remove()
    assert caught == (error is not None)
    assert handles(model) == had
    assert model.model.language_model.config._attn_implementation == implementation
    assert model.config.text_config._attn_implementation == implementation
    after, _ = greedy_logits(model, inputs, 4)
    assert torch.equal(before, after)


@pytest.mark.parametrize("how", ["same block", "another block", "copy"])
def test_a_text_turn_continues_a_pruned_cache(how):
    """The second turn's four tokens in one pass equal the same tokens one by one."""
    model = tiny_model()
    inputs = tiny_inputs(model, batch=2, before=8, pad=(3, 0))
    recipe, more = recipe_for(model, inputs), torch.tensor([[7, 8, 9, 10]] * 2)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    positions = mask.cumsum(-1) - 1

    def turn(cache, tokens, start):
        stop = inputs["input_ids"].shape[1] + start + tokens.shape[1]
        where = positions[:, stop - tokens.shape[1] : stop]
        return model(input_ids=tokens, attention_mask=mask[:, :stop], position_ids=where, **{CACHE: cache}).logits

    with torch.no_grad():
        with prune(model, recipe):
            steps = cache_in(model(**inputs, position_ids=positions[:, :-4].clamp(min=0)))
            cache = copy.deepcopy(steps)
            one_by_one = torch.cat([turn(steps, more[:, i : i + 1], i) for i in range(4)], 1)
            if how != "another block":
                at_once = turn(copy.deepcopy(cache) if how == "copy" else cache, more, 0)
        if how == "another block":
            with prune(model, recipe):
                at_once = turn(cache, more, 0)
    assert relative(at_once, one_by_one) < 1e-5


def test_a_custom_scorer_is_obeyed():
    model = tiny_model()
    inputs = tiny_inputs(model)
    recipe = recipe_for(model, inputs, [10, 0, 0, 0, 0])

    def first_stay(received):
        return -torch.arange(received.self_attention.shape[1]).expand_as(received.self_attention).float()

    entered = kept_positions(model, recipe, inputs, scorer=first_stay)
    assert entered[1][0].tolist() == [*range(3 + 6), *range(3 + 16, 3 + 16 + 6)]


@pytest.mark.gpu
def test_bfloat16_on_cuda_decodes_as_the_oracle_does():
    model = tiny_model().to("cuda")
    inputs = {k: v.to("cuda") for k, v in tiny_inputs(model, batch=2).items()}
    with prune(model, recipe_for(model, inputs)):
        on_gpu, _ = greedy_logits(model, inputs, 8)
    model = model.to("cpu")
    inputs = {k: v.to("cpu") for k, v in inputs.items()}
    with prune(model, recipe_for(model, inputs)):
        on_cpu, _ = greedy_logits(model, inputs, 8)
    assert relative(on_gpu.cpu(), on_cpu) < 1e-4


def test_a_scorer_that_reads_the_layers_so_far_must_say_so():
    model = tiny_model()
    inputs = tiny_inputs(model)
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.5, 0.5), adapt(model).fingerprint, 16)

    def score(view):
        return view.prompt.received.gather(1, view.column)

    with prune(model, recipe, score), pytest.raises(ValueError, match=r"Scorer\(\.\.\., accumulates=True\)"):
        model(**inputs)
    with prune(model, recipe, Scorer(score, accumulates=True)) as pruner:
        model(**inputs)
    assert pruner.last.kept[-1] == [[8]]


def test_what_chooses_by_itself_has_no_numbers_to_keep():
    model = tiny_model()
    with (
        removing(adapt(model), lambda view: view.left),
        pytest.raises(ValueError, match="how many tokens are to be kept, which is not known"),
    ):
        model(**tiny_inputs(model))
