"""Take visual tokens out of a running prefill, and keep what follows it right.

Knows when and how rows leave; not which: that is the `choose` function of the caller.

At a layer that removes, the tokens leave after its attention: the layer's KV cache keeps them, its MLP and all later
layers never see them. transformers keeps the residual in a local of the layer's forward, so the MLP runs on the kept
rows only (gathered before, scattered after) and the rows are dropped at the layer's end. Positions stay original.

Shapes: B batch, N tokens of the prompt, n tokens at the present layer, m tokens kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fitprune.adapters import AdaptedModel, visual_mask
from fitprune.attention import ReceivedAttention, received_attention
from fitprune.hooks import tap_attention
from fitprune.selection import images_of

# (layer, image [B, n], lazily computed received attention) -> stays [B, n] bool, or None where nothing leaves.
Choose = Callable[[int, torch.Tensor, Callable[[], ReceivedAttention]], "torch.Tensor | None"]


@dataclasses.dataclass
class _Prefill:
    """The state of one prefill, from the model's call to the last layer.

    Attributes:
        kept: [B, n] original positions of the tokens now present.
        image: [B, n] image number of each token now present, -1 for text.
        valid: [B, n] False where no score is read, at padding and behind the question; None where there is neither.
        entered: for each layer, the original positions in its KV cache, [B, n].
        stays: [B, m] rows that stay, between a layer's attention and its end; None elsewhere.
        sliced: the layer's arguments cut to the present tokens, until more leave.
    """

    kept: torch.Tensor
    image: torch.Tensor
    valid: torch.Tensor | None
    entered: list[torch.Tensor]
    stays: torch.Tensor | None = None
    sliced: dict[str, Any] | None = None


# Kept on the cache itself, so that a copy of it, or another block, continues it rightly.
_MARK = "_fitprune_pruned"


@dataclasses.dataclass(frozen=True)
class _Pruned:
    """What a pruned cache remembers: the prompt's length and, per layer, the positions that it holds."""

    length: int
    entered: list[torch.Tensor]


class Remover:
    """Removes tokens from one model's prefills; made and undone by `removing`.

    Attributes:
        entered: for each layer, the original positions [B, n] that entered it in the last prefill.
    """

    def __init__(self, adapted: AdaptedModel, choose: Choose) -> None:
        self.adapted = adapted
        self.choose = choose
        self._signature = inspect.signature(adapted.model.forward)
        self.entered: list[torch.Tensor] = []
        self._prefill: _Prefill | None = None

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual tokens of a prefill, and refuse what cannot be pruned rightly."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        self._prefill = None
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None:
            raise ValueError(
                "input_ids is None: prune finds visual tokens by their ids; pass input_ids, not inputs_embeds"
            )
        if not given.get("mm_encoder_outputs") and given.get("pixel_values") is None:  # generate encodes images itself
            return  # text alone, or decoding, where even a generated image token is no image: nothing leaves
        visual = visual_mask(self.adapted, ids)
        if not bool(visual.any()):
            raise ValueError(
                f"no visual token (id {self.adapted.image_token_id}) in the prompt, but an image is given; "
                "make the prompt with the processor's chat template, or put the image token into it"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "the cache holds tokens already: an image in a later turn, or in chunks (prefill_chunk_size), cannot "
                "be pruned yet; start with an empty cache"
            )
        if isinstance(given.get("logits_to_keep"), torch.Tensor):
            raise ValueError(
                "logits_to_keep is a tensor: positions move when tokens leave; give a number of last tokens"
            )
        if given.get("labels") is not None:
            raise ValueError(
                "labels are given: removed tokens have no logits, so a loss over them means nothing; drop labels"
            )
        _require_plain(cache)
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions: must be [batch, tokens] for prune")
        image = images_of(visual)
        _require_equal(image)
        batch, length = ids.shape
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        # Tokens behind the first asked logit continue the prompt (a draft, a given answer): they are no question.
        if (continuation := int(given.get("logits_to_keep") or 0) - 1) > 0:
            valid = valid.clone()
            valid[:, -continuation:] = False
        self._prefill = _Prefill(
            kept=torch.arange(length, device=ids.device).expand(batch, -1),
            image=image,
            valid=None if bool(valid.all()) else valid,
            entered=[],
        )

    def before_layer(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Cut a layer's positions and mask to the tokens that reach it."""
        state = self._prefill
        cache = kwargs.get("past_key_values")
        if state is None:
            pruned: _Pruned | None = getattr(cache, _MARK, None)
            if pruned is None or kwargs.get("attention_mask") is None:
                return kwargs
            return {
                **kwargs,
                "attention_mask": _cut_keys(kwargs["attention_mask"], pruned.entered[number], pruned.length),
            }
        if number == 0 and cache is not None:
            _require_plain(cache)
        state.entered.append(state.kept)
        if number == 0 or state.kept is state.entered[0]:
            return kwargs
        if state.sliced is None:
            state.sliced = _slice_arguments(kwargs, state.kept)
        return {**kwargs, **state.sliced}

    def at_attention(self, number: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Choose, from the layer's own queries and keys, the tokens that stay."""
        state = self._prefill
        if state is None:
            return

        def received() -> ReceivedAttention:
            return received_attention(query, key, state.image >= 0, scaling=scaling, valid=state.valid)

        stays = self.choose(number, state.image, received)
        if stays is not None and not bool(stays.all()):
            batch, length = stays.shape
            order = torch.arange(length, device=stays.device).expand(batch, -1)
            state.stays = order[stays].view(batch, -1)

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gather the rows that stay: [B, n, d] -> [B, m, d]."""
        state = self._prefill
        return hidden if state is None or state.stays is None else _take(hidden, state.stays)

    def after_mlp(self, output: torch.Tensor) -> torch.Tensor:
        """Scatter the MLP's rows back, zero where a token leaves: [B, m, d] -> [B, n, d]."""
        state = self._prefill
        if state is None or state.stays is None:
            return output
        batch, _, width = output.shape
        full = output.new_zeros(batch, state.kept.shape[1], width)
        return full.scatter_(1, state.stays[..., None].expand(-1, -1, width), output)

    def after_layer(self, number: int, cache: Any, output: Any) -> Any:
        """Drop the rows that left."""
        state = self._prefill
        if state is None:
            return output
        if state.stays is not None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = _take(hidden, state.stays)
            output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            state.kept = state.kept.gather(1, state.stays)
            state.image = state.image.gather(1, state.stays)
            state.valid = None if state.valid is None else state.valid.gather(1, state.stays)
            state.stays = state.sliced = None
        if number == len(self.adapted.layers) - 1:
            self.entered = state.entered
            if cache is not None:
                setattr(cache, _MARK, _Pruned(state.entered[0].shape[1], state.entered))
            self._prefill = None
        return output


@contextlib.contextmanager
def removing(adapted: AdaptedModel, choose: Choose) -> Iterator[Remover]:
    """Let `choose` remove visual tokens from every prefill of the model, until the block ends.

    Raises:
        ValueError: the model is pruned or measured already; on a call that cannot be pruned rightly, from that call.
    """
    remover = Remover(adapted, choose)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tap_attention(adapted, remover.at_attention))
        stack.callback(adapted.model.register_forward_pre_hook(remover.before_model, with_kwargs=True).remove)
        for number, layer in enumerate(adapted.layers):
            handles = (
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, number=number: (args, remover.before_layer(number, kwargs)),
                    with_kwargs=True,
                ),
                layer.mlp.register_forward_pre_hook(lambda _, args: (remover.before_mlp(args[0]), *args[1:])),
                layer.mlp.register_forward_hook(lambda _, __, output: remover.after_mlp(output)),
                layer.register_forward_hook(
                    lambda _, __, kwargs, output, number=number: remover.after_layer(
                        number, kwargs.get("past_key_values"), output
                    ),
                    with_kwargs=True,
                ),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield remover


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows: [B, n, d] by [B, m] -> [B, m, d]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _slice_arguments(kwargs: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
    """Cut position embeddings, position ids and mask of the whole prompt to the kept positions [B, n]."""
    batch, length = kept.shape
    cut: dict[str, Any] = {}
    if (embeddings := kwargs.get("position_embeddings")) is not None:
        cut["position_embeddings"] = tuple(_take(e.expand(batch, -1, -1), kept) for e in embeddings)
    if (ids := kwargs.get("position_ids")) is not None:
        cut["position_ids"] = ids.expand(batch, -1).gather(1, kept)
    if (mask := kwargs.get("attention_mask")) is not None:
        if not isinstance(mask, torch.Tensor):
            raise ValueError(
                f"attention mask is a {type(mask).__name__}: cannot be cut; load the model with 'sdpa' or 'eager'"
            )
        if mask.ndim == 4:
            rows = kept[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(batch, -1, -1, -1).gather(2, rows)
            mask = mask.gather(3, kept[:, None, None].expand(-1, mask.shape[1], length, -1))
        else:
            mask = mask.gather(1, kept)
        cut["attention_mask"] = mask
    return cut


def _cut_keys(mask: torch.Tensor, entered: torch.Tensor, prompt: int) -> torch.Tensor:
    """Cut the keys of a later step's mask, [B, 1, Q, K] or [B, K], to those in a pruned layer's cache."""
    head, tail = mask[..., :prompt], mask[..., prompt:]
    # Beam search reorders a cache only among the beams of a sample, which lost the same tokens: `entered` still holds.
    index = entered if mask.ndim == 2 else entered[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return torch.cat([head.expand(entered.shape[0], *head.shape[1:]).gather(-1, index), tail], -1)


def _require_plain(cache: Any) -> None:
    """Refuse a cache that cannot hold layers of different length."""
    if cache is None:
        return
    from transformers.cache_utils import DynamicCache, DynamicLayer

    kinds = {type(layer) for layer in cache.layers} if cache.layers else {cache.layer_class_to_replicate}
    if type(cache) is not DynamicCache or kinds != {DynamicLayer} or cache.offloading:
        names = sorted(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of {', '.join(names)}, offloading={cache.offloading}: "
            "layers of a pruned cache differ in length, which only DynamicCache holds; drop cache_implementation"
        )


def _require_equal(image: torch.Tensor) -> None:
    """Refuse a batch whose samples differ in images or visual tokens: rows would leave a ragged batch."""
    number = int(image.max()) + 1
    counts = torch.stack([(image == i).sum(1) for i in range(number)], 1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(
            f"samples of the batch have {counts.tolist()} visual tokens per image: must be equal in one batch; "
            "group samples by their token count, or pass one at a time"
        )
