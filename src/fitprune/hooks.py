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

# Sees one attention call: layer number, query [B, H, Q, D], key and value [B, G, K, D], scaling.
Tap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]

NAME = "fitprune"  # in transformers' attention registry; only tapped attention modules name it


@dataclasses.dataclass(frozen=True)
class _Tapped:
    """What a tapped attention module calls, and whose implementation it goes on with."""

    tap: Tap
    number: int
    decoder_config: Any


_TAPPED: weakref.WeakKeyDictionary[nn.Module, _Tapped] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def tap_attention(adapted: AdaptedModel, tap: Tap) -> Iterator[None]:
    """Call `tap` at every attention of the decoder, before its output is computed; undone on exit.

    Each attention module gets a copy of its config that names our function. The model's own config, and with it masks
    and all else that asks for the attention implementation, stays the user's.

    Raises:
        ValueError: the decoder is tapped already, or its attention does not go through transformers' registry.
    """
    attentions = [layer.self_attn for layer in adapted.layers]
    if any(attention.config._attn_implementation == NAME for attention in attentions):
        raise ValueError("the model is in use by fitprune; leave that block first")
    _register(adapted.decoder.config._attn_implementation)
    given = [attention.config for attention in attentions]
    try:
        for number, attention in enumerate(attentions):
            _TAPPED[attention] = _Tapped(tap, number, adapted.decoder.config)
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = NAME
        yield
    finally:
        for attention, config in zip(attentions, given, strict=True):
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
        scaling = kwargs.get("scaling")
        tapped.tap(tapped.number, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        implementation = tapped.decoder_config._attn_implementation  # asked for now: it may change inside the block
        if implementation == "eager":  # not in the registry: each modeling file has its own
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
        seen = _Untapped(module, tapped.decoder_config) if "flash" in implementation else module
        return attend(seen, query, key, value, *args, **kwargs)

    # Disabled under torch.compile: what it sees and stores must be real tensors. (torch leaves `disable` untyped.)
    AttentionInterface.register(NAME, torch.compiler.disable(forward))  # type: ignore[no-untyped-call]


class _Untapped:
    """An attention module with the model's own config, for FlashAttention: it imports its kernel by the name there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
