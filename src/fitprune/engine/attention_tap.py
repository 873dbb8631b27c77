"""Show each decoder layer's queries, keys (after rotary embedding) and values to a function, until the block ends.

The model's own attention implementation goes on computing the output. Nothing is registered on import.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fitprune._support import facts, host
from fitprune.engine.masks import mask_of_rows
from fitprune.families.adapter import AdaptedModel
from fitprune.scoring.received import Attention
from fitprune.scoring.softmax import Softmax

# Called before each attention with its layer's number and a function that returns its queries, keys and values. Returns
# a callback or None; the callback runs after the attention, with the log-sum-exp if the kernel returned it.
Tap = Callable[[int, Callable[[], Attention]], "Callable[[Attention], None] | None"]

COPIED = (
    "this model was copied while it was in use by fitprune, so its attention is not its own; copy it outside of prune"
)
NAME = "fitprune"  # in transformers' attention registry; only tapped attention modules name it


# transformers calls one function for all models, which finds the tap by the module that calls it. Weak on both sides: a
# tap holds its model, which would never be collected.
_TAPPED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionTap]] = weakref.WeakKeyDictionary()
_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders inside a block of ours, their tap on or off


class AttentionTap:
    """Shows a decoder's attention calls to a function, while it is on.

    Each attention module gets a copy of its config that names our function. The model's own config, and with it masks
    and all else that depends on the attention implementation, stays the user's.

    Args:
        adapted: the model.
        tap: what is called.

    Attributes:
        adapted: the model.
        tap: the function.
        numbers: of the layers, by their attention modules.
    """

    def __init__(self, adapted: AdaptedModel, tap: Tap) -> None:
        self.adapted = adapted
        self.tap = tap
        self.numbers = {attention: n for n, attention in enumerate(adapted.attentions) if attention is not None}
        self._own_configs: dict[nn.Module, Any] = {}  # of each module, while the tap is on

    def on(self) -> None:
        """Put it on, if it is off."""
        if self._own_configs:
            return
        copies: dict[int, Any] = {}  # layers mostly share one config
        for attention in self.numbers:
            _TAPPED[attention] = weakref.ref(self)  # first: another thread may be about to call the module
            self._own_configs[attention] = config = attention.config
            if id(config) not in copies:
                copies[id(config)] = host.with_attention(config, NAME)
            attention.config = copies[id(config)]

    def off(self) -> None:
        """Take it off, if it is on."""
        for attention, config in self._own_configs.items():
            attention.config = config
            _TAPPED.pop(attention, None)
        self._own_configs.clear()


@contextlib.contextmanager
def tap_attention(adapted: AdaptedModel, tap: Tap) -> Iterator[AttentionTap]:
    """Call `tap` at every attention of the decoder; undone on exit.

    Args:
        adapted: the model.
        tap: what is called.

    Yields:
        The tap, which is on.

    Raises:
        ValueError: the decoder is tapped already, its attention does not go through transformers' registry, or the
            insides of transformers are not those that are relied on.
    """
    facts.require_known(adapted.model, adapted.layers)
    if adapted.decoder in _IN_USE:
        raise ValueError(
            "the model is in use by fitprune, which prunes or measures it: leave that block or detach() its pruner"
        )
    _register(host.attention_implementation(adapted.decoder.config))
    attention_tap = AttentionTap(adapted, tap)
    _IN_USE.add(adapted.decoder)
    try:
        attention_tap.on()
        yield attention_tap
    finally:
        attention_tap.off()
        _IN_USE.discard(adapted.decoder)


def _register(implementation: str) -> None:
    """Register our attention function, once; refuse an implementation that it could not call."""
    if implementation != "eager" and not host.has_attention(implementation):
        raise ValueError(
            f"attn_implementation={implementation!r}: not in transformers' attention registry, so queries and keys "
            "cannot be seen; load the model with 'sdpa' or 'eager'"
        )
    if not host.has_attention(NAME):
        host.register_attention(NAME, _attend)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Show an attention call to the module's tap, and run the model's own implementation."""
    tapped = _TAPPED.get(module, lambda: None)()
    if tapped is None:
        raise ValueError(COPIED)
    number, config = tapped.numbers[module], tapped.adapted.decoder.config
    mask = args[0] if args else kwargs.get("attention_mask")

    def attention(lse: torch.Tensor | None = None) -> Attention:
        return Attention(query, key, value, _softmax(query, tapped.adapted, number, mask, kwargs), lse)

    callback = tapped.tap(number, attention)
    implementation = host.attention_implementation(config)  # now: it may change inside the block
    attend = host.attention_function(implementation, module)
    caller = _Untapped(module, config) if "flash" in implementation else module
    if callback is None:
        return attend(caller, query, key, value, *args, **kwargs)
    # Another implementation may call torch's kernel too, but for other rows, as with packed sequences.
    with _LogSumExp() if implementation == "sdpa" else contextlib.nullcontext() as watch:
        output = attend(caller, query, key, value, *args, **kwargs)
    lse = None if watch is None else watch.lse
    callback(attention(lse if lse is not None and lse.shape == query.shape[:3] else None))
    return output


def _softmax(query: torch.Tensor, adapted: AdaptedModel, number: int, mask: Any, kwargs: dict[str, Any]) -> Softmax:
    """Read how a layer makes its weights from what it passes to its attention function."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("the decoder's attention adds a position_bias, which scores do not know: not supported")
    scaling = kwargs.get("scaling")
    if adapted.fingerprint.decoder.bidirectional and mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"layer {number} attends to later tokens of an image, which its mask ({type(mask).__name__}) does "
            "not show to scores: load the model with 'sdpa' or 'eager'"
        )
    return Softmax(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        # FlashAttention takes padding [batch, keys], flex_attention a mask of blocks: neither is one of rows and keys.
        mask=mask_of_rows(mask),
        window=adapted.windows[number],
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


class _LogSumExp(TorchFunctionMode):
    """Watches an attention for the log-sum-exp that torch's kernel for CPUs returns, [B, H, Q] fp32.

    On CUDA the fused kernel of scores makes its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with host.WatchedKernel() as kernel:  # no longer than needed: it slows each operation
            output = func(*args, **(kwargs or {}))
        self.lse = kernel.lse
        return output


class _Untapped:
    """An attention module with the model's own config, for FlashAttention: it imports its kernel by the name there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
