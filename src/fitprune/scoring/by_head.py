"""The attention that visual tokens receive from each head. Shapes as in `fitprune.scoring.received`."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fitprune.scoring.received import mean_weights, own_image_weights
from fitprune.scoring.softmax import Softmax
from fitprune.scoring.tiles import BLOCK_BYTES, SOFTMAX_ROWS, row_blocks

HEAD_KINDS = ("mean", "max", "last", "self")


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

    Args:
        query: as for `received_attention`, like the next four.
        key: as there.
        image: as there.
        question: as there.
        softmax: as there.
        kinds: which to compute. "mean" and "max" are over the question's rows, "last" is its last row, "self" the mean
            over the visual rows of the token's own image.

    Returns:
        Kind -> [B, H, Q] fp32, zero at positions that hold no visual token, and for samples without such a row.
    """
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    position = torch.arange(length, device=query.device)
    last = position == torch.where(question, position, -1).amax(1, keepdim=True)
    weight = {"mean": mean_weights(question), "last": last.float(), "self": own_image_weights(image)}
    totals = {kind: torch.zeros(batch, heads, length, device=query.device) for kind in kinds}
    needed = {kind: question if kind == "max" else weight[kind] > 0 for kind in kinds}
    of_any_kind = torch.stack(list(needed.values())).any(0)  # [B, Q]
    per_sample = max(1, BLOCK_BYTES // (heads * SOFTMAX_ROWS * key.shape[2] * 4))
    for first in range(0, batch, per_sample):
        rows = slice(first, first + per_sample)
        for index, own, weights in row_blocks(query[rows], key[rows], of_any_kind[rows].any(0), softmax.of(rows)):
            block = weights[..., past:]
            for kind, total in totals.items():
                if not bool(needed[kind][rows, index].any()):
                    continue
                into = total[rows, :, :own]
                if kind == "max":
                    into.copy_(torch.maximum(into, (block * question[rows, None, index, None]).amax(2)))
                    continue
                share = block * weight[kind][rows, None, index, None]
                if kind == "self":
                    share = share * (image[rows, None, index, None] == image[rows, None, None, :own])
                into += share.sum(2)
    return {kind: total.masked_fill_(image[:, None] < 0, 0) for kind, total in totals.items()}
