"""Handles on a model that are always given back.

`tap_attention` shows each decoder layer's queries and keys (after rotary embedding) to a function, while the model's
own attention implementation goes on computing the output. Nothing is registered on import.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fitprune.adapters import AdaptedModel

# Sees one attention call: layer number, query [B, H, Q, D], key [B, G, K, D], scaling.
Tap = Callable[[int, torch.Tensor, torch.Tensor, float], None]

_TAPS: weakref.WeakKeyDictionary[nn.Module, Callable[[torch.Tensor, torch.Tensor, float], None]] = (
    weakref.WeakKeyDictionary()
)
_PREFIX = "fitprune_"


@contextlib.contextmanager
def tap_attention(adapted: AdaptedModel, tap: Tap) -> Iterator[None]:
    """Call `tap` at every attention of the decoder, before its output is computed; undone on exit.

    Raises:
        ValueError: the decoder is tapped already, or its attention does not go through transformers' registry.
    """
    config = adapted.decoder.config
    original: str = config._attn_implementation
    if original.startswith(_PREFIX):
        raise ValueError(
            f"attention implementation is {original!r}: the model is in use by fitprune; leave that block first"
        )
    _register(original)
    attentions = [layer.self_attn for layer in adapted.layers]
    try:
        for number, attention in enumerate(attentions):
            _TAPS[attention] = functools.partial(tap, number)
        adapted.decoder.set_attn_implementation(_PREFIX + original)
        yield
    finally:
        adapted.decoder.set_attn_implementation(original)
        for attention in attentions:
            _TAPS.pop(attention, None)


def _register(original: str) -> None:
    """Register, once per implementation, a function that shows queries and keys and then calls the original."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + original
    if name in ALL_ATTENTION_FUNCTIONS:
        return
    if original != "eager" and original not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={original!r}: not in transformers' attention registry, so queries and keys cannot be "
            "seen; load the model with 'sdpa' or 'eager'"
        )

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if (tap := _TAPS.get(module)) is not None:
            scaling = kwargs.get("scaling")
            tap(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
        if original == "eager":  # not in the registry: each modeling file has its own
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[original]
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
