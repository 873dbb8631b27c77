"""Rows of a batch that hold different numbers of tokens: packed, taken, put back. Pure tensor functions, no model.

Rows are packed to the right: a shorter row has padding on its left.

Shapes: B batch, Q columns of a call, m rows present, m' rows after some left, d hidden size.
"""

from __future__ import annotations

import torch


def pack(columns: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep some rows of each sample, in order and to the right, as wide as the sample that keeps most.

    Args:
        columns: [B, m] int64, the column of each row; -1 at padding.
        stays: [B, m] bool, the rows to keep; False at padding.

    Returns:
        Indices of rows [B, m'], filled up on the left with rows that leave, and their columns [B, m'], -1 there.
    """
    most = int(stays.sum(1).max())
    # Stable: first what leaves, then what stays, each in order.
    index = stays.byte().argsort(dim=1, stable=True)[:, stays.shape[1] - most :]
    return index, columns.to(index.device).gather(1, index).masked_fill(~stays.gather(1, index), -1)


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows: [B, m, d] by [B, m'] -> [B, m', d]."""
    index = index.to(rows.device)
    first = rows.shape[1] * torch.arange(len(index), device=index.device)[:, None]
    # index_select copies whole rows, gather value by value.
    return rows.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, rows.shape[-1])


def untake(rows: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Undo `take`: [B, m', d] -> [B, m, d] with m = `count`; rows that were not taken repeat the first one taken."""
    index = index.to(rows.device)
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return take(rows, index.new_zeros(len(index), count).scatter_(1, index, place))


def take_positions(whole: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Take rows [B, m] of [..., B or 1, Q, d]; leading axes are those of multimodal rotary positions."""
    kept = kept.to(whole.device)
    if whole.shape[-3] == 1:  # the same for all samples: whole rows can be copied
        return whole[..., 0, :, :][..., kept, :]
    *axes, _, length, width = whole.shape
    index = kept[..., None].expand(*axes, *kept.shape, width)
    return whole.expand(*axes, len(kept), length, width).gather(-2, index)


def to_columns(
    hidden: torch.Tensor, kept: torch.Tensor | None, valid: torch.Tensor | None, length: int
) -> torch.Tensor:
    """Put rows back into the columns of their call: [B, m, d] -> [B, Q, d], zero where a token left.

    Padding after a token repeats that token's row. So in a right-padded prompt `logits[:, -1]`, which generate reads,
    and the logit before a draft are those of the last token.

    Args:
        hidden: [B, m, d].
        kept: [B, m] int64, column of each row; -1 at padding. None if all rows are present.
        valid: [B, Q] bool, False at padding; None where there is none.
        length: Q.
    """
    repeated = None if valid is None else _last_tokens(valid.to(hidden.device))
    if kept is None and repeated is None:
        return hidden
    batch, rows, width = hidden.shape
    source = row = torch.arange(1, rows + 1, device=hidden.device).expand(batch, -1)
    if kept is not None:
        kept = kept.to(hidden.device)
        # Row 0 is a zero row, for columns without a token; column Q takes the padding, and is cut off.
        source = row.new_zeros(batch, length + 1)
        source = source.scatter(1, torch.where(kept < 0, length, kept), row)[:, :length]
    if repeated is not None:
        source = source.gather(1, repeated)
    return take(torch.cat([hidden.new_zeros(batch, 1, width), hidden], 1), source)


def _last_tokens(valid: torch.Tensor) -> torch.Tensor | None:
    """For each column, the last one up to it that holds a token; without one, itself: [B, Q]. None if all are so."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    last = torch.where(valid, column, -1).cummax(1).values
    last = torch.where(last < 0, column, last)
    return None if torch.equal(last, column) else last
