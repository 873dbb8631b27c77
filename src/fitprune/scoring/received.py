"""Received attention of visual tokens, from one layer's queries and keys, in blocks.

Never holds a map of all queries x all keys: memory is bounded by BLOCK_BYTES whatever the prompt's length.

Where the layer's attention kernel tells the log-sum-exp of each row, as PyTorch's does, a weight is the exponential of
a product less that; so the maximum over heads is taken of the products, in the model's own dtype, and one exponential
is left for all heads together.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size. The last Q keys are the queries' own
tokens; those before them, if any, are the past that a cache holds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Collection

import torch

from fitprune.costs.flops import SCORE_BLOCK
from fitprune.scoring.softmax import Softmax
from fitprune.scoring.tiles import (
    BLOCK_BYTES,
    SOFTMAX_ROWS,
    TILE_BYTES,
    Strongest,
    Tiles,
    row_blocks,
    strongest_by_lse,
    strongest_by_softmax,
)

HEAD_KINDS = ("mean", "max", "last", "self")


@dataclasses.dataclass(frozen=True)
class ReceivedAttention:
    """Attention that each token receives, maximum over heads; zero at positions that hold no visual token.

    Attributes:
        self_attention: [B, Q] fp32, mean over the visual query rows of the token's own image.
        cross_attention: [B, Q] fp32, mean over the sample's question rows; zero where it has none.
    """

    self_attention: torch.Tensor
    cross_attention: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention call of a layer.

    Attributes:
        query: [B, H, Q, D], after rotary embedding.
        key: [B, G, K, D], after rotary embedding.
        value: [B, G, K, D].
        softmax: how its weights are made.
        lse: [B, H, Q] fp32, log-sum-exp of each row's scaled products over the keys that it sees, where the attention
            itself told it.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax: Softmax
    lse: torch.Tensor | None = None


@torch.no_grad()
def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
    softmax: Softmax,
    lse: torch.Tensor | None = None,
) -> ReceivedAttention:
    """Compute the attention that visual tokens receive in one layer, from rows of this forward.

    Args:
        query: [B, H, Q, D], after rotary embedding.
        key: [B, G, K, D], after rotary embedding; H is a multiple of G, K at least Q.
        image: [B, Q] int64, number of the image that each token belongs to, -1 for text and padding.
        question: [B, Q] bool, the rows whose mean is cross attention; see `text_after`.
        softmax: how the layer makes its weights.
        lse: see `Attention`. With it a weight is as exact as a logarithm of it in the dtype of `query`: to 2^-9 times
            that logarithm in bf16.

    Returns:
        Received self and cross attention, [B, Q] each. With several images, self attention comes from rows of the same
        image, so that it does not depend on how many images follow.

    Raises:
        ValueError: there are fewer keys than queries.

    Source: arXiv:2409.10197, section on attention statistics; the authors take the maximum over heads first, then the
    mean over query rows, and so does this. Differs from the authors' code: several images, a past, padding.
    """
    return Sums(image, question).received(query, key, softmax, lse)


class Sums:
    """What received attention is summed of: which rows, by which weight, at which tokens.

    One serves all layers that the same tokens enter; arguments as for `received_attention`.
    """

    def __init__(self, image: torch.Tensor, question: torch.Tensor) -> None:
        self._image = image
        # One weight per query row and kind: the mean over rows is a weighted sum over all rows. [B, 2, Q]
        self._row_weight = torch.stack([_own_image_weights(image), _mean_weights(question)], 1)
        self._text = (image < 0)[:, None]
        self._several = bool((image > 0).any())  # images of a sample
        self._tiles: dict[tuple[int, int, bool], Tiles] = {}

    @torch.no_grad()
    def received(
        self, query: torch.Tensor, key: torch.Tensor, softmax: Softmax, lse: torch.Tensor | None = None
    ) -> ReceivedAttention:
        """Compute what the tokens receive in one layer; see `received_attention`."""
        batch, heads, length, _ = query.shape
        keys = key.shape[2]
        if keys < length:
            raise ValueError(f"{length} queries against {keys} keys: each query's own key must be among the keys")
        if _fused(query, softmax):
            from fitprune.scoring.triton_kernels import received_on_gpu  # imports Triton

            how = {name: getattr(softmax, name) for name in ("scaling", "valid", "window", "softcap", "sinks")}
            received = received_on_gpu(query, key, self._image, self._row_weight, **how)
        else:
            received = torch.zeros(batch, 2, length, device=query.device)
            known = lse if softmax.plain else None
            if known is None:
                at_once = max(1, BLOCK_BYTES // (heads * SOFTMAX_ROWS * keys * 4))
            else:
                at_once = max(1, TILE_BYTES // (heads * min(keys, SCORE_BLOCK) ** 2 * query.element_size()))
            for first in range(0, batch, at_once):
                samples = slice(first, first + at_once)
                own = softmax.of(samples)
                if known is None:
                    needed = (self._row_weight[samples] > 0).any(1).any(0)
                    strongest = strongest_by_softmax(query[samples], key[samples], needed, own)
                else:
                    tiles = self._tiles_of(samples, own.causal)
                    strongest = strongest_by_lse(query[samples], key[samples], known[samples], tiles, own)
                self._accumulate(received[samples], strongest, samples)
        received.masked_fill_(self._text, 0)
        return ReceivedAttention(received[:, 0], received[:, 1])

    def _tiles_of(self, samples: slice, causal: bool) -> Tiles:
        place = samples.start, samples.stop, causal
        if place not in self._tiles:
            visual, needed = (self._image[samples] >= 0).any(0), (self._row_weight[samples] > 0).any(1).any(0)
            self._tiles[place] = Tiles.of(visual, needed, causal)
        return self._tiles[place]

    def _accumulate(self, received: torch.Tensor, strongest: Strongest, samples: slice) -> None:
        """Add each row block's share to `received` [b, 2, Q]."""
        image, row_weight = self._image[samples], self._row_weight[samples]
        for rows, columns, weights in strongest:
            if not self._several:
                received[:, :, columns] += row_weight[:, :, rows] @ weights
                continue
            received[:, 1:, columns] += row_weight[:, 1:, rows] @ weights
            alike = image[:, rows, None] == image[:, None, columns]
            received[:, :1, columns] += row_weight[:, :1, rows] @ (weights * alike)


@torch.no_grad()
def head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
    softmax: Softmax,
    kinds: Collection[str] = HEAD_KINDS,
) -> dict[str, torch.Tensor]:
    """Compute the attention that visual tokens receive from each head.

    Arguments as for `received_attention`, and:
        kinds: which to compute. "mean" and "max" are over the question's rows, "last" is its last row, "self" the mean
            over the visual rows of the token's own image.

    Returns:
        Kind -> [B, H, Q] fp32, zero at positions that hold no visual token, and for samples without such a row.
    """
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    position = torch.arange(length, device=query.device)
    last = position == torch.where(question, position, -1).amax(1, keepdim=True)
    weight = {"mean": _mean_weights(question), "last": last.float(), "self": _own_image_weights(image)}
    made = {kind: torch.zeros(batch, heads, length, device=query.device) for kind in kinds}
    needed = {kind: question if kind == "max" else weight[kind] > 0 for kind in kinds}
    wanted = torch.stack(list(needed.values())).any(0)  # [B, Q]
    per_sample = max(1, BLOCK_BYTES // (heads * SOFTMAX_ROWS * key.shape[2] * 4))
    for first in range(0, batch, per_sample):
        rows = slice(first, first + per_sample)
        for index, own, weights in row_blocks(query[rows], key[rows], wanted[rows].any(0), softmax.of(rows)):
            seen = weights[..., past:]
            for kind, total in made.items():
                if not bool(needed[kind][rows, index].any()):
                    continue
                into = total[rows, :, :own]
                if kind == "max":
                    into.copy_(torch.maximum(into, (seen * question[rows, None, index, None]).amax(2)))
                    continue
                share = seen * weight[kind][rows, None, index, None]
                if kind == "self":
                    share = share * (image[rows, None, index, None] == image[rows, None, None, :own])
                into += share.sum(2)
    return {kind: total.masked_fill_(image[:, None] < 0, 0) for kind, total in made.items()}


def text_after(visual: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mark the text after each sample's last visual token, whose rows are cross attention: [B, Q] bool.

    With several images the question is what follows the last one, as the authors' code has it for one image. Text
    between images is no question: the images behind it are unknown to its rows (attention is causal), so its view would
    rank early images only, by what was said before the rest was seen. A sample without a visual token has no such text.
    """
    position = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(visual, position, -1).amax(1, keepdim=True)
    after = (position[None] > last) & (last >= 0)
    return after if valid is None else after & valid


def _fused(query: torch.Tensor, softmax: Softmax) -> bool:
    """Whether `kernels` computes this: on a GPU where Triton works. It knows no masks, and no larger heads or types."""
    known = softmax.mask is None and query.shape[-1] <= 256 and query.element_size() <= 4
    if not (query.is_cuda and known and _has_triton()):
        return False
    from fitprune.scoring.triton_kernels import usable

    return usable(query.device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _mean_weights(rows: torch.Tensor) -> torch.Tensor:
    """[B, Q] bool -> [B, Q] fp32 that sums to one over the rows of each sample that has any."""
    return rows.float() / rows.sum(1, keepdim=True).clamp(min=1)


def _own_image_weights(image: torch.Tensor) -> torch.Tensor:
    """[B, Q] image numbers -> [B, Q] fp32 that sums to one over the rows of each image, zero elsewhere."""
    sizes = torch.zeros(image.shape[0], int(image.max()) + 2, device=image.device)
    sizes.scatter_add_(1, image + 1, torch.ones_like(image, dtype=sizes.dtype))
    return (image >= 0) / sizes.gather(1, image + 1)
