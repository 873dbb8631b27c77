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
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from fitprune.families.adapter import AdaptedModel


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed by mypy here: its classes are Any
    """One layer of a pruned cache.

    Attributes:
        columns: [B, R] int64, ascending from left to right; -1 where a shorter row is padded, on the left. None where
            every token of the sequence is held.
        covered: number of columns of the unpruned sequence that the R first keys stand for.
        padded: whether any row of `columns` is padded.
        first: whether it is the cache's first layer with keys, whose length stands for that of the sequence.
        window: how many columns back its layer looks, its own counted; None for all. Older keys are let go of.
        gone: the last column whose key was let go of; -1 for none.
        rope_offset: [B or 1, columns] int64, in the first layer with keys, how far multimodal rotary positions after
            each column are from the columns; after the last one it stays. None for models without such.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    columns: torch.Tensor | None = None
    covered: int = 0
    padded: bool = False
    first: bool = False
    window: int | None = None
    gone: int = -1
    rope_offset: torch.Tensor | None = None
    _expected: tuple[torch.Tensor, int, bool] | None = None

    def all_columns(self, length: int, batch: int, device: torch.device) -> torch.Tensor:
        """Columns of all keys of a sequence that has `length` columns so far: [B, K]."""
        first = 0 if self.columns is None else self.covered
        tail = torch.arange(first, length, device=device).expand(batch, -1)
        return tail if self.columns is None else torch.cat([self.columns, tail], 1)

    def expect(self, columns: torch.Tensor, covered: int, padded: bool) -> None:
        """Let the next `update` in: its mask is made for these columns, which hold from then on."""
        self._expected = (columns, covered, padded)

    @property
    def shows_all(self) -> bool:
        """Whether a later token may see every key held, so that decoding one needs no mask."""
        return not self.padded and self.window is None

    def expect_step(self) -> None:
        """Let the next `update` in, of a token that sees all keys held."""
        if self.columns is not None:
            self._expected = (self.columns, self.covered, self.padded)

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
                "the KV cache was pruned: its layers hold different tokens, which only a model inside "
                "`with prune(model, recipe):` takes into account; continue it in such a block"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.window is not None:
            self._let_go(self.window)
        return keys, values

    def _let_go(self, window: int) -> None:
        """Drop keys that no later token sees: at once where none is missing, as the dense model's cache does.

        Where tokens are missing, looking for them costs a wait for the device: then only once there are many.
        """
        assert self.keys is not None
        assert self.values is not None
        held = self.keys.shape[-2]
        length = self._sequence_length(held)
        whole = self.columns is None or self.columns.shape[1] == self.covered - self.gone - 1
        if held < (window if whole else 2 * window):
            return
        columns = self.all_columns(length, len(self.keys), self.keys.device)
        self.gone = length - window
        out = held - window + 1 if whole else int((columns <= self.gone).all(0).sum())  # ascending, padding first
        self.keys, self.values = self.keys[:, :, out:], self.values[:, :, out:]
        self.columns, self.covered = columns[:, out:], length
        self.padded = not whole and bool((self.columns < 0).any())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give length and offset of the dense model's mask: `prune` cuts it to the keys held."""
        return self._sequence_length(super().get_seq_length()) + query_length, 0

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

        Raises:
            ValueError: keys that the layer would look back on again were let go of.
        """
        now = 0 if self.keys is None else self._sequence_length(self.keys.shape[-2])
        length = min(now, tokens_to_remove) if tokens_to_remove > 0 else max(0, now + tokens_to_remove)
        if self.rope_offset is not None:
            self.rope_offset = self.rope_offset[:, : max(length, 1)]
        if self.columns is None or self.keys is None or self.values is None:
            super().crop(tokens_to_remove)
            return
        if self.window is not None and self.gone > length - self.window:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a layer that looks back {self.window} tokens let go of those "
                f"up to {self.gone}, and at {length} tokens needs some; start again from the prompt"
            )
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
        self.columns, self.covered, self.padded, self.gone, self.rope_offset = None, 0, False, -1, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row b become what row `beam_idx[b]` was."""
        super().reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))
        if self.rope_offset is not None and len(self.rope_offset) > 1:
            self.rope_offset = self.rope_offset.index_select(0, beam_idx.to(self.rope_offset.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)
        if self.rope_offset is not None and len(self.rope_offset) > 1:
            self.rope_offset = self.rope_offset.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        if self.columns is not None:
            self.columns = self.columns[indices.to(self.columns.device), ...]
        if self.rope_offset is not None and len(self.rope_offset) > 1:
            self.rope_offset = self.rope_offset[indices.to(self.rope_offset.device)]


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


def first_layer(cache: Any, adapted: AdaptedModel) -> Any:
    """Give a cache's first layer with keys, whose length stands for that of the sequence; None if it has none yet."""
    number = adapted.fingerprint.decoder.attention_layers[0]
    return next(iter(getattr(cache, "layers", ())[number : number + 1]), None)


def adopt(cache: Any, adapted: AdaptedModel) -> None:
    """Make every layer of a cache with keys a PrunedLayer, with what it holds."""
    require_plain(cache, adapted)
    held = [*cache.layers, *(DynamicLayer() for _ in range(len(adapted.layers) - len(cache.layers)))]
    first = adapted.fingerprint.decoder.attention_layers[0]
    for number, layer in enumerate(held):
        if not isinstance(layer, DynamicLayer) or isinstance(layer, PrunedLayer):
            continue
        held[number] = pruned = PrunedLayer()
        pruned.__dict__.update(layer.__dict__)
        pruned.first, pruned.window = number == first, adapted.windows[number]
        if getattr(layer, "record_past", False):  # drafts will be taken back, so nothing may be let go of
            pruned.window = None
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            length, keys = layer.cumulative_length, layer.keys
            pruned.columns = torch.arange(length - keys.shape[-2], length, device=keys.device).expand(len(keys), -1)
            pruned.covered = length
    cache.layers[:] = held


def require_whole(cache: Any) -> None:
    """Refuse a cache whose layers differ in length but do not know their columns."""
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is DynamicLayer]
    lengths = {layer.get_seq_length() for layer in layers} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"layers of the KV cache hold {sorted(lengths)} tokens and do not know which: a pruned cache was taken "
            "apart (DynamicCache(list(cache)) does that); keep the cache that the model returned, or a deepcopy"
        )


def require_plain(cache: Any, adapted: AdaptedModel) -> None:
    """Refuse a cache that cannot hold layers of different length.

    Raises:
        ValueError: it is no DynamicCache, offloads, or has quantized or other special layers, or windows that are not
            the model's.
    """
    plain = type(cache) is DynamicCache and not cache.offloading
    if plain and not cache.layers and adapted.fingerprint.decoder.linear_layers:
        raise ValueError(
            "the KV cache is a DynamicCache that knows no layers, and some of this model's have no keys: make it "
            "with DynamicCache(config=model.config)"
        )
    if plain and cache.layers:
        plain = all(_is_plain(layer, adapted, number) for number, layer in enumerate(cache.layers))
    elif plain:
        plain = cache.layer_class_to_replicate is DynamicLayer
    if not plain:
        kinds = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
        names = sorted(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(
            f"the KV cache is a {type(cache).__name__} of {', '.join(names)}, offloading={cache.offloading}: "
            "layers of a pruned cache differ in length, which only DynamicCache holds; drop cache_implementation"
        )


def _is_plain(layer: Any, adapted: AdaptedModel, number: int) -> bool:
    if adapted.attentions[number] is None:
        return type(layer) is LinearAttentionLayer
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.sliding_window == adapted.windows[number])
    return type(layer) in (DynamicLayer, PrunedLayer)
