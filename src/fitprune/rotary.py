"""Multimodal rotary positions: each KV cache goes on with the offset of its own prompt.

An image takes fewer positions than it has tokens, so text after it counts on with an offset (`rope_deltas`, [B, 1]).
transformers keeps that of the last prompt on the model, where another conversation overwrites it. Here it is kept with
the cache's layers, and moves with their rows.

Shapes: B batch, P columns of the past, Q columns of this call, A axes of the positions (time, height, width).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fitprune.adapters import AdaptedModel
from fitprune.cache import first_layer
from fitprune.host import CACHE_NAMES, cache_of
from fitprune.images import given_images


class RotaryOffsets:
    """Positions of one model's calls; for models without multimodal rotary positions it does nothing.

    Attributes:
        tracked: whether the model has such positions.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._base = adapted.model.base_model
        self._lock = threading.Lock()  # while a call's offset stands on the model
        self.tracked = hasattr(self._base, "rope_deltas") and hasattr(self._base, "compute_3d_position_ids")
        if self.tracked:
            self._names = list(inspect.signature(self._base.compute_3d_position_ids).parameters)

    def positions(
        self, given: Mapping[str, Any], cache: Any, valid: torch.Tensor | None, past: int, length: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Find the positions of a call whose caller gives none, and the offset after it.

        Args:
            given: the arguments of the call.
            cache: its KV cache, if it has one.
            valid: [B, P + Q] bool, False at padding; None where there is none.
            past: P.
            length: Q.

        Returns:
            Positions [A, B, Q], None where the call has its own or the model finds them; the offset [B, 1] that the
            sequence goes on with, None where it stays what it was.
        """
        if not self.tracked:
            return None, None
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        own = self.offset_of(cache)
        if (ids := given.get("position_ids")) is not None:
            return None, _offset_after(ids, valid, past, length) if given_images(given) is not None else None
        call = {name: given[name] for name in self._names if given.get(name) is not None}
        call |= {name: cache for name in CACHE_NAMES if name in self._names}
        call["inputs_embeds"] = tokens.new_empty(*tokens.shape[:2], 0)  # it reads its sizes and device
        with self._lock:
            if past and own is not None:
                self._base.rope_deltas = own
            found = self._base.compute_3d_position_ids(**{**dict.fromkeys(self._names), **call})
            if found is None:
                return None, torch.zeros(1, 1, dtype=torch.long, device=tokens.device) if not past else None
            return found[..., -length:], self._base.rope_deltas

    def offset_of(self, cache: Any) -> torch.Tensor | None:
        """Read the offset [B, 1] that a cache goes on with; None where it is not known."""
        layer = first_layer(cache, self._adapted)
        return getattr(layer, "rope_offset", None)

    def keep(self, cache: Any, offset: torch.Tensor | None) -> None:
        """Let a cache go on with this offset."""
        layer = first_layer(cache, self._adapted)
        if self.tracked and offset is not None and layer is not None:
            layer.rope_offset = offset

    @contextlib.contextmanager
    def in_generate(self) -> Iterator[None]:
        """Let `generate`, which finds its positions before it calls the model, find them by the cache's own offset."""
        if not self.tracked:
            yield
            return
        model, original = self._adapted.model, self._adapted.model._prepare_position_ids_for_generation

        def prepare(inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
            own = self.offset_of(cache_of(model, model_kwargs))
            with self._lock:
                if own is not None:
                    self._base.rope_deltas = own
                return original(inputs_tensor, model_kwargs)

        model._prepare_position_ids_for_generation = prepare
        try:
            yield
        finally:
            del model._prepare_position_ids_for_generation


def _offset_after(ids: torch.Tensor, valid: torch.Tensor | None, past: int, length: int) -> torch.Tensor:
    """Count how far positions, [A, B, Q] (perhaps after those of text) or [B, Q], are from the columns: [B, 1]."""
    last = (ids[-3:].amax(0) if ids.ndim == 3 else ids)[:, -length:]
    if valid is None:
        return last.amax(1, keepdim=True) + 1 - (past + length)
    valid = valid.to(ids.device)
    return last.masked_fill(~valid[:, past:], 0).amax(1, keepdim=True) + 1 - valid.sum(1, keepdim=True)
