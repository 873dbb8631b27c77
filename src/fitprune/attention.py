"""Received attention of visual tokens, from one layer's queries and keys, in blocks.

Never holds a map of all queries x all keys: memory is bounded by BLOCK_BYTES whatever the prompt's length.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size. The last Q keys are the queries' own
tokens; those before them, if any, are the past that a cache holds.
"""

from __future__ import annotations

import dataclasses

import torch

from fitprune.flops import SCORE_BLOCK

BLOCK_BYTES = 16 * 2**20  # of fp32 attention weights held at a time; a few such blocks live at once


@dataclasses.dataclass(frozen=True)
class ReceivedAttention:
    """Attention that each token receives, maximum over heads; zero at positions that hold no visual token.

    Attributes:
        self_attention: [B, Q] fp32, mean over the visual query rows of the token's own image.
        cross_attention: [B, Q] fp32, mean over the sample's question rows; zero where it has none.
    """

    self_attention: torch.Tensor
    cross_attention: torch.Tensor


@torch.no_grad()
def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> ReceivedAttention:
    """Compute the attention that visual tokens receive in one causal layer, from rows of this forward.

    Args:
        query: [B, H, Q, D], after rotary embedding.
        key: [B, G, K, D], after rotary embedding; H is a multiple of G, K at least Q.
        image: [B, Q] int64, number of the image that each token belongs to, -1 for text and padding.
        question: [B, Q] bool, the rows whose mean is cross attention; see `text_after`.
        scaling: factor on the query-key products.
        valid: [B, K] bool, False at padding; None where nothing is padded.

    Returns:
        Received self and cross attention, [B, Q] each. With several images, self attention comes from rows of the same
        image, so that it does not depend on how many images follow.

    Raises:
        ValueError: there are fewer keys than queries.

    Source: arXiv:2409.10197, section on attention statistics; the authors take the maximum over heads first, then the
    mean over query rows, and so does this. Differs from the authors' code: several images, a past, padding.
    """
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    if keys < length:
        raise ValueError(f"{length} queries against {keys} keys: each query's own key must be among the keys")
    # One weight per query row and kind: the mean over rows is a weighted sum over all rows.
    row_weight = torch.stack([_own_image_weights(image), _mean_weights(question)], 1)  # [B, 2, Q]

    received = torch.zeros(batch, 2, length, device=query.device)
    per_sample = max(1, BLOCK_BYTES // (heads * SCORE_BLOCK * keys * 4))
    for first in range(0, batch, per_sample):
        rows = slice(first, first + per_sample)
        _accumulate(
            received[rows],
            query[rows],
            key[rows],
            image[rows],
            row_weight[rows],
            scaling,
            None if valid is None else valid[rows],
        )
    received.masked_fill_(image[:, None] < 0, 0)
    return ReceivedAttention(received[:, 0], received[:, 1])


@torch.no_grad()
def last_row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the attention that the question's last row pays to each visual token, mean over heads: [B, Q] fp32.

    Arguments as for `received_attention`. Zero at positions that hold no visual token, and for samples without a
    question.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    position = torch.arange(length, device=query.device)
    last = torch.where(question, position, -1).amax(1)
    rows = query.gather(2, last.clamp(min=0)[:, None, None, None].expand(-1, heads, 1, width)) * scaling
    weights = (rows.view(batch, groups, heads // groups, width) @ key.transpose(2, 3)).view(batch, heads, keys)
    hidden = torch.arange(keys, device=query.device)[None] > (keys - length + last)[:, None]
    if valid is not None:
        hidden = hidden | ~valid
    weights = weights.float().masked_fill_(hidden[:, None], torch.finfo(torch.float32).min).softmax(-1)
    return weights.mean(1)[:, keys - length :].masked_fill((image < 0) | (last < 0)[:, None], 0)


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


def _mean_weights(rows: torch.Tensor) -> torch.Tensor:
    """[B, Q] bool -> [B, Q] fp32 that sums to one over the rows of each sample that has any."""
    return rows.float() / rows.sum(1, keepdim=True).clamp(min=1)


def _own_image_weights(image: torch.Tensor) -> torch.Tensor:
    """[B, Q] image numbers -> [B, Q] fp32 that sums to one over the rows of each image, zero elsewhere."""
    sizes = torch.zeros(image.shape[0], int(image.max()) + 2, device=image.device)
    sizes.scatter_add_(1, image + 1, torch.ones_like(image, dtype=sizes.dtype))
    return (image >= 0) / sizes.gather(1, image + 1)


def _accumulate(
    received: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    row_weight: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
) -> None:
    """Add each needed row block's share to `received` [B, 2, Q]."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    past = key.shape[2] - length
    several = bool((image > 0).any())
    needed = torch.nonzero((row_weight > 0).any(1).any(0))[:, 0]  # rows that some sample needs, ascending
    for index in torch.split(needed, SCORE_BLOCK):
        own = int(index[-1]) + 1  # later keys are behind every row of the block
        keys = past + own
        contiguous = own - int(index[0]) == len(index)
        block = query[:, :, int(index[0]) : own] if contiguous else query[:, :, index]
        block = (block * scaling).reshape(batch, groups, heads // groups * len(index), width)
        weights = (block @ key[:, :, :keys].transpose(2, 3)).view(batch, heads, len(index), keys)
        hidden = torch.arange(keys, device=index.device)[None] > past + index[:, None]
        if valid is not None:
            hidden = hidden | ~valid[:, None, None, :keys]
        # The lowest finite number, not -inf: a padded row has no key of its own and must not turn into NaN.
        weights = weights.float().masked_fill_(hidden, torch.finfo(torch.float32).min)
        strongest = weights.softmax(-1).amax(1)[..., past:]
        received[:, 1:, :own] += row_weight[:, 1:, index] @ strongest
        if several:
            strongest = strongest * (image[:, index, None] == image[:, None, :own])
        received[:, :1, :own] += row_weight[:, :1, index] @ strongest
