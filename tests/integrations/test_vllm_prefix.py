"""vLLM's prefix cache under pruning: requests with images share the text before their first image.

And for the same reason, as nothing leaves there, a long text before the image may be split into steps of its own. What
a whole prompt wrote, an equal one takes over once its request has ended.
"""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm.v1.attention.backend import AttentionType

from fitprune import load_samples
from fitprune._support import assets
from fitprune.integrations.vllm.cached_keys import CachedKeys
from fitprune.integrations.vllm.scheduler import WholePrompts
from helpers.served import OPTIONS, by_transformers, chat, differing, first_apart, loaded

HEADS = 2
BLOCK = 32
RULES = " ".join(f"rule {n}: look at the picture and say the number in it." for n in range(20)).split()


def ask(words, number, images=1):
    """A question of the test split with so many words of rules before its image."""
    samples = load_samples(assets.folder("test"))[number : number + max(images, 1)]
    text = chat(samples[0].text, images)
    place = text.index("<image>" if images else samples[0].text)
    return [f"{text[:place]}{' '.join(RULES[:words])} {text[place:]}", [str(each.image) for each in samples[:images]]]


def mixed(count):
    """Two sets of rules and none before one image or two, and without an image."""
    return [ask((0, 40, 60)[n % 3], n, (1, 1, 2, 0)[n % 4]) for n in range(count)]


def blocks_before(prompt):
    """Tokens in the blocks wholly before a prompt's first image; without one, before its last token."""
    text, files = prompt
    before = loaded()[1].tokenizer(text.split("<image>")[0])["input_ids"]
    return (len(before) if files else len(before) - 1) // BLOCK * BLOCK


def blocks_again(prompt):
    """Tokens in the blocks that an equal prompt takes over: 0 where its images would not all be in them."""
    text, files = prompt
    _, processor = loaded()
    ids = processor(text=text, images=[Image.open(file) for file in files])["input_ids"][0]
    end = (len(ids) - 2) // BLOCK * BLOCK
    return 0 if processor.image_token_id in ids[end:] else end


def require_same(found, expected):
    assert differing(found, expected) == []
    assert first_apart(found, expected).max() < 1e-3


def test_images_share_the_text_before_them(digits, engines, runner):
    recipe, count = digits / "60.json", 24 if runner == "v1" else 12
    engine = engines(digits / "model", recipe, runner, block_size=BLOCK, **OPTIONS)
    asked = mixed(count)
    require_same(engine.answer(asked), by_transformers(asked, recipe))
    asked = mixed(2 * count)[count:]
    second = engine.answer(asked)
    require_same(second, by_transformers(asked, recipe))
    assert second.cached == [blocks_before(each) for each in asked]
    assert {96, 160} <= {cached for cached, each in zip(second.cached, asked, strict=True) if each[1]}


def test_an_equal_prompt_takes_over_what_an_ended_one_wrote(digits, engines, runner):
    """Whatever the first answered; of several at a time, one does."""
    recipe, asked = digits / "60.json", [ask(0, 0), ask(60, 1)]
    for n in range(2, 8):
        some = (ask(words, n, (1, 1, 2)[n % 3]) for words in range(0, 40, 2))
        asked.append(next(each for each in some if blocks_again(each)))
    expected = [blocks_again(each) for each in asked]
    engine = engines(digits / "model", recipe, runner, block_size=BLOCK, **OPTIONS)
    engine.answer(asked, max_tokens=24, ignore_eos=True)
    for length in (8, 3):
        for prompt, tokens in zip(asked, expected, strict=True):
            second = engine.answer([prompt], max_tokens=length)
            require_same(second, by_transformers([prompt], recipe, length))
            assert second.cached[0] == tokens or not tokens
    twice = engine.answer(asked + asked)
    require_same(twice, by_transformers(asked + asked, recipe))
    pairs = zip(twice.cached[:8], twice.cached[8:], expected, strict=True)
    assert all(one == tokens > two for one, two, tokens in pairs if tokens)
    for seed in range(2):
        job = {"temperature": 1.0, "seed": seed, "max_tokens": 12, "ignore_eos": True}
        alone = engine.answer(asked, skip_reading_prefix_cache=True, **job)
        assert alone.cached == [0] * 8
        again = engine.answer(asked, **job)
        require_same(again, alone)
        assert all(cached == tokens for cached, tokens in zip(again.cached, expected, strict=True) if tokens)
    require_same(engine.answer(asked), by_transformers(asked, recipe))


def test_long_text_before_an_image_comes_in_steps_of_its_own(digits, engines, runner):
    """Prompts longer than a step are pruned where their part from the image on is not."""
    recipe, asked = digits / "60.json", [ask((0, 100, 110)[n % 3], n) for n in range(12 if runner == "v1" else 6)]
    engine = engines(
        digits / "model", recipe, runner, block_size=BLOCK, max_num_batched_tokens=300, max_num_seqs=4, **OPTIONS
    )
    for _ in range(2):
        found = engine.answer(asked)
        require_same(found, by_transformers(asked, recipe))
    assert max(found.cached) > 192
    assert "longer than a step" not in engine.log


def test_a_preempted_request_reads_the_text_before_its_image(digits, engines, runner):
    """But no block of its own that others may not read. So it is where prompts are asked again."""
    recipe, job = digits / "60.json", {"ignore_eos": True}
    asked, tokens = [ask((0, 40)[n % 2], n) for n in range(16 if runner == "v1" else 8)], 24
    asked += asked[::-3]
    options = {**OPTIONS, "kv_cache_memory_bytes": 8 * 2**20, "block_size": BLOCK}
    engine = engines(digits / "model", recipe, runner, max_model_len=512, **options)
    found = engine.answer(asked, max_tokens=tokens, **job)
    assert found.counters["num_preemptions"] > 0
    assert differing(found, by_transformers(asked, recipe, tokens, **job)) == []


def test_text_alone_is_shared_where_keys_are_quantized(digits, engines, runner):
    asked = mixed(16)
    options = {**OPTIONS, "dtype": "bfloat16", "kv_cache_dtype": "fp8", "block_size": BLOCK}
    engine = engines(digits / "model", digits / "60.json", runner, **options)
    engine.answer(asked[:8])
    second = engine.answer(asked[8:])
    assert not any(cached for cached, each in zip(second.cached, asked[8:], strict=True) if each[1])
    assert engine.answer(asked).cached == [(blocks_again if each[1] else blocks_before)(each) for each in asked]


def test_blocks_from_the_image_on_have_hashes_of_their_own():
    scheduler = SimpleNamespace(_shares=True, hash_block_size=4)
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=10))

    def hashes(scheduler, owner=None):
        request = SimpleNamespace(mm_features=[image], num_tokens=22, block_hashes=[b"0", b"1", b"2", b"3", b"4"])
        request._block_hasher, request.fitprune_prompt = list, (16, None)
        request.update_block_hashes = lambda: request.block_hashes.extend(request._block_hasher(request))
        WholePrompts._hash_alone(scheduler, request, owner)
        request.num_tokens += 3  # of its answer, a block is full
        request.update_block_hashes()
        return request.block_hashes

    both = hashes(scheduler) + hashes(scheduler)
    assert both[:2] == both[6:8] == [b"0", b"1"]
    assert len(set(both)) == 10
    both = hashes(scheduler, b"owner") + hashes(scheduler, b"owner")
    assert both[:4] == both[6:10]
    assert len(set(both)) == 8
    scheduler._shares = False
    assert len(set(hashes(scheduler) + hashes(scheduler))) == 12


class ByRows:
    """How FlashAttention and Triton write: keys in the front half of each row, whatever the strides."""

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        keys, values = cache.transpose(1, 2).split(layer.head_size, dim=-1)
        size = keys.shape[1]
        keys[slots // size, slots % size], values[slots // size, slots % size] = key, value


def cpu_attention(dtype, block, width, isa):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = AttentionType.DECODER, "auto"
    return attention_of(impl, torch.zeros(9, HEADS, block, 2 * width, dtype=dtype), isa=isa)


def attention_of(impl, cache, **more):
    facts = {"kv_cache_dtype": "auto", "num_kv_heads": HEADS, "_k_scale_float": 1.0, "_v_scale_float": 1.0, **more}
    return SimpleNamespace(impl=impl, kv_cache=cache, dtype=cache.dtype, head_size=cache.shape[-1] // 2, **facts)


def check(attention):
    """A prompt's keys come in two steps, beside another's; its first 1, 5, a block's and all are read."""
    size, device = attention.kv_cache.shape[2], attention.kv_cache.device
    blocks = torch.tensor([7, 2, 5], device=device)
    length, first = 2 * size + 3, size + 1
    shape = length, HEADS, attention.head_size
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(attention.kv_cache)
    place = torch.arange(length, device=device)
    slots = blocks[place // size] * size + place % size
    reader = CachedKeys(attention)
    for rows in (slice(first), slice(first, length)):
        attention.impl.do_kv_cache_update(
            attention, keys[rows], torch.randn_like(keys[rows]), attention.kv_cache, slots[rows]
        )
    others = torch.randn_like(keys[:size])
    attention.impl.do_kv_cache_update(
        attention, others, others, attention.kv_cache, 3 * size + torch.arange(size, device=device)
    )
    for count in (1, 5, size, length):
        found = reader.of(attention, blocks, count)
        assert found.shape == (1, HEADS, count, attention.head_size)
        assert torch.equal(found[0], keys[:count].transpose(0, 1))


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_read_back_on_a_cpu(dtype, isa):
    if isa == "amx" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's build for this CPU does not pack keys")  # packing them takes no matrix unit
    for block, width in ((32, 32), (128, 128), (64, 96)):
        check(cpu_attention(dtype, block, width, isa))


@pytest.mark.parametrize("heads_first", [True, False])
def test_keys_are_read_back_as_gpus_lay_them(heads_first):
    cache = torch.zeros(9, HEADS, 16, 64) if heads_first else torch.zeros(9, 16, HEADS, 64).transpose(1, 2)
    check(attention_of(ByRows(), cache))
    layers = torch.zeros(9, 3, HEADS, 16, 64)  # of several layers, block by block
    check(attention_of(ByRows(), layers[:, 1]))


def test_a_cache_of_other_numbers_is_refused():
    attention = attention_of(ByRows(), torch.zeros(9, HEADS, 16, 64))
    attention.kv_cache = attention.kv_cache.to(torch.uint8)
    with pytest.raises(ValueError, match=r"the cache is of torch\.uint8 and not of torch\.float32"):
        CachedKeys(attention)
    attention = attention_of(SimpleNamespace(do_kv_cache_update=lambda *call: None), torch.zeros(9, HEADS, 16, 64))
    with pytest.raises(ValueError, match="does not keep keys as they are"):
        CachedKeys(attention)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_keys_are_read_back_on_a_gpu(backend, heads_first):
    if backend == "flash":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl as Impl
    else:
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl as Impl
    impl = Impl.__new__(Impl)
    impl.attn_type, impl.kv_cache_dtype, impl.head_size = AttentionType.DECODER, "auto", 64
    impl._is_per_token_head_quant = False
    shape = (9, HEADS, 16, 128) if heads_first else (9, 16, HEADS, 128)
    cache = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, device="cuda")
    check(attention_of(impl, cache if heads_first else cache.transpose(1, 2), _k_scale=one, _v_scale=one))
