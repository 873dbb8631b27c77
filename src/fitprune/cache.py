"""The KV cache of a pruned decoder layer: it knows which tokens of the sequence its keys belong to.

Layers of a pruned model hold fewer keys than the sequence has tokens, and in a batch each row has lost others. So each
layer keeps the column of the unpruned sequence that each key stands for. What reorders, repeats, selects or crops the
cache (beam search, several return sequences, assisted decoding) moves these columns along.

Shapes: B batch, K keys held, R of them with a recorded column. The K - R last keys came after the last pruning and
stand for the columns from `covered` on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed by mypy here: its classes are Any
    """One layer of a pruned cache.

    Attributes:
        columns: [B, R] int64, ascending from left to right; -1 where a shorter row is padded, on the left. None where
            every token of the sequence is held.
        covered: number of columns of the unpruned sequence that the R first keys stand for.
        padded: whether any row of `columns` is padded.
        first: whether it is the cache's first layer, whose length stands for that of the sequence.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    columns: torch.Tensor | None = None
    covered: int = 0
    padded: bool = False
    first: bool = False
    _expected: tuple[torch.Tensor, int, bool] | None = None

    def all_columns(self, length: int, batch: int, device: torch.device) -> torch.Tensor:
        """Columns of all keys of a sequence that has `length` columns so far: [B, K]."""
        first = 0 if self.columns is None else self.covered
        tail = torch.arange(first, length, device=device).expand(batch, -1)
        return tail if self.columns is None else torch.cat([self.columns, tail], 1)

    def expect(self, columns: torch.Tensor, covered: int, padded: bool) -> None:
        """Let the next `update` in: its mask is made for these columns, which hold from then on."""
        self._expected = (columns, covered, padded)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, [B, G, Q, D] each.

        Raises:
            ValueError: the layer is pruned and nobody cut the mask to its keys: the model runs outside of `prune`.
        """
        if self._expected is not None:
            self.columns, self.covered, self.padded = self._expected
            self._expected = None
        elif self.columns is not None:
            raise ValueError(
                "past_key_values was pruned: its layers hold different tokens, which only a model inside "
                "`with prune(model, recipe):` takes into account; continue it in such a block"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        """Count the keys held; in the first layer the columns of the sequence, by which the model counts positions."""
        held: int = super().get_seq_length()
        return self._sequence_length(held) if self.first else held

    def _sequence_length(self, held: int) -> int:
        return held if self.columns is None else self.covered + held - self.columns.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns of the sequence off.

        Args:
            tokens_to_remove: negative, how many columns to take off; positive, how many to keep.
        """
        if self.columns is None or self.keys is None or self.values is None:
            super().crop(tokens_to_remove)
            return
        now = self._sequence_length(self.keys.shape[-2])
        length = min(now, tokens_to_remove) if tokens_to_remove > 0 else max(0, now + tokens_to_remove)
        if length >= self.covered:
            super().crop(length - now)
            return
        index, self.columns = pack(self.columns, (self.columns >= 0) & (self.columns < length))
        self.padded = bool((self.columns < 0).any())
        self.covered = length
        self.keys, self.values = (
            states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1]))
            for states in (self.keys, self.values)
        )

    def reset(self) -> None:
        """Forget all keys and columns."""
        super().reset()
        self.columns, self.covered, self.padded = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row b become what row `beam_idx[b]` was."""
        super().reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        if self.columns is not None:
            self.columns = self.columns[indices.to(self.columns.device), ...]


def pack(columns: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep some rows of each sample, in order and to the right, as wide as the sample that keeps most.

    Args:
        columns: [B, m] int64, the column of each row, -1 at padding.
        stays: [B, m] bool, the rows to keep; none of padding.

    Returns:
        Indices of rows [B, m'], filled up on the left with some that leave, and their columns [B, m'], -1 there.
    """
    most = int(stays.sum(1).max())
    # Stable: what leaves comes first, then what stays, each in order.
    index = stays.byte().argsort(dim=1, stable=True)[:, stays.shape[1] - most :]
    return index, columns.to(index.device).gather(1, index).masked_fill(~stays.gather(1, index), -1)


def is_pruned(cache: Any) -> bool:
    """Whether a cache went through a prefill inside `prune`."""
    return any(isinstance(layer, PrunedLayer) for layer in getattr(cache, "layers", ()))


def adopt(cache: Any, layers: int) -> None:
    """Make every layer of a cache a PrunedLayer, with what it holds."""
    require_plain(cache)
    held = [*cache.layers, *(DynamicLayer() for _ in range(layers - len(cache.layers)))]
    for number, layer in enumerate(held):
        if not isinstance(layer, PrunedLayer):
            held[number] = PrunedLayer()
            held[number].__dict__.update(layer.__dict__)
            held[number].first = number == 0
    cache.layers[:] = held


def require_whole(cache: Any) -> None:
    """Refuse a cache whose layers differ in length but do not know their columns."""
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is DynamicLayer]
    lengths = {layer.get_seq_length() for layer in layers} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"layers of past_key_values hold {sorted(lengths)} tokens and do not know which: a pruned cache was taken "
            "apart (DynamicCache(list(cache)) does that); keep the cache that the model returned, or a deepcopy"
        )


def require_plain(cache: Any) -> None:
    """Refuse a cache that cannot hold layers of different length.

    Raises:
        ValueError: it is no DynamicCache, offloads, or has sliding-window, quantized or other special layers.
    """
    kinds = {type(layer) for layer in cache.layers} if cache.layers else {cache.layer_class_to_replicate}
    if type(cache) is not DynamicCache or not kinds <= {DynamicLayer, PrunedLayer} or cache.offloading:
        names = sorted(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of {', '.join(names)}, offloading={cache.offloading}: "
            "layers of a pruned cache differ in length, which only DynamicCache holds; drop cache_implementation"
        )
