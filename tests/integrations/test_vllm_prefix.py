"""vLLM's prefix cache under pruning: requests with images share the text before their first image."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm.v1.attention.backend import AttentionType

from fitprune.integrations.vllm.cached_keys import CachedKeys

HEADS = 2


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
    with pytest.raises(ValueError, match=r"kv_cache_dtype='auto': must keep keys in torch\.float32"):
        CachedKeys(attention)
    attention = attention_of(SimpleNamespace(do_kv_cache_update=lambda *call: None), torch.zeros(9, HEADS, 16, 64))
    with pytest.raises(ValueError, match="does not keep the keys as they are"):
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
