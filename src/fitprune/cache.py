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


class PrunedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a pruned cache.

    Attributes:
        columns: [B, R] int64, ascending from left to right; -1 where a shorter row is padded, on the left. None where
            every token of the sequence is held.
        covered: number of columns of the unpruned sequence that the R first keys stand for.
        padded: whether any row of `columns` is padded.
    """

    columns: torch.Tensor | None = None
    covered: int = 0
    padded: bool = False
    _expected: tuple[torch.Tensor, int, bool] | None = None

    def all_columns(self, length: int, batch: int, device: torch.device) -> torch.Tensor:
        """Columns of all keys of a sequence that has `length` columns so far: [B, K]."""
        tail = torch.arange(self.covered, length, device=device).expand(batch, -1)
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

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns of the sequence off.

        Args:
            tokens_to_remove: negative, how many columns to take off; positive, how many to keep.

        Raises:
            ValueError: rows of the batch would lose different numbers of keys.
        """
        if self.columns is None or self.keys is None:
            super().crop(tokens_to_remove)
            return
        tail = self.keys.shape[-2] - self.columns.shape[1]
        now = self.covered + tail
        length = min(now, tokens_to_remove) if tokens_to_remove > 0 else max(0, now + tokens_to_remove)
        lost = now - max(length, self.covered)
        if length < self.covered:
            counts = (self.columns >= length).sum(1)
            if not bool((counts == counts[0]).all()):
                raise ValueError(
                    f"cropping a pruned cache to {length} of its {self.covered} prompt columns would take "
                    f"{counts.tolist()} keys from the rows of the batch: must be the same number; crop single samples"
                )
            lost += int(counts[0])
            self.columns = self.columns[:, : self.columns.shape[1] - int(counts[0])]
            self.covered = length
        super().crop(-lost)

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
    cache.layers[:] = held


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
