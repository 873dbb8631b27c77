"""What fitprune relies on inside transformers and torch: names that differ between versions, and facts that must hold.

transformers 5.24 renames the argument `past_key_values` to `cache`, in models and layers alike; the old name is taken
until 5.40. The rename after that must end in an error here, never in wrong tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on; before


@functools.cache
def _cache_names(forward: Any) -> tuple[str, ...]:
    """The names under which calls of a module's `forward` may hold the cache, the first that is given counts."""
    known = inspect.signature(forward).parameters
    if CACHE_NAMES[0] in known or CACHE_NAMES[1] not in known:
        return CACHE_NAMES
    return CACHE_NAMES[1:]  # before 5.24 an argument `cache` is not read


def cache_of(module: Any, arguments: Mapping[str, Any]) -> Any:
    """Take the KV cache from the keyword arguments of a call of `module`; None if it has none.

    Raises:
        ValueError: a cache comes under a name that fitprune does not know.
    """
    from transformers import Cache

    names = _cache_names(type(module).forward)
    if (stray := CACHE_NAMES[0]) not in names and arguments.get(stray) is not None:
        raise ValueError(f"{stray}= is not read before transformers 5.24: pass the KV cache as {names[0]}=")
    if unknown := [n for n, value in arguments.items() if isinstance(value, Cache) and n not in CACHE_NAMES]:
        raise ValueError(
            f"{type(module).__name__} is given its KV cache as {unknown[0]!r}: this version of fitprune knows "
            f"{' and '.join(CACHE_NAMES)}; {_remedy()}"
        )
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def without_cache(module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Give the keyword arguments of a call of `module` with no KV cache in them."""
    return {name: None if name in _cache_names(type(module).forward) else value for name, value in arguments.items()}


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Give the keyword argument by which a call of `model` takes a KV cache."""
    return {_cache_names(type(model).forward)[0]: cache}


def cache_in(output: Any) -> Any:
    """Take the KV cache from what a model or `generate` returned; None if it has none."""
    held = output if isinstance(output, Mapping) else {}
    return next((held[name] for name in CACHE_NAMES if held.get(name) is not None), None)


def _fact(module: str, name: str, *parameters: str) -> Callable[[], bool]:
    """Whether `module` has `name`, and it takes these parameters."""

    def holds() -> bool:
        value: Any = __import__(module, fromlist=[""])
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return not parameters or set(parameters) <= set(inspect.signature(value).parameters)

    return holds


_LAYER = "DynamicLayer"
# What is relied on -> whether it holds.
FACTS: dict[str, Callable[[], bool]] = {
    "a registry of attention functions": _fact("transformers", "AttentionInterface.register"),
    "a table of attention functions": _fact("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    "a table of mask functions": _fact("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    "a mask function's arguments": _fact(
        "transformers.masking_utils", "sdpa_mask", "batch_size", "q_length", "kv_length", "q_offset", "kv_offset",
        "attention_mask", "allow_is_causal_skip",
    ),
    "DynamicCache(config, offloading)": _fact("transformers", "DynamicCache.__init__", "config", "offloading"),
    "DynamicCache's get_seq_length": _fact("transformers", "DynamicCache.get_seq_length"),
    "a layer's update": _fact("transformers.cache_utils", f"{_LAYER}.update", "key_states", "value_states"),
    "a layer's length": _fact("transformers.cache_utils", f"{_LAYER}.get_seq_length"),
    "a layer's mask sizes": _fact("transformers.cache_utils", f"{_LAYER}.get_mask_sizes", "query_length"),
    "a layer's crop": _fact("transformers.cache_utils", f"{_LAYER}.crop", "tokens_to_remove"),
    "a layer's reset": _fact("transformers.cache_utils", f"{_LAYER}.reset"),
    "a layer's reorder_cache": _fact("transformers.cache_utils", f"{_LAYER}.reorder_cache", "beam_idx"),
    "a layer's repeated rows": _fact("transformers.cache_utils", f"{_LAYER}.batch_repeat_interleave", "repeats"),
    "a layer's selected rows": _fact("transformers.cache_utils", f"{_LAYER}.batch_select_indices", "indices"),
    "generate's positions": _fact(
        "transformers", "GenerationMixin._prepare_position_ids_for_generation", "inputs_tensor", "model_kwargs"
    ),
    "a cache of windows": _fact("transformers.cache_utils", "DynamicSlidingWindowLayer"),
    "a cache of layers without keys": _fact("transformers.cache_utils", "LinearAttentionLayer"),
}  # fmt: skip


@functools.cache
def _broken() -> tuple[str, ...]:
    return tuple(name for name, holds in FACTS.items() if not holds())


def require_known(model: Any, layers: Any) -> None:
    """Refuse to work on a transformers whose insides are not those that results rely on.

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
        for names in (CACHE_NAMES, *((name,) for name in needed)):
            if not open_ended and not set(names) & set(known):
                problems.append(f"{type(module).__name__}'s argument {' or '.join(names)}")
    if problems:
        raise ValueError(f"{problems[0]} is not as fitprune knows it, so pruning could be wrong: {_remedy()}")


def _remedy() -> str:
    import transformers

    return (
        f"transformers is {transformers.__version__}; install one that this fitprune supports: transformers>=5.19,<5.25"
    )


# Of reading and loading models: what transformers, accelerate and torchao call things, in families and versions.

ENCODED = "mm_encoder_outputs"  # the argument by which `generate` passes images that it has encoded, in place of pixels


def first_attribute(whole: Any, *names: str) -> Any:
    """Give the first of these attributes that is there and not None; None if there is none."""
    return next((part for name in names if (part := getattr(whole, name, None)) is not None), None)


def token_id(config: Any, modality: str) -> int | None:
    """Read the id that marks a modality's visual tokens; configs have two names for it."""
    token = first_attribute(config, f"{modality}_token_id", f"{modality}_token_index")
    return token if isinstance(token, int) else None


def layer_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Read each layer's window off the cache that transformers makes for a decoder: configs say it in many ways."""
    from transformers import DynamicCache

    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return tuple(windows) if len(windows) == layers else (None,) * layers


def crops_of_size(size: Any, pinpoints: Any, side: int) -> int:
    """Count the crops that LLaVA-NeXT cuts an image of `size` (height, width) into."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, pinpoints, side))


def packs_features(base: Any) -> bool:
    """Whether a model joins the features of an image's crops, and adds newline tokens, as LLaVA-NeXT does."""
    return hasattr(base, "pack_image_features")


def packed(base: Any, crops: Any, sizes: Any, newline: Any) -> list[Any]:
    """Join the features of each image's crops as the model does, with `newline` at the end of each row."""
    return list(base.pack_image_features(crops, sizes, "default", image_newline=newline)[0])


def execution_device(model: Any) -> Any:
    """Give the device on which a model runs; accelerate knows it where the first weights are offloaded."""
    device = model.device
    if device.type == "meta":
        return getattr(getattr(model, "_hf_hook", None), "execution_device", device)
    return device


def offloaded_weight(model: Any, name: str) -> Any:
    """Give a weight that accelerate keeps elsewhere until its layer's turn; None if it keeps none of this name."""
    module, _, own = name.rpartition(".")
    weights = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
    return None if weights is None else weights.get(own)


def inner_tensors(weight: Any) -> list[Any]:
    """Give the tensors that torchao keeps a quantized weight in; empty for any other weight."""
    return [getattr(weight, name) for name in getattr(type(weight), "tensor_data_names", ())]


def set_commit(model: Any, commit: str | None) -> None:
    """Let a model's config name the commit that it was loaded from, which transformers does not keep."""
    model.config._commit_hash = commit


def has_file(folder: str, name: str, *, revision: str | None, token: Any) -> bool:
    """Whether a folder or a repository of the hub has a file."""
    from transformers.utils import cached_file

    path = cached_file(folder, name, revision=revision, token=token, _raise_exceptions_for_missing_entries=False)
    return path is not None
