"""Facts about transformers and torch that results rely on. Where one does not hold, nothing is pruned or measured."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fitprune._support import host


def fact(module: str, name: str, *parameters: str) -> Callable[[], bool]:
    """Make a function that returns whether `module` has `name`, and it takes these parameters."""

    def holds() -> bool:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return not parameters or set(parameters) <= set(inspect.signature(value).parameters)

    return holds


def attributes(make: Callable[[], Any], *names: str) -> Callable[[], bool]:
    """Make a function that returns whether what `make` returns has these attributes."""
    return lambda: all(hasattr(make(), name) for name in names)


# What is relied on -> whether it holds.
FACTS: dict[str, Callable[[], bool]] = {
    "a registry of attention functions": fact("transformers", "AttentionInterface.register"),
    "a table of attention functions": fact("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    "a table of mask functions": fact("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    "a mask function's arguments": fact(
        "transformers.masking_utils", "sdpa_mask", "batch_size", "q_length", "kv_length", "q_offset", "kv_offset",
        "attention_mask", "allow_is_causal_skip",
    ),
    "DynamicCache(config, offloading)": fact("transformers", "DynamicCache.__init__", "config", "offloading"),
    "DynamicCache's get_seq_length": fact("transformers", "DynamicCache.get_seq_length"),
    "a layer's update": fact("transformers.cache_utils", "DynamicLayer.update", "key_states", "value_states"),
    "a layer's length": fact("transformers.cache_utils", "DynamicLayer.get_seq_length"),
    "a layer's mask sizes": fact("transformers.cache_utils", "DynamicLayer.get_mask_sizes", "query_length"),
    "a layer's crop": fact("transformers.cache_utils", "DynamicLayer.crop", "tokens_to_remove"),
    "a layer's reset": fact("transformers.cache_utils", "DynamicLayer.reset"),
    "a layer's reorder_cache": fact("transformers.cache_utils", "DynamicLayer.reorder_cache", "beam_idx"),
    "a layer's repeated rows": fact("transformers.cache_utils", "DynamicLayer.batch_repeat_interleave", "repeats"),
    "a layer's selected rows": fact("transformers.cache_utils", "DynamicLayer.batch_select_indices", "indices"),
    "generate's positions": fact(
        "transformers", "GenerationMixin._prepare_position_ids_for_generation", "inputs_tensor", "model_kwargs"
    ),
    "a cache's kind": attributes(lambda: host.DynamicCache(), "layers", "offloading", "layer_class_to_replicate"),
    "a layer's state": attributes(lambda: host.DynamicLayer(), "keys", "values", "is_initialized"),
    "a cache of windows": attributes(
        lambda: host.DynamicSlidingWindowLayer(sliding_window=2), "sliding_window", "cumulative_length", "record_past"
    ),
    "a cache of layers without keys": fact("transformers.cache_utils", "LinearAttentionLayer"),
    "a module's compiled call": attributes(torch.nn.Identity, "_compiled_call_impl"),
    "torch's attention": fact("torch", "ops.aten.scaled_dot_product_attention.default.decompose"),
    "torch's attention on CPUs": fact("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu.default"),
}  # fmt: skip


@functools.cache
def _broken() -> tuple[str, ...]:
    return tuple(name for name, holds in FACTS.items() if not holds())


def require_known(model: Any, layers: Any) -> None:
    """Refuse to work with a transformers whose insides are not those that results rely on.

    Args:
        model: the whole model.
        layers: its decoder layers.

    Raises:
        ValueError: a fact of FACTS does not hold, or an argument of the model or of a layer has no name that is known.
    """
    problems = list(_broken())
    for module, needed in ((model, ("attention_mask", "position_ids")), (layers[0], ("attention_mask",))):
        known = inspect.signature(type(module).forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        for names in (host.CACHE_NAMES, *((name,) for name in needed)):
            if not open_ended and not set(names) & set(known):
                problems.append(f"{type(module).__name__}'s argument {' or '.join(names)}")
    if problems:
        raise ValueError(f"{problems[0]} is not as fitprune knows it, so pruning could be wrong: {host.remedy()}")
