"""The KV cache of a pruned decoder layer: it knows which tokens of the sequence its keys belong to.

Layers of a pruned model hold fewer keys than the sequence has tokens, and in a batch each row has lost others. So each
layer keeps the column of the unpruned sequence that each key belongs to. What reorders, repeats, selects or crops the
cache (beam search, several return sequences, assisted decoding) moves these columns along.

Shapes: B batch, K keys in the layer, R of them with a recorded column. The K - R last keys came after the last pruning
and belong to the columns from `covered` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fitprune._support.host import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from fitprune.engine.rows import pack
from fitprune.families.adapter import AdaptedModel


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed by mypy here: its classes are Any
    """One layer of a pruned cache.

    Attributes:
        columns: [B, R] int64, ascending from left to right; -1 where a shorter row is padded, on the left. None where
            every token of the sequence is present.
        covered: number of columns of the unpruned sequence that the R first keys are what is left of.
        padded: whether any row of `columns` is padded.
        first: whether it is the cache's first layer with keys, which reports the length of the sequence.
        window: how many columns back its layer looks, its own counted; None for all. Older keys are dropped.
        gone: the last column whose key was dropped because of the window; -1 for none.
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
        """The columns of all keys, [B, K], in a sequence that has `length` columns so far."""
        first = 0 if self.columns is None else self.covered
        tail = torch.arange(first, length, device=device).expand(batch, -1)
        return tail if self.columns is None else torch.cat([self.columns, tail], 1)

    def expect(self, columns: torch.Tensor, covered: int, padded: bool) -> None:
        """Allow the next `update`: its mask is made for these values, which are the layer's from then on."""
        self._expected = (columns, covered, padded)

    @property
    def shows_all(self) -> bool:
        """Whether a later token sees every key in the layer, so that decoding one needs no mask."""
        return not self.padded and self.window is None

    def expect_step(self) -> None:
        """Allow the next `update`, of a token that sees every key in the layer."""
        if self.columns is not None:
            self._expected = (self.columns, self.covered, self.padded)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, [B, G, Q, D] each.

        Args:
            key_states: of the new tokens.
            value_states: of the new tokens.
            *args: of the layer that this extends.
            **kwargs: of the layer that this extends.

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
            self._drop_unseen(self.window)
        return keys, values

    def _drop_unseen(self, window: int) -> None:
        """Drop keys that no later token sees: at once where no token is missing, as the dense model's cache does.

        Where tokens are missing, finding these keys means waiting for the device: then only when there are many.
        """
        assert self.keys is not None
        assert self.values is not None
        keys = self.keys.shape[-2]
        length = self._sequence_length(keys)
        whole = self.columns is None or self.columns.shape[1] == self.covered - self.gone - 1
        if keys < (window if whole else 2 * window):
            return
        columns = self.all_columns(length, len(self.keys), self.keys.device)
        self.gone = length - window
        out = keys - window + 1 if whole else int((columns <= self.gone).all(0).sum())  # ascending, padding first
        self.keys, self.values = self.keys[:, :, out:], self.values[:, :, out:]
        self.columns, self.covered = columns[:, out:], length
        self.padded = not whole and bool((self.columns < 0).any())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the dense model's mask: `prune` cuts it to the keys in the layer."""
        return self._sequence_length(super().get_seq_length()) + query_length, 0

    def get_seq_length(self) -> int:
        """Count the keys; in the first layer the columns of the sequence, by which the model counts positions."""
        keys: int = super().get_seq_length()
        return self._sequence_length(keys) if self.first else keys

    def _sequence_length(self, keys: int) -> int:
        return keys if self.columns is None else self.covered + keys - self.columns.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns of the sequence.

        Args:
            tokens_to_remove: if negative, how many columns to remove; if positive, how many to keep.

        Raises:
            ValueError: keys that the layer would see again were dropped because of its window.
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
                f"tokens_to_remove={tokens_to_remove}: a layer that looks back {self.window} tokens has dropped those "
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
        """Discard all keys and columns."""
        super().reset()
        self.columns, self.covered, self.padded, self.gone, self.rope_offset = None, 0, False, -1, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row b become what row `beam_idx[b]` was."""
        super().reorder_cache(beam_idx)
        self._move_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._move_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self._move_rows(lambda part: part[indices.to(part.device)])

    def _move_rows(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.columns is not None:
            self.columns = move(self.columns)
        if self.rope_offset is not None and len(self.rope_offset) > 1:
            self.rope_offset = move(self.rope_offset)


def is_pruned(cache: Any) -> bool:
    """Whether a cache has been in a prefill inside `prune`."""
    return any(isinstance(layer, PrunedLayer) for layer in getattr(cache, "layers", ()))


def first_layer(cache: Any, adapted: AdaptedModel) -> Any:
    """A cache's first layer with keys, which reports the length of the sequence; None if it has none yet."""
    number = adapted.fingerprint.decoder.attention_layers[0]
    return next(iter(getattr(cache, "layers", ())[number : number + 1]), None)


def adopt(cache: Any, adapted: AdaptedModel) -> None:
    """Replace every layer of a cache that has keys by a PrunedLayer with the same content."""
    require_plain(cache, adapted)
    layers = [*cache.layers, *(DynamicLayer() for _ in range(len(adapted.layers) - len(cache.layers)))]
    first = adapted.fingerprint.decoder.attention_layers[0]
    for number, layer in enumerate(layers):
        if not isinstance(layer, DynamicLayer) or isinstance(layer, PrunedLayer):
            continue
        layers[number] = pruned = PrunedLayer()
        pruned.__dict__.update(layer.__dict__)
        pruned.first, pruned.window = number == first, adapted.windows[number]
        if getattr(layer, "record_past", False):  # drafts will be removed again, so nothing may be dropped
            pruned.window = None
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            length, keys = layer.cumulative_length, layer.keys
            pruned.columns = torch.arange(length - keys.shape[-2], length, device=keys.device).expand(len(keys), -1)
            pruned.covered = length
    cache.layers[:] = layers


def require_whole(cache: Any) -> None:
    """Refuse a cache whose layers differ in length and have no record of their columns."""
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is DynamicLayer]
    lengths = {layer.get_seq_length() for layer in layers} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"layers of the KV cache hold {sorted(lengths)} tokens and do not know which: a pruned cache was taken "
            "apart (DynamicCache(list(cache)) does that); keep the cache that the model returned, or a deepcopy"
        )


def require_plain(cache: Any, adapted: AdaptedModel) -> None:
    """Refuse a cache that cannot hold layers of different length.

    Args:
        cache: of a call.
        adapted: the model.

    Raises:
        ValueError: it is not a DynamicCache, offloads, or has quantized or other special layers, or windows that are
            not the model's.
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
