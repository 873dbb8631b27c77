"""Handles on a model that are always given back.

`tap_attention` shows each decoder layer's queries, keys (after rotary embedding) and values to a function, while the
model's own attention implementation goes on computing the output. Nothing is registered on import.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fitprune._support.host import require_known
from fitprune.families.adapter import AdaptedModel
from fitprune.scoring.received import Attention
from fitprune.scoring.softmax import Softmax

# Hears of an attention call before it runs: its layer's number, and what gives its queries, keys and values. Returns
# what is to see the call once it has run, its log-sum-exp with it; None if nothing is.
Tap = Callable[[int, Callable[[], Attention]], "Callable[[Attention], None] | None"]

COPIED = (
    "this model was copied while it was in use by fitprune, so its attention is not its own; copy it outside of prune"
)
NAME = "fitprune"  # in transformers' attention registry; only tapped attention modules name it


@dataclasses.dataclass(frozen=True)
class _Tapped:
    """What a tapped attention module calls, and whose implementation it goes on with."""

    tap: Tap
    number: int
    decoder_config: Any
    bidirectional: bool
    window: int | None


# Weak on both sides: a tap holds its model, which would never be collected.
_TAPPED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionTap]] = weakref.WeakKeyDictionary()
_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders inside a block of ours, their tap on or off


class AttentionTap:
    """Shows a decoder's attention calls to a function, while it is on.

    Each attention module gets a copy of its config that names our function. The model's own config, and with it masks
    and all else that asks for the attention implementation, stays the user's.
    """

    def __init__(self, adapted: AdaptedModel, tap: Tap) -> None:
        config, bidirectional = adapted.decoder.config, adapted.fingerprint.decoder.bidirectional
        self._tapped = {
            attention: _Tapped(tap, number, config, bidirectional, adapted.windows[number])
            for number, attention in enumerate(adapted.attentions)
            if attention is not None
        }
        self._given: dict[nn.Module, Any] = {}  # each module's own config, while the tap is on

    def on(self) -> None:
        """Put it on, if it is off."""
        if self._given:
            return
        named: dict[int, Any] = {}  # layers mostly share one config
        for attention in self._tapped:
            _TAPPED[attention] = weakref.ref(self)  # first: another thread may be about to call the module
            self._given[attention] = given = attention.config
            if id(given) not in named:
                named[id(given)] = copy.copy(given)
                named[id(given)]._attn_implementation = NAME
            attention.config = named[id(given)]

    def at(self, attention: nn.Module) -> _Tapped:
        """What a module calls."""
        return self._tapped[attention]

    def off(self) -> None:
        """Take it off, if it is on."""
        for attention, config in self._given.items():
            attention.config = config
            _TAPPED.pop(attention, None)
        self._given.clear()


@contextlib.contextmanager
def tap_attention(adapted: AdaptedModel, tap: Tap) -> Iterator[AttentionTap]:
    """Call `tap` at every attention of the decoder; undone on exit.

    Yields:
        The tap, which is on.

    Raises:
        ValueError: the decoder is tapped already, its attention does not go through transformers' registry, or the
            insides of transformers are not those that are relied on.
    """
    require_known(adapted.model, adapted.layers)
    if adapted.decoder in _IN_USE:
        raise ValueError(
            "the model is in use by fitprune, which prunes or measures it: leave that block or detach() its pruner"
        )
    _register(adapted.decoder.config._attn_implementation)
    made = AttentionTap(adapted, tap)
    _IN_USE.add(adapted.decoder)
    try:
        made.on()
        yield made
    finally:
        made.off()
        _IN_USE.discard(adapted.decoder)


def _register(implementation: str) -> None:
    """Register, once, a function that shows queries and keys and then calls the model's own implementation."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation != "eager" and implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={implementation!r}: not in transformers' attention registry, so queries and keys "
            "cannot be seen; load the model with 'sdpa' or 'eager'"
        )
    if NAME in ALL_ATTENTION_FUNCTIONS:
        return

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tap = _TAPPED.get(module, lambda: None)()
        if tap is None:
            raise ValueError(COPIED)
        tapped = tap.at(module)

        def given(lse: torch.Tensor | None = None) -> Attention:
            return Attention(query, key, value, _softmax(query, tapped, args, kwargs), lse)

        look = tapped.tap(tapped.number, given)
        implementation = tapped.decoder_config._attn_implementation  # asked for now: it may change inside the block
        if implementation == "eager":  # not in the registry: each modeling file has its own
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
        seen = _Untapped(module, tapped.decoder_config) if "flash" in implementation else module
        if look is None:
            return attend(seen, query, key, value, *args, **kwargs)
        # Another implementation may call PyTorch's kernel too, but for other rows, as with packed sequences.
        with _LogSumExp() if implementation == "sdpa" else contextlib.nullcontext() as watched:
            output = attend(seen, query, key, value, *args, **kwargs)
        told = None if watched is None else watched.found
        look(given(told if told is not None and told.shape == query.shape[:3] else None))
        return output

    # Disabled under torch.compile: what it sees and stores must be real tensors. (torch leaves `disable` untyped.)
    AttentionInterface.register(NAME, torch.compiler.disable(forward))  # type: ignore[no-untyped-call]


def _softmax(query: torch.Tensor, tapped: _Tapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Softmax:
    """Read how a layer makes its weights from what it passes to its attention function."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("the decoder's attention adds a position_bias, which scores do not know: not supported")
    mask, scaling = args[0] if args else kwargs.get("attention_mask"), kwargs.get("scaling")
    if tapped.bidirectional and mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"layer {tapped.number} attends to later tokens of an image, which its mask ({type(mask).__name__}) does "
            "not show to scores: load the model with 'sdpa' or 'eager'"
        )
    return Softmax(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        # FlashAttention takes padding [batch, keys], flex_attention a mask of blocks: neither is one of rows and keys.
        mask=mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None,
        window=tapped.window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


class _LogSumExp(TorchFunctionMode):
    """Watches an attention for the log-sum-exp that PyTorch's kernel for CPUs gives beside the output, [B, H, Q] fp32.

    On CUDA the fused kernel of scores makes its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with _Kernel() as kernel:  # no longer than needed: it slows each operation
            output = func(*args, **(kwargs or {}))
        self.found = kernel.found
        return output


class _Kernel(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Watches which kernel one call of scaled_dot_product_attention becomes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:  # not yet taken apart, in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.found = result[1].detach()
        return result


class _Untapped:
    """An attention module with the model's own config, for FlashAttention: it imports its kernel by the name there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
