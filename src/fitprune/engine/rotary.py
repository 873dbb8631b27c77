"""Multimodal rotary positions: each KV cache continues with the offset of its own prompt.

An image takes fewer positions than it has tokens, so text after it counts on with an offset (`rope_deltas`, [B, 1]).
transformers keeps that of the last prompt on the model, where another conversation overwrites it. Here it is kept in
the cache, after each column of the prompt, so that it moves with the cache's rows and is cropped with its columns.

Shapes: B batch, P columns of the past, Q columns of this call, A axes of the positions (time, height, width).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fitprune._support import host
from fitprune.engine.arguments import Call
from fitprune.engine.cache import first_layer
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import given_images


class RotaryOffsets:
    """Positions of one model's calls; for models without multimodal rotary positions it does nothing.

    Args:
        adapted: the model.

    Attributes:
        tracked: whether the model has such positions.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._base = adapted.model.base_model
        self._lock = threading.Lock()  # while the model has a call's offset
        self.tracked = hasattr(self._base, "rope_deltas") and hasattr(self._base, "compute_3d_position_ids")

    def positions(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Find the positions of a call that passes none, and the offsets of its columns.

        Args:
            call: the call.

        Returns:
            Positions [A, B, Q], None where the call has its own or the model finds them; the offset after each column
            [B, P + Q], None where the last one stays.

        Raises:
            ValueError: images come with `inputs_embeds` alone, from which their positions cannot be found.
        """
        if not self.tracked:
            return None, None
        values, past = call.arguments, call.past
        offset, images = self.offset_of(call.cache), given_images(values) is not None
        if (ids := values.get("position_ids")) is not None:
            return None, self._offsets(ids, call) if images else None
        if (tokens := values.get("input_ids")) is None:
            if images:
                raise ValueError(
                    "inputs_embeds are given without input_ids: the rotary positions of this model's images are found "
                    "by ids; pass input_ids, or position_ids [3, batch, tokens]"
                )
            tokens = values["inputs_embeds"]
        alone = images and offset is not None  # positions of this turn, moved to after the past
        names = host.parameters(type(self._base).compute_3d_position_ids)[1:]
        arguments: dict[str, Any] = {name: values.get(name) for name in names}
        arguments |= {name: None if alone else call.cache for name in host.CACHE_NAMES if name in names}
        if alone and arguments.get("attention_mask") is not None:
            arguments["attention_mask"] = arguments["attention_mask"][:, past:]
        arguments["inputs_embeds"] = tokens.new_empty(*tokens.shape[:2], 0)  # it reads its sizes and device
        with self._lock:
            before = self._base.rope_deltas
            if past and offset is not None and not images:
                self._base.rope_deltas = offset
            positions = self._base.compute_3d_position_ids(**arguments)
            if past:
                self._base.rope_deltas = before  # as a step of the dense model leaves it
        if positions is None:
            return None, None
        positions = positions[..., -call.length :]
        if not images:
            return positions, None
        if past and alone and offset is not None:
            count = past if call.valid is None else call.valid[:, :past].sum(1, keepdim=True).to(positions.device)
            positions = positions + offset.to(positions.device) + count
        return positions, self._offsets(positions, call)

    def _offsets(self, ids: torch.Tensor, call: Call) -> torch.Tensor:
        """Count how far positions after each column are from the columns: [B, P + Q].

        Args:
            ids: positions [A, B, Q], perhaps after one axis of text, or [B, Q].
            call: their call.
        """
        valid, past, length = call.valid, call.past, call.length
        last = (ids[-3:].amax(0) if ids.ndim == 3 else ids)[:, -length:]
        if valid is None:
            count = torch.arange(past + 1, past + length + 1, device=ids.device)[None]
        else:
            valid = valid.to(ids.device)
            count, last = valid.cumsum(1)[:, past:], last.masked_fill(~valid[:, past:], 0)
        new = last.cummax(1).values + 1 - count
        if not past:
            return new
        layer = first_layer(call.cache, self._adapted)
        old = getattr(layer, "rope_offset", None)
        old = new.new_zeros(1, 1) if old is None else old.to(new.device)
        old = old.expand(len(new), -1)[:, :past]
        return torch.cat([old, old[:, -1:].expand(-1, past - old.shape[1]), new], 1)

    def offset_of(self, cache: Any) -> torch.Tensor | None:
        """The offset [B, 1] that a cache continues with; None where it is not known."""
        offsets = getattr(first_layer(cache, self._adapted), "rope_offset", None)
        return None if offsets is None else offsets[:, -1:]

    def keep(self, cache: Any, offset: torch.Tensor | None) -> None:
        """Let a cache continue with this offset; None changes nothing."""
        layer = first_layer(cache, self._adapted)
        if self.tracked and offset is not None and layer is not None:
            layer.rope_offset = offset

    @contextlib.contextmanager
    def in_generate(self) -> Iterator[None]:
        """Let `generate`, which finds positions before it calls the model, find them by the cache's own offset."""
        if not self.tracked:
            yield
            return
        model, original = self._adapted.model, self._adapted.model._prepare_position_ids_for_generation

        def prepare(inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
            cache, types = host.cache_of(model, model_kwargs), model_kwargs.get("mm_token_type_ids")
            offset, past = self.offset_of(cache), 0 if cache is None else cache.get_seq_length()
            if offset is None or not past:
                with self._lock:
                    return original(inputs_tensor, model_kwargs)
            batch = len(model_kwargs.get("input_ids", inputs_tensor))
            offset = offset[:: max(len(offset) // batch, 1)]  # rows that generate has repeated, as for beams
            with self._lock:
                before = self._base.rope_deltas
                # With new images all positions are computed from the ids, without an offset.
                self._base.rope_deltas = None if types is not None and bool(types[:, past:].any()) else offset
                positions = original(inputs_tensor, model_kwargs)
                if self._base.rope_deltas is offset:
                    self._base.rope_deltas = before
                return positions

        model._prepare_position_ids_for_generation = prepare
        try:
            yield
        finally:
            del model._prepare_position_ids_for_generation
