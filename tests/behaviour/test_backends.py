"""Attention implementations, dtypes, devices, gradients and threads: the same tokens stay, whatever runs the model."""

import inspect
import threading

import pytest
import torch
from transformers import AutoModelForImageTextToText, modeling_flash_attention_utils

from fitprune import measure, prune
from fitprune.engine.prune import kept_positions
from helpers.calls import KEEP, NEW, ONE, PLAIN, SEVERAL, generate, recipe_of
from helpers.models import Oracle, batch_of, converse, prompts, replay, tiny_model


def call_and_generate(model, inputs):
    """What is kept at each layer, the logits of the prompt, and a greedy answer."""
    recipe = recipe_of(model)
    with torch.no_grad(), prune(model, recipe):
        logits = model(**inputs).logits
        answer = generate(model, inputs, **PLAIN).sequences[:, inputs["input_ids"].shape[1] :]
    return kept_positions(model, recipe, inputs), logits, answer


def assert_alike(found, expected, atol=1e-4):
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(found[1], expected[1], atol=atol)
    assert torch.equal(found[2], expected[2])


def flash(query, key, value, softmax_scale=None, causal=False, dropout_p=0.0):
    """What flash_attn_func computes: [batch, tokens, heads, size], queries aligned with the last keys."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    rows, keys = query.shape[2], key.shape[2]
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=softmax_scale)
    return out.transpose(1, 2)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, dropout_p=0.0
):
    """What flash_attn_varlen_func computes: sequences in a row, without padding."""
    parts = []
    for row in range(len(cu_seqlens_q) - 1):
        own, keys = slice(*cu_seqlens_q[row : row + 2].tolist()), slice(*cu_seqlens_k[row : row + 2].tolist())
        parts.append(flash(q[None, own], k[None, keys], v[None, keys], softmax_scale, causal)[0])
    return torch.cat(parts)


@pytest.fixture
def flash_attention_2(monkeypatch):
    """The way of FlashAttention 2 through transformers, with its kernels written in torch: there is none for a CPU."""
    module = modeling_flash_attention_utils
    functions = (flash, flash_varlen, None, module._pad_input, module._unpad_input)
    monkeypatch.setattr(module, "_lazy_imports", lambda name, *_, **__: {"flash_attention_2": functions}[name])
    monkeypatch.setattr(module, "_loaded_implementation", None)
    monkeypatch.setattr(inspect.getmodule(module.lazy_import_flash_attention), "_flash_fn", None)


LAYOUTS = {"one": [[3, 6]], "image first": [[0, 6]], "ragged": SEVERAL[:4]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_flash_attention_keeps_the_tokens_of_sdpa(family, layouts, side, flash_attention_2):
    model = tiny_model(family)
    inputs = batch_of(prompts(model, LAYOUTS[layouts]), side)
    expected = call_and_generate(model, inputs)
    model.config.text_config._attn_implementation = "flash_attention_2"
    assert_alike(call_and_generate(model, inputs), expected)
    assert model.config.text_config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("rows", [1, 4])
def test_flash_attention_sees_one_sequence_where_positions_have_gaps(family, rows, flash_attention_2):
    """In a batch of one, transformers takes gaps in position_ids for packed sequences, and forgets the past."""
    model = tiny_model(family)
    first, later = (batch_of(prompts(model, layouts[:rows])) for layouts in ([[3, 6], *SEVERAL], [[2, 5], *ONE]))
    answers = torch.randint(10, 97, (2, rows, 3), generator=torch.Generator().manual_seed(4))
    turns = [(first, answers[0]), (later, answers[1])]
    found = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.config.text_config._attn_implementation = implementation
        with prune(model, recipe_of(model)):
            found.append(converse(model, turns))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_flex_attention_keeps_the_tokens_of_sdpa(family, layouts, side, monkeypatch):
    """Not compiled: torch 2.13's flex kernel for CPUs does not compile for changing lengths, dense or pruned."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model = tiny_model(family)
    inputs = batch_of(prompts(model, LAYOUTS[layouts]), side)
    expected = call_and_generate(model, inputs)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert_alike(call_and_generate(model, inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_on_cuda_each_implementation_keeps_the_tokens_of_eager(family, attention):
    dtype = torch.bfloat16 if "flash" in attention else torch.float32
    model = tiny_model(family, attention="eager").to("cuda", dtype)
    inputs = batch_of(prompts(model, SEVERAL[:4]))
    inputs = {n: v.to("cuda", dtype if v.is_floating_point() else None) for n, v in inputs.items()}
    expected = call_and_generate(model, inputs)
    model.set_attn_implementation(attention)
    found = call_and_generate(model, inputs)
    assert torch.equal(found[0][1], expected[0][1])  # chosen from the first layer, before rounding adds up
    assert torch.allclose(found[1][:, -1], expected[1][:, -1], atol=0.2 if "flash" in attention else 1e-3)


def test_the_users_implementation_stays_in_use(family):
    """Also if it is another one for the vision tower, and if the user changes it inside the block."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    expected = call_and_generate(model, inputs)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    called = []
    with torch.no_grad(), prune(model, recipe_of(model)):
        assert model.config.vision_config._attn_implementation == "eager"
        for implementation in ("sdpa", "eager", "sdpa"):
            model.set_attn_implementation({"text_config": implementation})
            output = model(**inputs, output_attentions=implementation == "eager")
            called.append(output.attentions is not None)
            assert torch.allclose(output.logits, expected[1], atol=1e-4)
    assert called == [False, True, False]
    assert model.config.text_config._attn_implementation == "sdpa"


class Masked(Oracle):
    """The dense model with given tokens masked, those that did not enter a layer."""

    def __init__(self, model, entered):
        super().__init__(model, KEEP)
        self.entered = entered

    def prefill(self, input_ids, attention_mask):
        columns = input_ids.shape[1]
        self.gone = []
        for kept in self.entered:
            there = torch.zeros(len(input_ids), columns + 1, dtype=torch.bool).scatter(1, kept % (columns + 1), True)
            self.gone.append(~there[:, :columns])
        self.lowest = torch.finfo(self.model.dtype).min
        return self.step(attention_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_masked_dense_model_as_rounding_lets_it(family, dtype):
    model = tiny_model(family).to(dtype)
    inputs = batch_of(prompts(model, SEVERAL[:4]))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    answer = torch.randint(10, 97, (4, 5), generator=torch.Generator().manual_seed(0))
    with prune(model, recipe_of(model)):
        pruned = replay(model, inputs, answer)
    assert pruned.dtype == dtype
    with torch.inference_mode():
        entered = kept_positions(model, recipe_of(model), inputs)
    reference = tiny_model(family, attention="eager").to(dtype)
    expected = replay(reference, inputs, answer, oracle=Masked(reference, entered))
    exact = tiny_model(family, attention="eager")
    full = {n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}
    truth = replay(exact, full, answer, oracle=Masked(exact, entered))
    rounding = (expected.float() - truth).abs().max()
    assert (pruned.float() - truth).abs().max() < 2 * rounding


def test_layers_on_disk_and_on_other_devices(family, tmp_path):
    """accelerate brings each layer's weights in for its turn; the state of pruning follows the hidden states."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:4]))
    expected = call_and_generate(model, inputs)
    stats = measure(model, [batch_of(prompts(model, ONE[:2]))])
    model.save_pretrained(tmp_path / "model")
    places = {"": "cpu", "lm_head": "disk", **{f"model.language_model.layers.{n}": "disk" for n in (1, 3, 4)}}
    modules = ["model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens"]
    modules += ["model.language_model.norm", "model.language_model.rotary_emb", "model.image_newline"]
    modules += [f"model.language_model.layers.{n}" for n in (0, 2)]
    places = {**dict.fromkeys(modules, "cpu"), **places}
    del places[""]
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    ).eval()
    assert offloaded.model.language_model.layers[3].mlp.up_proj.weight.device.type == "meta"
    offloaded.generation_config.pad_token_id = 0
    assert_alike(call_and_generate(offloaded, inputs), expected)
    again = measure(offloaded, [batch_of(prompts(model, ONE[:2]))])
    assert torch.allclose(again.self_attention, stats.self_attention, atol=1e-6)


def test_first_weights_on_disk(tmp_path):
    """Then accelerate, and not the model's first weight, says where inputs go."""
    model = tiny_model()
    inputs = batch_of(prompts(model, ONE[:2]))
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
    ).eval()
    assert offloaded.device.type == "meta"
    offloaded.generation_config.pad_token_id = 0
    stats, expected = (measure(m, [inputs]) for m in (offloaded, model))
    assert torch.equal(stats.self_attention, expected.self_attention)
    assert torch.equal(stats.cross_attention, expected.cross_attention)
    assert stats.provenance["weights"] == expected.provenance["weights"]  # so parts of other weights are not taken
    with torch.no_grad(), prune(offloaded, recipe_of(offloaded)), prune(model, recipe_of(model)):
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_two_gpus_is_measured_and_pruned(family, tmp_path):
    model = tiny_model(family)
    inputs, calibration = batch_of(prompts(model, SEVERAL[:4])), [batch_of(prompts(model, ONE[:2]))]
    stats, expected = measure(model, calibration), call_and_generate(model, inputs)
    model.save_pretrained(tmp_path)
    places = {"model": "cuda:0", "lm_head": "cuda:1", **{f"model.language_model.layers.{n}": "cuda:1" for n in (1, 4)}}
    split = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=places).eval()
    split.generation_config.pad_token_id = 0
    assert {str(p.device) for p in split.parameters()} == {"cuda:0", "cuda:1"}
    again = measure(split, calibration)
    assert again.digests == stats.digests
    assert again.provenance["weights"] == stats.provenance["weights"]
    assert torch.allclose(again.self_attention, stats.self_attention, atol=1e-5)
    assert torch.allclose(again.cross_attention, stats.cross_attention, atol=1e-5)
    kept, logits, answer = call_and_generate(split, {n: v.to("cuda:0") for n, v in inputs.items()})
    assert_alike(([k.cpu() for k in kept], logits.cpu(), answer.cpu()), expected)


@pytest.mark.gpu
def test_layers_split_between_devices(family, tmp_path):
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:4]))
    expected = call_and_generate(model, inputs)
    model.save_pretrained(tmp_path)
    other = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    places = {"model": "cuda:0", "lm_head": "cuda:0", **{f"model.language_model.layers.{n}": other for n in (2, 3)}}
    split = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=places).eval()
    split.generation_config.pad_token_id = 0
    kept, logits, answer = call_and_generate(split, {n: v.to("cuda:0") for n, v in inputs.items()})
    assert_alike(([k.cpu() for k in kept], logits.cpu(), answer.cpu()), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same(mode):
    model = tiny_model()
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    expected = call_and_generate(model, inputs)
    with mode(), prune(model, recipe_of(model)):
        assert torch.equal(model(**inputs).logits, expected[1])
        assert torch.equal(generate(model, inputs, **PLAIN).sequences[:, -NEW:], expected[2])


def test_gradients_are_those_of_the_masked_dense_model(family):
    model, reference = tiny_model(family), tiny_model(family, attention="eager")
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    entered = kept_positions(model, recipe_of(model), inputs)
    oracle = Masked(reference, entered)
    with prune(model, recipe_of(model)):
        model(**inputs).logits[:, -1].square().sum().backward()
    with oracle.prefill(inputs["input_ids"], inputs["attention_mask"]):
        reference(**inputs).logits[:, -1].square().sum().backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()) + 1e-6)


# -- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread_each():
    """Five threads with a pool of workers each would spend their time waiting for two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_several_threads_call_one_pruned_model(family, one_thread_each):
    """Different batches, different lengths, at the same time: each thread gets its own answers."""
    model = tiny_model(family)
    batches = [batch_of(prompts(model, SEVERAL[first : first + 3], seed=first)) for first in range(5)]
    with prune(model, recipe_of(model)):
        expected = [generate(model, inputs, **PLAIN).sequences for inputs in batches]
        found = {}

        def work(number):
            found[number] = [generate(model, batches[number], **PLAIN).sequences for _ in range(4)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(5):
        assert all(torch.equal(answer, expected[number]) for answer in found[number])


def test_two_models_that_share_a_config_are_pruned_at_once():
    one = tiny_model()
    two = type(one)(one.config).eval()
    inputs = batch_of(prompts(one, SEVERAL[:3]))
    alone = [call_and_generate(model, inputs) for model in (one, two)]
    with torch.no_grad(), prune(one, recipe_of(one)), prune(two, recipe_of(two)):
        first, second = one(**inputs).logits, two(**inputs).logits
    assert torch.equal(first, alone[0][1])
    assert torch.equal(second, alone[1][1])


def test_leaving_while_another_thread_is_inside_a_call_is_told():
    model = tiny_model()
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    inside, left, failed = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        left.wait(60)

    def call():
        try:
            model(**inputs)
        except Exception as error:
            failed.append(error)

    handle = model.model.language_model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=call)

    def leave_too_early():
        with prune(model, recipe_of(model)):
            thread.start()
            assert inside.wait(60)

    with pytest.raises(ValueError, match=r"1 other thread\(s\) are inside a call"):
        leave_too_early()
    left.set()
    thread.join()
    handle.remove()
    assert failed  # the other call did not go on with half of the hooks
    with torch.no_grad(), prune(model, recipe_of(model)):
        assert (model(**inputs).logits == 0).any()  # the model is usable again
