"""Received attention of visual tokens, from one layer's queries and keys, in blocks.

Never holds a map of all queries x all keys: memory is bounded by BLOCK_BYTES whatever the prompt's length.

Where the layer's attention kernel returns the log-sum-exp of each row, as PyTorch's does, a weight is the exponential
of a product less that. So the maximum over heads is taken of these differences, in the model's own dtype, and one
exponential serves all heads.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size. The last Q keys are the queries' own
tokens; those before them, if any, are the past that a cache holds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Protocol

import torch

from fitprune.costs.flops import SCORE_BLOCK
from fitprune.scoring.softmax import Softmax
from fitprune.scoring.tiles import (
    BLOCK_BYTES,
    SOFTMAX_ROWS,
    TILE_BYTES,
    Strongest,
    Tiles,
    strongest_by_lse,
    strongest_by_softmax,
)


@dataclasses.dataclass(frozen=True)
class ReceivedAttention:
    """Attention that each token receives, maximum over heads; zero at positions that hold no visual token.

    Attributes:
        self_attention: [B, Q] fp32, mean over the visual query rows of the token's own image.
        cross_attention: [B, Q] fp32, mean over the sample's question rows; zero where it has none.
    """

    self_attention: torch.Tensor
    cross_attention: torch.Tensor


class Ranks(Protocol):
    """Processes that compute what the same tokens receive, at the same time, each from a share of the rows.

    Attributes:
        number: this process, counted from 0.
        count: how many there are.
    """

    number: int
    count: int

    def sum(self, share: torch.Tensor) -> torch.Tensor:
        """Add up what the processes have. All call it, in the same order.

        Args:
            share: this process's, of the same shape in all; may be changed.
        """


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention call of a layer.

    Attributes:
        query: [B, H, Q, D], after rotary embedding.
        key: [B, G, K, D], after rotary embedding.
        value: [B, G, K, D].
        softmax: how its weights are computed.
        lse: [B, H, Q] fp32, log-sum-exp of each row's scaled products over the keys that it sees; None where the
            attention kernel does not return it.
        ranks: processes that have this call too, of the same heads, and share its rows; None for this one alone.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax: Softmax
    lse: torch.Tensor | None = None
    ranks: Ranks | None = None


@torch.no_grad()
def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
    softmax: Softmax,
    lse: torch.Tensor | None = None,
    ranks: Ranks | None = None,
) -> ReceivedAttention:
    """Compute the attention that visual tokens receive in one layer from the rows of this forward.

    Args:
        query: [B, H, Q, D], after rotary embedding.
        key: [B, G, K, D], after rotary embedding; H is a multiple of G, K at least Q.
        image: [B, Q] int64, number of the image that each token belongs to, -1 for text and padding.
        question: [B, Q] bool, the rows whose mean is cross attention; see `text_after`.
        softmax: how the layer computes its weights.
        lse: see `Attention`. With it a weight is as exact as a logarithm of it in the dtype of `query`: to 2^-9 times
            that logarithm in bf16.
        ranks: see `Attention`.

    Returns:
        Received self and cross attention, [B, Q] each. With several images, self attention comes from rows of the same
        image, so that it does not depend on how many images follow.

    Raises:
        ValueError: there are fewer keys than queries.

    Source: arXiv:2409.10197, section on attention statistics; the authors take the maximum over heads first, then the
    mean over query rows, and so does this. Differs from the authors' code: several images, a past, padding.
    """
    return Sums(image, question, ranks).received(query, key, softmax, lse)


class Sums:
    """The rows that received attention is summed over, and their weights.

    One serves all layers that the same tokens enter.

    Args:
        image: as for `received_attention`.
        question: as there.
        ranks: as there.
    """

    def __init__(self, image: torch.Tensor, question: torch.Tensor, ranks: Ranks | None = None) -> None:
        self._image, self._ranks = image, ranks
        # One weight per query row and kind: the mean over rows is a weighted sum over all rows. [B, 2, Q]
        self._row_weight = torch.stack([own_image_weights(image), mean_weights(question)], 1)
        if ranks is not None:  # in turn: later rows see more keys
            block = torch.arange(image.shape[1], device=image.device) // SOFTMAX_ROWS
            self._row_weight *= block % ranks.count == ranks.number
        self._text = (image < 0)[:, None]
        self._several_images = bool((image > 0).any())  # in one sample
        self._tiles: dict[tuple[int, int, bool], Tiles] = {}

    @torch.no_grad()
    def received(
        self, query: torch.Tensor, key: torch.Tensor, softmax: Softmax, lse: torch.Tensor | None = None
    ) -> ReceivedAttention:
        """Compute what the tokens receive in one layer; arguments and errors as for `received_attention`."""
        batch, heads, length, _ = query.shape
        keys = key.shape[2]
        if keys < length:
            raise ValueError(f"{length} queries against {keys} keys: each query's own key must be among the keys")
        if _fused(query, softmax):
            from fitprune.scoring.triton_kernels import received_on_gpu  # imports Triton

            options = {name: getattr(softmax, name) for name in ("scaling", "valid", "window", "softcap", "sinks")}
            received = received_on_gpu(query, key, self._image, self._row_weight, **options)
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
        if self._ranks is not None:
            received = self._ranks.sum(received)
        return ReceivedAttention(received[:, 0], received[:, 1])

    def _tiles_of(self, samples: slice, causal: bool) -> Tiles:
        place = samples.start, samples.stop, causal
        if place not in self._tiles:
            visual, needed = (self._image[samples] >= 0).any(0), (self._row_weight[samples] > 0).any(1).any(0)
            self._tiles[place] = Tiles.of(visual, needed, causal)
        return self._tiles[place]

    def _accumulate(self, received: torch.Tensor, strongest: Strongest, samples: slice) -> None:
        """Add each block of rows to `received` [b, 2, Q]."""
        image, row_weight = self._image[samples], self._row_weight[samples]
        for rows, columns, weights in strongest:
            if not self._several_images:
                received[:, :, columns] += row_weight[:, :, rows] @ weights
                continue
            received[:, 1:, columns] += row_weight[:, 1:, rows] @ weights
            same_image = image[:, rows, None] == image[:, None, columns]
            received[:, :1, columns] += row_weight[:, :1, rows] @ (weights * same_image)


def text_after(visual: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mark the question: the text after each sample's last visual token, whose rows are cross attention.

    With several images it is what follows the last one, as in the authors' code for one image. Text between images is
    no question: attention is causal, so its rows do not see the images after it and could rank the earlier ones alone.

    Args:
        visual: [B, Q] bool, the visual tokens.
        valid: [B, Q] bool, False at padding; None where nothing is padded.

    Returns:
        [B, Q] bool; all False for a sample without a visual token.
    """
    position = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(visual, position, -1).amax(1, keepdim=True)
    after = (position[None] > last) & (last >= 0)
    return after if valid is None else after & valid


def _fused(query: torch.Tensor, softmax: Softmax) -> bool:
    """Whether `triton_kernels` can compute this: on a GPU where Triton works, without masks, and up to these sizes."""
    fits = softmax.mask is None and query.shape[-1] <= 256 and query.element_size() <= 4
    if not (query.is_cuda and fits and _has_triton()):
        return False
    from fitprune.scoring.triton_kernels import usable

    return usable(query.device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def mean_weights(rows: torch.Tensor) -> torch.Tensor:
    """Weigh rows [B, Q] bool for their mean: fp32 that sums to 1 over the rows of each sample that has any."""
    return rows.float() / rows.sum(1, keepdim=True).clamp(min=1)


def own_image_weights(image: torch.Tensor) -> torch.Tensor:
    """Weigh the rows of each image for their mean: [B, Q] image numbers -> fp32 that sums to 1 over each image."""
    sizes = torch.zeros(image.shape[0], int(image.max()) + 2, device=image.device)
    sizes.scatter_add_(1, image + 1, torch.ones_like(image, dtype=sizes.dtype))
    return (image >= 0) / sizes.gather(1, image + 1)
