"""What fitprune uses inside transformers and torch: the one file that names it. `facts` has what must hold of it.

transformers 5.24 renames the argument `past_key_values` to `cache`, in models and layers alike; the old name is taken
until 5.40. The rename after that must end in an error here, never in wrong tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from transformers.cache_utils import DynamicCache as DynamicCache
from transformers.cache_utils import DynamicLayer as DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer as DynamicSlidingWindowLayer
from transformers.cache_utils import LinearAttentionLayer as LinearAttentionLayer

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on; before


@functools.cache
def parameters(forward: Any) -> tuple[str, ...]:
    """The names of a function's parameters."""
    return tuple(inspect.signature(forward).parameters)


@functools.cache
def _cache_names(forward: Any) -> tuple[str, ...]:
    """The names under which calls of a module's `forward` may pass the cache; the first that is not None counts."""
    known = parameters(forward)
    if CACHE_NAMES[0] in known or CACHE_NAMES[1] not in known:
        return CACHE_NAMES
    return CACHE_NAMES[1:]  # before 5.24 an argument `cache` is not read


def cache_of(module: Any, arguments: Mapping[str, Any]) -> Any:
    """Take the KV cache from the keyword arguments of a call of `module`; None if it has none.

    Args:
        module: the model, or a layer.
        arguments: of the call, by name.

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
            f"{' and '.join(CACHE_NAMES)}; {remedy()}"
        )
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def without_cache(module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Take the KV cache out of the keyword arguments of a call of `module`."""
    return {name: None if name in _cache_names(type(module).forward) else value for name, value in arguments.items()}


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a call of `model` takes a KV cache."""
    return {_cache_names(type(model).forward)[0]: cache}


def cache_in(output: Any) -> Any:
    """Take the KV cache from what a model or `generate` returned; None if it has none."""
    values = output if isinstance(output, Mapping) else {}
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def generate_encodes(model: Any, kinds: Collection[str]) -> bool:
    """Whether `generate` encodes a model's images or videos (`kinds`) once, ahead of all steps."""
    modalities = getattr(model, "input_modalities", ())
    return ENCODED in parameters(type(model).forward) and any(kind in modalities for kind in kinds)


def attention_implementation(config: Any) -> str:
    """The name of the attention implementation, as "sdpa"."""
    name: str = config._attn_implementation
    return name


def with_attention(config: Any, name: str) -> Any:
    """Copy a config, with another attention implementation."""
    changed = copy.copy(config)
    changed._attn_implementation = name
    return changed


def has_attention(name: str) -> bool:
    """Whether transformers' registry has an attention implementation of this name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return name in ALL_ATTENTION_FUNCTIONS


def register_attention(name: str, function: Any) -> None:
    """Add an attention implementation to transformers' registry.

    It is left out of torch.compile: what it sees and keeps must be real tensors.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def attention_function(name: str, module: Any) -> Any:
    """The attention implementation of this name, for calls by `module`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":  # not in the registry: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def causal_mask(present: torch.Tensor, hidden: torch.Tensor, config: Any) -> Any:
    """Make a causal mask in the form that the attention implementation takes.

    Args:
        present: [B, keys] bool, False at padding; the last m keys are the rows' own.
        hidden: [B, m, d], the layer's input.
        config: the decoder's.

    Raises:
        ValueError: transformers has no function that makes masks for the implementation.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = attention_implementation(config)
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={implementation!r} has no entry in transformers' mask registry: a mask for the "
            "kept tokens cannot be made; register one, or load the model with 'sdpa' or 'eager'"
        )
    (batch, keys), rows = present.shape, hidden.shape[1]
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch, q_length=rows, kv_length=keys, q_offset=keys - rows, kv_offset=0, attention_mask=present,
        allow_is_causal_skip=True, dtype=hidden.dtype, config=config, device=hidden.device,
    )  # fmt: skip


class WatchedKernel(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Watches one call of scaled_dot_product_attention for the log-sum-exp, [B, H, Q] fp32, of torch's CPU kernel.

    Attributes:
        lse: None if another kernel ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as the class
        self.lse: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:  # not yet decomposed, in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.lse = result[1].detach()
        return result


def is_compiled(module: Any) -> bool:
    """Whether torch.compile has wrapped a module, or compiled it in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def called_by_compiled_code() -> bool:
    """Whether a wrapper of torch.compile is among the callers."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"].startswith("torch._dynamo"):
            return True
        frame = frame.f_back
    return False


def run_until_stopped(run: Callable[[Callable[[Any], NoReturn]], object]) -> Any:
    """Run a function that gets `stop` until something inside it calls `stop(value)`; return the value.

    An exception, for want of another exact way out of a forward that is not ours: only a layer's own forward knows
    what it does before its attention, and after it the MLP would run for nothing.
    """

    class Stopped(Exception):
        pass

    values = []

    def stop(value: Any) -> NoReturn:
        values.append(value)
        raise Stopped

    with contextlib.suppress(Stopped):
        run(stop)
    return values[0]


def remedy() -> str:
    """Name the version of transformers that is installed, and those that are supported."""
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


def tiles_of_size(size: Any, pinpoints: Any, side: int) -> tuple[int, int]:
    """Give the rows and columns of tiles that LLaVA-NeXT cuts an image of `size` (height, width) into."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
    return int(rows), int(columns)


def packs_features(base: Any) -> bool:
    """Whether a model joins the features of an image's crops, and adds newline tokens, as LLaVA-NeXT does."""
    return hasattr(base, "pack_image_features")


def packed(base: Any, crops: Any, sizes: Any, newline: Any) -> list[Any]:
    """Join the features of each image's crops as the model does, with `newline` at the end of each row."""
    known = parameters(type(base).pack_image_features)
    own = {"vision_feature_select_strategy": "default", "vision_aspect_ratio": None}
    options = {name: getattr(base.config, name, default) for name, default in own.items() if name in known}
    return list(base.pack_image_features(crops, sizes, image_newline=newline, **options)[0])


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
