"""Divergence from the dense model against plain computations."""

import numpy as np
import pytest
import torch

from fitprune import PruningRecipe, prune
from fitprune.families.adapter import adapt
from fitprune.output_search.divergence import Judge, reference
from fitprune.scoring.by_head import HEAD_KINDS
from helpers.models import IMAGE, batch_of, prompts, replay, tiny_model

TOKENS = 5
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False}
LAYOUTS = [[3, 6], [5, 2, 4], [2, 9]]


@pytest.fixture
def model():
    """One whose first answer ends early, so that answers differ in length."""
    model = tiny_model()
    with torch.no_grad():
        answer = model.generate(**batch(model), **GREEDY, eos_token_id=None)[0, -TOKENS:]
    model.generation_config.eos_token_id = int(answer[1])
    return model


def batch(model, seed=1):
    return batch_of(prompts(model, LAYOUTS, seed=seed))


def recipe_of(model, keep, enter=(), scorer=None):
    return PruningRecipe(keep, adapt(model).fingerprint, 16, enter=enter, **({"scorer": scorer} if scorer else {}))


# --- the dense model's answers


def test_answers_and_distributions_are_those_of_generate(family):
    model = tiny_model(family)
    inputs = batch(model)
    with torch.no_grad():
        free = model.generate(**inputs, **GREEDY, eos_token_id=None)[:, -TOKENS:]
    for ends in (None, int(free[0, 1]), [int(free[0, 2]), int(free[1, 0])], [int(token) for token in free[:, 1]]):
        model.generation_config.eos_token_id = ends
        dense = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        found = reference(model, inputs, max_new_tokens=TOKENS)
        prompt = inputs["input_ids"].shape[1]
        assert len(found) == 3
        assert found.prompt == prompt
        assert torch.equal(found.answers, dense.sequences[:, prompt:])
        stops = [] if ends is None else ends if isinstance(ends, list) else [ends]
        valid = torch.zeros_like(found.valid)
        for row, answer in enumerate(found.answers.tolist()):
            length = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
            valid[row, :length] = True
        assert torch.equal(found.valid, valid)
        assert bool(valid.all()) == (ends is None)
        expected = torch.stack(dense.logits, 1).log_softmax(-1)
        assert torch.allclose(found.log_probs[valid], expected[valid], atol=1e-5)
        visual = (inputs["input_ids"] == IMAGE).sum(1)
        real = inputs["attention_mask"].sum(1) + valid[:, :-1].sum(1) - visual
        assert found.visual_tokens == round(float(visual.float().mean()))
        assert abs(found.text_tokens - float(real.float().mean())) <= 1


def test_an_answer_of_one_token_is_enough(model):
    found = reference(model, batch(model), max_new_tokens=1)
    assert found.answers.shape == (3, 1)
    assert torch.equal(found.inputs["input_ids"], batch(model)["input_ids"])
    with torch.no_grad():
        expected = model(**batch(model)).logits[:, -1:].log_softmax(-1)
    assert torch.allclose(found.log_probs, expected, atol=1e-5)
    recipe = recipe_of(model, (1.0, 0.5, 0.5, 0.5, 0.5))
    divergence = Judge(model, [found]).divergences(0, [recipe])[0]
    assert divergence == pytest.approx(plain(model, found, batch(model), recipe), abs=1e-5)


def test_what_cannot_be_answered_is_refused(model):
    with pytest.raises(ValueError, match="a prompt is padded on the right: pad on the left"):
        reference(model, batch_of(prompts(model, LAYOUTS), "right"), max_new_tokens=2)
    with pytest.raises(ValueError, match="sample 1 of the batch has no visual token: each calibration prompt needs an"):
        reference(model, batch_of(prompts(model, [[3, 6], [20], [2, 9]])), max_new_tokens=2)
    with pytest.raises(ValueError, match="sample 0 of the batch has no visual token"):
        reference(model, prompts(model, [[8]])[0], max_new_tokens=2)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"logits are NaN in torch.float32: use another dtype"):
        reference(model, batch(model), max_new_tokens=2)


# --- divergence


def plain(model, dense, inputs, recipe):
    """Mean KL over each answer's tokens, from one whole call with the images not yet encoded."""
    answers, (rows, prompt) = dense.answers[:, :-1], inputs["input_ids"].shape
    call = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answers], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], dense.valid[:, :-1].long()], 1),
        "logits_to_keep": torch.arange(prompt - 1, prompt + answers.shape[1]),
    }
    with torch.no_grad(), prune(model, recipe):
        pruned = model(**call).logits.double().log_softmax(-1)
    with torch.no_grad():
        logits = model(**call).logits.double().log_softmax(-1)
    found = []
    for row in range(rows):
        steps = [step for step in range(answers.shape[1] + 1) if dense.valid[row, step]]
        terms = [(logits[row, step].exp() * (logits[row, step] - pruned[row, step])).sum() for step in steps]
        found.append(float(sum(terms)) / len(steps))
    return found


HEADS = {"name": "heads", "parameters": {"terms": [["mean", 1, 1.0], ["self", 2, 0.5]], "diversity": 0.5}}
STAGES = {"name": "by-stage", "parameters": {"stages": {"before 2": "last", "3": "accumulated"}}}
RECIPES = {
    "before layer 0": ((0.5,) * 5, (0.5,) * 5),
    "inside layer 0": ((0.5, 0.5, 0.5, 0.25, 0.25),),
    "before layer 1": ((1.0, 0.4, 0.4, 0.4, 0.4), (1.0, 0.4, 0.4, 0.4, 0.4)),
    "inside layer 2": ((1.0, 1.0, 0.3, 0.3, 0.1),),
    "before and inside layer 2": ((1.0, 1.0, 0.3, 0.3, 0.3), (1.0, 1.0, 0.6, 0.3, 0.3), HEADS),
    "before layer 4": ((1.0, 1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0, 0.0)),
    "inside layer 4": ((1.0, 1.0, 1.0, 1.0, 0.5),),
    "nothing": ((1.0,) * 5,),
    "less than a token": ((1.0, 1.0, 1.0, 0.999, 0.999),),
    "accumulated": ((1.0, 1.0, 1.0, 0.4, 0.4), (), {"name": "accumulated"}),
    "accumulated at a later stage": ((1.0, 1.0, 0.5, 0.2, 0.2), (1.0, 1.0, 0.5, 0.5, 0.2), STAGES),
}


def parts(model):
    """All that a judge could leave on a model that has run before."""
    hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    layers = model.model.language_model.layers
    return hooks, [(list(vars(layer)), layer.self_attn.config) for layer in layers], list(vars(model.model))


def test_divergences_are_those_of_whole_calls(family, model):
    if family != "llava":
        model = tiny_model(family)
    inputs = [batch(model), batch(model, seed=2)]
    with torch.no_grad():
        logits = model(**inputs[0]).logits
    before = parts(model)
    references = [reference(model, one, max_new_tokens=TOKENS) for one in inputs]
    judge = Judge(model, references)
    assert judge.unit == 6
    recipes = {name: recipe_of(model, *recipe) for name, recipe in RECIPES.items()}
    for number, (dense, one) in enumerate(zip(references, inputs, strict=True)):
        together = dict(zip(recipes, judge.divergences(number, list(recipes.values())), strict=True))
        for name, recipe in recipes.items():
            expected = plain(model, dense, one, recipe)
            assert together[name] == pytest.approx(expected, abs=1e-5), name
            assert judge.divergences(number, [recipe])[0] == pytest.approx(together[name], abs=1e-6), name
        assert together["nothing"] == [0.0] * 3
        harmless = {"nothing", "less than a token", "inside layer 4"}  # no row reads what left inside the last layer
        assert {name for name, values in together.items() if max(values) < 1e-5} == harmless
    assert judge.divergences(0, []) == []
    assert parts(model) == before
    assert not any("forward" in vars(layer) for layer in model.model.language_model.layers)
    with torch.no_grad():
        assert torch.equal(model(**inputs[0]).logits, logits)


def test_divergence_is_that_of_decoding_step_by_step(model):
    inputs = batch(model)
    dense = reference(model, inputs, max_new_tokens=TOKENS)
    assert not dense.valid.all()
    for name in ("inside layer 0", "before layer 1", "inside layer 2", "accumulated at a later stage"):
        recipe = recipe_of(model, *RECIPES[name])
        with prune(model, recipe):
            pruned = replay(model, inputs, dense.answers)
        assert Judge(model, [dense]).divergences(0, [recipe])[0] == pytest.approx(
            dense.divergence(pruned).tolist(), abs=1e-4
        )


def test_divergence_by_hand_where_a_token_is_impossible():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]]).log()
    logits = torch.tensor([[[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]], [[0.25, 0.25, 0.5], [0.3, 0.3, 0.4]]]).log()
    valid = torch.tensor([[True, True], [True, False]])
    inputs = reference_of(log_probs, valid)
    before = torch.zeros(2, 1, 3)  # of the prompt
    found = inputs.divergence(torch.cat([before, logits], 1))
    assert found.tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)


def reference_of(log_probs, valid):
    from fitprune.output_search.divergence import Reference

    return Reference({}, log_probs, valid, torch.zeros(valid.shape, dtype=torch.long), 1, 1, 1)


def test_dense_layers_run_once_for_all_recipes(model):
    judge = Judge(model, [reference(model, batch(model), max_new_tokens=TOKENS)])
    recipes = [recipe_of(model, *RECIPES[name]) for name in ("before layer 1", "inside layer 2", "before layer 4")]
    runs = [0] * 5
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
        for number, layer in enumerate(model.model.language_model.layers)
    ]
    judge.divergences(0, [*recipes, recipe_of(model, *RECIPES["nothing"])])
    for handle in handles:
        handle.remove()
    assert runs == [1, 2, 3, 3, 3]
    price = judge.price(0, recipes)
    assert sum(judge.price(0, [one]) for one in recipes) == pytest.approx(price + 0.2 + 0.4)
    assert judge.price(0, [recipe_of(model, *RECIPES["nothing"])]) == 0
    assert 4 / 5 < judge.price(0, recipes[2:]) < 1
    assert judge.price(0, recipes[2:] * 2) < 1.2


def test_a_failure_leaves_the_model_as_it_was(model):
    judge = Judge(model, [reference(model, batch(model), max_new_tokens=2)])
    before = parts(model)
    wrong = recipe_of(
        model, *RECIPES["inside layer 2"], (), {"name": "heads", "parameters": {"terms": [["mean", 9, 1]]}}
    )
    with pytest.raises(ValueError, match="terms name head 9"):
        judge.divergences(0, [wrong])
    assert parts(model) == before
    assert judge.divergences(0, [recipe_of(model, *RECIPES["nothing"])]) == [[0.0] * 3]


def test_watch_shows_what_the_dense_maps_show(model):
    inputs = batch(model)
    dense = reference(model, inputs, max_new_tokens=TOKENS)
    before = parts(model)
    seen = dict(Judge(model, [dense]).watch(0))
    assert list(seen) == [0, 1, 2, 3, 4]
    assert parts(model) == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**dense.inputs, output_attentions=True).attentions
    prompt = inputs["input_ids"].shape[1]
    for layer, heads in seen.items():
        for row in range(3):
            visual = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
            question = torch.arange(int(visual.max()) + 1, prompt)
            answer = torch.arange(prompt, prompt + TOKENS - 1)[dense.valid[row, :-1]]
            weights, image = maps[layer][row], heads.image[row]
            own = torch.zeros(4, len(visual))
            for number in range(int(image.max()) + 1):
                member = image[visual] == number
                assert int(member.sum()) == 16
                own[:, member] = weights[:, visual[member]][:, :, visual[member]].mean(1)
            asked = weights[:, question][:, :, visual]
            kinds = {"mean": asked.mean(1), "max": asked.amax(1), "last": asked[:, -1], "self": own}
            expected = torch.cat([kinds[kind] for kind in HEAD_KINDS])
            assert torch.allclose(heads.received[row, visual].T, expected, atol=1e-6)
            used = weights[:, torch.cat([question, answer])][:, :, visual].amax((0, 1))
            assert torch.allclose(heads.used[row, visual], used, atol=1e-6)
            text = image < 0
            assert not heads.received[row, text].any()
            assert not heads.used[row, text].any()
