"""Keys that vLLM's cache holds of a prompt's beginning: scores need those of tokens that are not in the step.

Legend: G key heads, N tokens of a block, D head size, K tokens that are read.
"""

from __future__ import annotations

from typing import Any

import torch

DIGITS = 256  # all of a number's digits to this base are exact in bf16


def are_readable(vllm_config: Any) -> bool:
    """Say whether an engine's cache keeps keys as they are; not where it quantizes them.

    Args:
        vllm_config: the engine's VllmConfig: scheduler and workers go by it, each in its own process.
    """
    kept = vllm_config.cache_config.cache_dtype
    return kept in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch."))


class CachedKeys:
    """Reads keys of a group of attention layers.

    Backends lay the keys of a block out as their kernels like it: in rows, transposed, or packed for a CPU's matrix
    unit. So where each number goes is found by having the backend write known ones.

    Args:
        attention: any of the group, a vLLM attention that has its cache.

    Raises:
        ValueError: the cache holds other numbers than the keys themselves.
    """

    def __init__(self, attention: Any) -> None:
        cache = attention.kv_cache
        if cache.dtype != attention.dtype:
            raise ValueError(
                f"fitprune: the cache is of {cache.dtype} and not of {attention.dtype}; name it by --kv-cache-dtype"
            )
        shape = attention.num_kv_heads, cache.shape[2], attention.head_size
        count = shape[0] * shape[1] * shape[2]
        written = _write(attention, torch.ones(shape)) != 0
        numbers, digit = torch.zeros(int(written.sum()), dtype=torch.long), 1
        while digit < count:
            digits = torch.arange(count) // digit % DIGITS
            numbers += digit * _write(attention, digits.view(shape))[written].long()
            digit *= DIGITS
        if not torch.equal(numbers.sort().values, torch.arange(count)):
            raise ValueError(f"fitprune: {type(attention.impl).__name__} does not keep keys as they are in its cache")
        places = torch.empty(count, dtype=torch.int32)
        places[numbers] = written.nonzero()[:, 0].int()
        self._places = places.view(shape).to(cache.device)  # [G, N, D], in a block as a vector

    def of(self, attention: Any, blocks: torch.Tensor, count: int) -> torch.Tensor:
        """Read a request's first keys.

        Args:
            attention: a layer of the group.
            blocks: [n] the request's first blocks, in its order.
            count: K, how many keys.

        Returns:
            [1, G, K, D].
        """
        needed = blocks[: -(-count // self._places.shape[1])].long()
        keys: torch.Tensor = attention.kv_cache[needed].flatten(1)[:, self._places]
        return keys.transpose(0, 1).flatten(1, 2)[None, :, :count]


def _write(attention: Any, keys: torch.Tensor) -> torch.Tensor:
    """Have the backend write keys [G, N, D] into an empty block, and values of zero: the block as a vector."""
    cache = attention.kv_cache
    block, keys = torch.zeros_like(cache[:1]), keys.transpose(0, 1).contiguous().to(cache)
    slots = torch.arange(len(keys), device=cache.device)
    attention.impl.do_kv_cache_update(attention, keys, torch.zeros_like(keys), block, slots)
    return torch.flatten(block).cpu()
