"""Multimodal rotary positions: each KV cache goes on with the offset of its own prompt.

An image takes fewer positions than it has tokens, so text after it counts on with an offset (`rope_deltas`, [B, 1]).
transformers keeps that of the last prompt on the model, where another conversation overwrites it. Here it is kept with
the cache's layers, after each column of the prompt, so that it moves with their rows and is cropped with their columns.

Shapes: B batch, P columns of the past, Q columns of this call, A axes of the positions (time, height, width).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fitprune._support.host import CACHE_NAMES, cache_of
from fitprune.engine.cache import first_layer
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import given_images


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
        """Find the positions of a call whose caller gives none, and the offsets of its columns.

        Args:
            given: the arguments of the call.
            cache: its KV cache, if it has one.
            valid: [B, P + Q] bool, False at padding; None where there is none.
            past: P.
            length: Q.

        Returns:
            Positions [A, B, Q], None where the call has its own or the model finds them; the offset after each column
            [B, P + Q], None where the last one stays.

        Raises:
            ValueError: images come with `inputs_embeds` alone, from which their positions cannot be found.
        """
        if not self.tracked:
            return None, None
        own, images = self.offset_of(cache), given_images(given) is not None
        if (ids := given.get("position_ids")) is not None:
            return None, self._offsets(ids, cache, valid, past, length) if images else None
        if (tokens := given.get("input_ids")) is None:
            if images:
                raise ValueError(
                    "inputs_embeds are given without input_ids: the rotary positions of this model's images are found "
                    "by ids; pass input_ids, or position_ids [3, batch, tokens]"
                )
            tokens = given["inputs_embeds"]
        alone = images and own is not None  # positions of this turn, moved to after the past
        call: dict[str, Any] = {name: given.get(name) for name in self._names}
        call |= {name: None if alone else cache for name in CACHE_NAMES if name in self._names}
        if alone and call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"][:, past:]
        call["inputs_embeds"] = tokens.new_empty(*tokens.shape[:2], 0)  # it reads its sizes and device
        with self._lock:
            before = self._base.rope_deltas
            if past and own is not None and not images:
                self._base.rope_deltas = own
            found = self._base.compute_3d_position_ids(**call)
            if past:
                self._base.rope_deltas = before  # as a step of the dense model leaves it
        if found is None:
            return None, None
        found = found[..., -length:]
        if not images:
            return found, None
        if past and alone and own is not None:
            count = past if valid is None else valid[:, :past].sum(1, keepdim=True).to(found.device)
            found = found + own.to(found.device) + count
        return found, self._offsets(found, cache, valid, past, length)

    def _offsets(
        self, ids: torch.Tensor, cache: Any, valid: torch.Tensor | None, past: int, length: int
    ) -> torch.Tensor:
        """Count how far positions after each column are from the columns: [B, P + Q].

        Args:
            ids: positions [A, B, Q], perhaps after one axis of text, or [B, Q].
            cache, valid, past, length: as for `positions`.
        """
        last = (ids[-3:].amax(0) if ids.ndim == 3 else ids)[:, -length:]
        if valid is None:
            count = torch.arange(past + 1, past + length + 1, device=ids.device)[None]
        else:
            valid = valid.to(ids.device)
            count, last = valid.cumsum(1)[:, past:], last.masked_fill(~valid[:, past:], 0)
        new = last.cummax(1).values + 1 - count
        if not past:
            return new
        layer = first_layer(cache, self._adapted)
        old = getattr(layer, "rope_offset", None)
        old = new.new_zeros(1, 1) if old is None else old.to(new.device)
        old = old.expand(len(new), -1)[:, :past]
        return torch.cat([old, old[:, -1:].expand(-1, past - old.shape[1]), new], 1)

    def offset_of(self, cache: Any) -> torch.Tensor | None:
        """Read the offset [B, 1] that a cache goes on with; None where it is not known."""
        offsets = getattr(first_layer(cache, self._adapted), "rope_offset", None)
        return None if offsets is None else offsets[:, -1:]

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
            cache, types = cache_of(model, model_kwargs), model_kwargs.get("mm_token_type_ids")
            own, past = self.offset_of(cache), 0 if cache is None else cache.get_seq_length()
            if own is None or not past:
                with self._lock:
                    return original(inputs_tensor, model_kwargs)
            batch = len(model_kwargs.get("input_ids", inputs_tensor))
            own = own[:: max(len(own) // batch, 1)]  # rows that were repeated ahead of generate, as for beams
            with self._lock:
                before = self._base.rope_deltas
                # With new images all is computed from the ids, as if nothing were known.
                self._base.rope_deltas = None if types is not None and bool(types[:, past:].any()) else own
                found = original(inputs_tensor, model_kwargs)
                if self._base.rope_deltas is own:
                    self._base.rope_deltas = before
                return found

        model._prepare_position_ids_for_generation = prepare
        try:
            yield
        finally:
            del model._prepare_position_ids_for_generation
