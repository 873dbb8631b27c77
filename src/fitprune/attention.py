"""Received attention of visual tokens, from one layer's queries and keys, in blocks.

Never holds a map of all queries x all keys: memory is bounded by BLOCK_BYTES whatever the prompt's length.

Shapes: B batch, H query heads, G key/value heads, N tokens, D head size.
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
        self_attention: [B, N] fp32, mean over the sample's visual query rows.
        cross_attention: [B, N] fp32, mean over the sample's text query rows after its last visual token.
    """

    self_attention: torch.Tensor
    cross_attention: torch.Tensor


@torch.no_grad()
def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    visual: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> ReceivedAttention:
    """Compute the attention that visual tokens receive in one causal layer's prefill.

    Args:
        query: [B, H, N, D], after rotary embedding.
        key: [B, G, N, D], after rotary embedding; H is a multiple of G.
        visual: [B, N] bool, where a visual token is.
        scaling: factor on the query-key products.
        valid: [B, N] bool, False at padding; None where nothing is padded.

    Returns:
        Received self and cross attention, [B, N] each.

    Raises:
        ValueError: queries and keys differ in length, or a sample has no visual token or no text after its last one.

    Source: arXiv:2409.10197, section on attention statistics; the authors take the maximum over heads first, then the
    mean over query rows, and so does this.
    """
    batch, heads, length, _ = query.shape
    if key.shape[2] != length:
        raise ValueError(f"{length} queries against {key.shape[2]} keys: scores are taken in a whole prefill only")
    after = text_after(visual, valid)
    # One weight per query row and kind: the mean over a sample's rows is a weighted sum over all rows.
    row_weight = torch.stack([_mean_weights(visual), _mean_weights(after)], 1)  # [B, 2, N]

    received = torch.zeros(batch, 2, length, device=query.device)
    per_sample = max(1, BLOCK_BYTES // (heads * SCORE_BLOCK * length * 4))
    for first in range(0, batch, per_sample):
        rows = slice(first, first + per_sample)
        _accumulate(
            received[rows], query[rows], key[rows], row_weight[rows], scaling, None if valid is None else valid[rows]
        )
    received.masked_fill_(~visual[:, None], 0)
    return ReceivedAttention(received[:, 0], received[:, 1])


def text_after(visual: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mark the text after each sample's last visual token, whose rows are cross attention: [B, N] bool.

    Raises:
        ValueError: a sample has no visual token or no such text.
    """
    position = torch.arange(visual.shape[1], device=visual.device)
    after = position[None] > torch.where(visual, position, -1).amax(1, keepdim=True)
    after = after if valid is None else after & valid
    for needed, what in ((visual, "visual token"), (after, "text after its last visual token")):
        if not bool(needed.any(1).all()):
            number = int(needed.any(1).int().argmin())
            raise ValueError(f"sample {number} of the batch has no {what}: scores need an image and then a question")
    return after


def _mean_weights(rows: torch.Tensor) -> torch.Tensor:
    """[B, N] bool -> [B, N] fp32 that sums to one over the rows of each sample that has any."""
    return rows.float() / rows.sum(1, keepdim=True).clamp(min=1)


def _accumulate(
    received: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    row_weight: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
) -> None:
    """Add each needed row block's share to `received` [B, 2, N]."""
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    needed = torch.nonzero((row_weight > 0).any(1).any(0))[:, 0]  # rows that some sample needs, ascending
    for index in torch.split(needed, SCORE_BLOCK):
        keys = int(index[-1]) + 1  # later keys are behind every row of the block
        contiguous = keys - int(index[0]) == len(index)
        block = query[:, :, int(index[0]) : keys] if contiguous else query[:, :, index]
        block = (block * scaling).reshape(batch, groups, heads // groups * len(index), width)
        weights = (block @ key[:, :, :keys].transpose(2, 3)).view(batch, heads, len(index), keys)
        hidden = torch.arange(keys, device=index.device)[None] > index[:, None]
        if valid is not None:
            hidden = hidden | ~valid[:, None, None, :keys]
        # The lowest finite number, not -inf: a padded row has no key of its own and must not turn into NaN.
        weights = weights.float().masked_fill_(hidden, torch.finfo(torch.float32).min)
        strongest = weights.softmax(-1).amax(1)
        received[..., :keys] += row_weight[:, :, index] @ strongest
