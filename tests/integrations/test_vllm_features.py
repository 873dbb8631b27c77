"""vLLM's features, among requests that are pruned: the same answers as transformers under `prune`.

docs/vllm-features.md says which ones are supported; test_vllm_rules.py has those that are refused.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

import xgrammar

from fitprune import load_samples, prune
from fitprune._support import assets
from helpers.served import OPTIONS, by_transformers, chat, differing, loaded, long_texts, prompts
from helpers.vllm_engines import prompt_of

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FEW_BLOCKS = {**OPTIONS, "kv_cache_memory_bytes": 16 * 2**20, "block_size": 32, "max_model_len": 1024}
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer"}, "odd": {"type": "boolean"}},
    "required": ["digit", "odd"],
    "additionalProperties": False,
}
STRUCTURES = {"json": SCHEMA, "regex": "[a-c]{2}[0-9]"}


def mixed(count):
    """Prompts of one image, of several, and of none."""
    kinds = {}
    for prompt in prompts():
        kinds.setdefault(min(len(prompt[1]), 2), []).append(prompt)
    return [*kinds[1][:count], *kinds[2][:4], *kinds[0][:4]]


def inputs_of(prompt):
    images = [Image.open(file).convert("RGB") for file in prompt[1]]
    return loaded()[1](text=prompt[0], images=images or None, return_tensors="pt")


def constrained(prompt, recipe, kind):
    """What transformers answers where a grammar allows certain tokens alone."""
    model, processor = loaded()
    info = xgrammar.TokenizerInfo.from_huggingface(processor.tokenizer, vocab_size=model.config.text_config.vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    structure = STRUCTURES[kind]
    grammar = (
        compiler.compile_json_schema(json.dumps(structure)) if kind == "json" else compiler.compile_regex(structure)
    )
    inputs = inputs_of(prompt)
    with prune(model, recipe), torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, pad_token_id=0,
            logits_processor=[xgrammar.contrib.hf.LogitsProcessor(grammar)],
        )  # fmt: skip
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def prompt_logprobs(prompt, recipe):
    """Of each token of a prompt but the first, the log-probability under `prune`."""
    model, _ = loaded()
    inputs = inputs_of(prompt)
    with prune(model, recipe), torch.inference_mode():
        rows = model(**inputs).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, inputs["input_ids"][0, 1:, None])[:, 0]


def with_embeddings(prompt):
    """A prompt with its images encoded already."""
    model, processor = loaded()
    images = [Image.open(file).convert("RGB") for file in prompt[1]]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return {"prompt": prompt[0], "encoded": torch.stack(list(features)).numpy()}


def test_drafts_by_ngrams_change_no_answer(digits, engines, runner):
    """Also where requests preempt each other, and texts come in several steps."""
    recipe = digits / "60.json"
    engine = engines(
        digits / "model", recipe, runner, **FEW_BLOCKS, max_num_batched_tokens=400, speculative_config=DRAFTS
    )
    asked = [each for each in mixed(8 if runner == "v1" else 4) if len(each[1]) < 3] + long_texts()[:2]
    found = engine.answer(asked, max_tokens=24, ignore_eos=True)
    assert differing(found, by_transformers(asked, recipe, 24, ignore_eos=True)) == []
    assert found.counters["spec_decode_num_accepted_tokens"] > 0
    assert runner == "v2" or found.counters["num_preemptions"] > 0
    asked = mixed(4)[:4]
    for kind, structure in STRUCTURES.items():
        found = engine.answer(asked, max_tokens=40, structured_outputs={kind: structure})
        assert [without_end(ids) for ids in found.ids] == [without_end(constrained(p, recipe, kind)) for p in asked]


def without_end(ids):
    end = loaded()[0].generation_config.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_structure_constrains_the_answer_of_transformers(digits, engines, runner, kind):
    recipe, asked = digits / "60.json", mixed(6)
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    found = engine.answer(asked, max_tokens=40, structured_outputs={kind: STRUCTURES[kind]})
    assert [without_end(ids) for ids in found.ids] == [without_end(constrained(p, recipe, kind)) for p in asked]


def test_log_probabilities_of_prompts_are_those_of_prune(digits, engines, runner):
    """Also at visual tokens that left, whose rows are zero there as here."""
    recipe, asked = digits / "60.json", mixed(6)
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    found = engine.answer(asked, prompt_logprobs=0)
    assert differing(found, by_transformers(asked, recipe)) == []
    for prompt, (none, *rest) in zip(asked, found.prompt_logprobs, strict=True):
        assert none is None
        torch.testing.assert_close(torch.tensor(rest), prompt_logprobs(prompt, recipe), atol=1e-3, rtol=0)


@pytest.mark.parametrize("how", ["abort", "sleep"])
def test_interrupted_requests_leave_nothing(digits, engines, runner, how):
    """Aborted while they are queued, prefilled and decoded; or all preempted, and their caches gone."""
    recipe, asked = digits / "60.json", mixed(8)
    engine = engines(digits / "model", recipe, runner, **FEW_BLOCKS)
    expected = by_transformers(asked, recipe, 12, ignore_eos=True).ids
    vllms = [prompt_of(*each) for each in asked]
    for steps in (0, 1, 3) if runner == "v1" else (2,):
        sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        found = engine.call("interrupted", vllms, steps, how, **sampling)
        assert found == (expected[1::2] if how == "abort" else expected)
    assert differing(engine.answer(asked), by_transformers(asked, recipe)) == []


def test_short_questions_and_salts_of_the_users(digits, engines, runner):
    """One token after the image; and all again: under the same salt nothing is taken from the prefix cache."""
    recipe = digits / "60.json"
    files = [prompt[1] for prompt in mixed(4) if len(prompt[1]) == 1]
    asked = [[text, each] for text in ("<image>a", "<image>\n", "a<image>b") for each in files]
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    expected = by_transformers(asked, recipe)
    for _ in range(2):
        salted = engine.answer([{**prompt_of(*each), "cache_salt": "a user's"} for each in asked])
        assert differing(salted, expected) == []
        assert not any(salted.cached)


def test_several_answers_to_a_prompt(digits, engines, runner):
    """vLLM prefills the prompt for each: all are pruned alike."""
    recipe, asked = digits / "60.json", mixed(4)[:4]
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    found = engine.answer(asked, n=3, temperature=0.01, seed=1)
    assert found.samples == [[ids] * 3 for ids in by_transformers(asked, recipe).ids]


def test_a_conversation_is_pruned_by_all_text_after_its_image(digits, engines, runner):
    recipe = digits / "60.json"
    turns = [
        chat(sample.text, 1) + " a digit" + chat("Is it red?") for sample in load_samples(assets.folder("test"))[:4]
    ]
    asked = [
        [text, [str(sample.image)]] for text, sample in zip(turns, load_samples(assets.folder("test")), strict=False)
    ]
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    assert differing(engine.answer(asked), by_transformers(asked, recipe)) == []


def test_settings_that_change_no_answer(digits, engines):
    """All at once, as each is another way for the same requests to come and go."""
    recipe, asked = digits / "60.json", mixed(12)
    engine = engines(
        digits / "model", recipe, "v1", **FEW_BLOCKS, enable_mm_embeds=True, enable_prompt_embeds=True,
        mm_processor_cache_gb=0, stream_interval=4, scheduling_policy="priority", mm_encoder_tp_mode="data",
        scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler", disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    encoded = [with_embeddings(each) if each[1] else each for each in asked]
    expected = by_transformers(asked, recipe)
    assert differing(engine.answer(asked), expected) == []
    assert differing(engine.answer(encoded), expected) == []
    broken = {**encoded[0], "encoded": np.full_like(encoded[0]["encoded"], np.nan)}
    beside = engine.answer([broken, *encoded])
    beside.ids.pop(0)  # whatever it is
    assert differing(beside, expected) == []
