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

from fitprune.adapters import AdaptedModel
from fitprune.attention import Attention, Softmax

# Sees one attention call: its layer's number, and what gives its queries, keys and values; to be asked only where they
# matter, since a decoding step has a call in every layer.
Tap = Callable[[int, Callable[[], Attention]], None]

NAME = "fitprune"  # in transformers' attention registry; only tapped attention modules name it


@dataclasses.dataclass(frozen=True)
class _Tapped:
    """What a tapped attention module calls, and whose implementation it goes on with."""

    tap: Tap
    number: int
    decoder_config: Any
    bidirectional: bool
    window: int | None


_TAPPED: weakref.WeakKeyDictionary[nn.Module, _Tapped] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def tap_attention(adapted: AdaptedModel, tap: Tap) -> Iterator[None]:
    """Call `tap` at every attention of the decoder, before its output is computed; undone on exit.

    Each attention module gets a copy of its config that names our function. The model's own config, and with it masks
    and all else that asks for the attention implementation, stays the user's.

    Raises:
        ValueError: the decoder is tapped already, or its attention does not go through transformers' registry.
    """
    attentions = [(n, attention) for n, attention in enumerate(adapted.attentions) if attention is not None]
    if any(attention.config._attn_implementation == NAME for _, attention in attentions):
        raise ValueError("the model is in use by fitprune; leave that block first")
    _register(adapted.decoder.config._attn_implementation)
    given = [attention.config for _, attention in attentions]
    try:
        for number, attention in attentions:
            _TAPPED[attention] = _Tapped(
                tap, number, adapted.decoder.config, adapted.shape.decoder.bidirectional, adapted.windows[number]
            )
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = NAME
        yield
    finally:
        for (_, attention), config in zip(attentions, given, strict=True):
            attention.config = config
            _TAPPED.pop(attention, None)


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
        tapped = _TAPPED.get(module)
        if tapped is None:
            raise ValueError(
                "this model was copied while it was in use by fitprune, so its attention is not its own; "
                "copy it outside of prune"
            )
        tapped.tap(tapped.number, lambda: Attention(query, key, value, _softmax(query, tapped, args, kwargs)))
        implementation = tapped.decoder_config._attn_implementation  # asked for now: it may change inside the block
        if implementation == "eager":  # not in the registry: each modeling file has its own
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
        seen = _Untapped(module, tapped.decoder_config) if "flash" in implementation else module
        return attend(seen, query, key, value, *args, **kwargs)

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


class _Untapped:
    """An attention module with the model's own config, for FlashAttention: it imports its kernel by the name there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
