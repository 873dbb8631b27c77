"""The vLLM plug-in: the same answers as transformers under `prune`, whatever the engine does with the requests.

Each test runs by both of vLLM's model runners, the second one on a CPU by Triton's interpreter. Engines have vLLM's own
settings: chunked prefill, prefix caching, its token budget.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from helpers.served import BUDGETS, OPTIONS, by_transformers, differing, first_apart, loaded, long_texts, prompts

STEP = 400  # tokens: two images of 144 and their question are pruned, three run dense, a long text is split


def require_same(found, expected):
    assert differing(found, expected) == []
    assert first_apart(found, expected).max() < 1e-3


@pytest.mark.parametrize("budget", BUDGETS)
def test_answers_are_those_of_transformers(digits, engines, runner, budget):
    recipe = digits / f"{budget}.json"
    asked = prompts()
    if budget == 40:  # where no variable names it
        engine = engines(digits / "beside", runner=runner, **OPTIONS)
    else:
        engine = engines(digits / "model", recipe, runner, **OPTIONS)
    assert "fitprune: visual tokens leave at layers" in engine.log
    assert ("Using V2 Model Runner" in engine.log) == (runner == "v2")
    found = engine.answer(asked)
    require_same(found, by_transformers(asked, recipe))
    found.logprobs = found.logprobs[:60]
    assert (first_apart(found, by_transformers(asked[:60], None)) > 1e-3).float().mean() > 0.25  # something was pruned


def test_split_texts_and_cached_ones_among_images(digits, engines, runner):
    """Steps of few tokens: long texts come in several, between prompts that come whole, or dense where none fits."""
    recipe = digits / "60.json"
    engine = engines(digits / "model", recipe, runner, max_num_batched_tokens=STEP, **OPTIONS)
    asked = prompts() + long_texts()
    assert all(len(loaded()[1].tokenizer(text).input_ids) > STEP for text, _ in long_texts())
    found = engine.answer(asked)
    dense = [each for each in asked if len(each[1]) == 3]
    expected = by_transformers(asked, recipe)
    for n, each in enumerate(asked):
        if each in dense:
            expected.ids[n], expected.logprobs[n] = (part[0] for part in vars(by_transformers([each], None)).values())
    require_same(found, expected)
    assert found.counters["fitprune:prompts_pruned"] == sum(1 <= len(files) <= 2 for _, files in asked)
    assert found.counters["fitprune:prompts_dense/longer_than_step"] == len(dense)
    assert found.counters["fitprune:prompts_held"] > 0

    again = long_texts() + asked[:30]  # texts first: images take blocks from what is cached
    second = engine.answer(again)
    assert second.ids == [*by_transformers(long_texts(), recipe).ids, *expected.ids[:30]]
    assert second.counters["prefix_cache_hits"] > 0
    assert min(second.cached[: len(long_texts())]) > STEP
    assert not any(cached for cached, each in zip(second.cached, again, strict=True) if 1 <= len(each[1]) <= 2)


@pytest.mark.parametrize("name", ["random", "vtw", "fastv"])
def test_methods_answer_as_in_transformers(digits, engines, runner, name):
    recipe, asked = digits / f"{name}.json", prompts()[:32]
    found = engines(digits / "model", recipe, runner, **OPTIONS).answer(asked)
    assert differing(found, by_transformers(asked, recipe)) == []


def test_a_prompt_that_ends_with_its_image_runs_dense(digits, engines, runner):
    """Its last token is a visual one; `prune` refuses it, a server cannot. Also where no question is read."""
    recipe = digits / "random.json"
    questions = [prompt for prompt in prompts()[:20] if prompt[1]]
    ends = [["<image>", files[:1]] for _, files in questions]
    engine = engines(digits / "model", recipe, runner, **OPTIONS)
    found = engine.answer(questions + ends)
    assert found.ids == by_transformers(questions, recipe).ids + by_transformers(ends, None).ids
    assert "no text follows its last image" in engine.log


def test_a_preempted_request_goes_on_as_it_had_begun(digits, engines, runner):
    """Blocks for a few requests only: they take each other's, and are prefilled again with what they said so far."""
    recipe, asked, job = digits / "60.json", prompts()[:40], {"ignore_eos": True}
    options = {**OPTIONS, "kv_cache_memory_bytes": 16 * 2**20, "max_model_len": 512, "block_size": 32}
    found = engines(digits / "model", recipe, runner, **options).answer(asked, max_tokens=48, **job)
    assert found.counters["num_preemptions"] > 0
    assert differing(found, by_transformers(asked, recipe, 48, **job)) == []


def test_a_quantized_cache_runs(digits, engines, runner):
    """Scores come from the queries and keys of the forward, before they are quantized."""
    asked, options = prompts()[:64], {**OPTIONS, "dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    found = engines(digits / "model", digits / "60.json", runner, **options).answer(asked)
    expected = by_transformers(asked, digits / "60.json")
    assert len(differing(found, expected)) < 0.1 * len(asked)  # which is what eight bits do to dense answers too


def test_without_a_recipe_vllm_is_as_it_was(digits, engines, runner):
    asked, options = prompts()[:32], {**OPTIONS, "enforce_eager": True}
    stock = engines(digits / "model", None, runner, {"VLLM_PLUGINS": "none"}, **options)
    ours = engines(digits / "model", None, runner, **options)
    assert ours.answer(asked).ids == stock.answer(asked).ids
    assert "fitprune: visual tokens leave" not in ours.log


def test_an_engine_that_would_prune_wrongly_does_not_start(digits, engines):
    """And what is wrong is the last thing on the screen."""
    with pytest.raises(RuntimeError) as caught:
        engines(digits / "model", digits / "60.json", enable_lora=True, **OPTIONS)
    assert "LoRA" in str(caught.value).strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_answers_on_a_gpu(digits, engines, runner, backend):
    """In bf16, where answers of one engine and another differ now and then without any recipe."""
    options = {**OPTIONS, "dtype": "bfloat16", "attention_config": {"backend": backend}}
    engine = engines(digits / "model", digits / "60.json", runner, **options)
    asked = prompts() + long_texts()
    for _ in range(2):
        found, expected = engine.answer(asked), by_transformers(asked, digits / "60.json")
        assert len(differing(found, expected)) < 0.05 * len(asked)
    assert found.counters["prefix_cache_hits"] > 0
