"""Attention weights in blocks, the maximum over heads of each: by a softmax, or by log-sum-exps that a kernel gave."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from fitprune.costs.flops import SCORE_BLOCK, balanced, score_width
from fitprune.scoring.softmax import Softmax

BLOCK_BYTES = 16 * 2**20  # of attention weights or products held at a time; a few such blocks live at once


TILE_BYTES = 8 * 2**20  # of products, where no softmax is made: two cores' caches


SOFTMAX_ROWS = 64  # rows whose softmax is made at a time, where it is: fewer where these are more than BLOCK_BYTES


# Numbers of rows or columns of this forward, or, where they stand together, a slice.
_Numbers = slice | torch.Tensor


# Rows r, columns c, and the strongest weight of any head there, [B, r, c] fp32.
Strongest = Iterator[tuple[_Numbers, _Numbers, torch.Tensor]]


def strongest_by_softmax(query: torch.Tensor, key: torch.Tensor, needed: torch.Tensor, softmax: Softmax) -> Strongest:
    """Make the weights of the needed rows [Q] bool, and take the maximum over heads."""
    past = key.shape[2] - query.shape[2]
    for rows, own, weights in row_blocks(query, key, needed, softmax):
        strongest = weights.amax(1)[..., past:]
        del weights  # before the next block is made
        yield rows, slice(0, own), strongest


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Row blocks against tiles of visual columns.

    Attributes:
        blocks: rows, how many of the visual columns some of them sees, and which these are.
        columns: of each tile. A tile ends where a block's columns do, since a part of one would be copied.
    """

    blocks: tuple[tuple[_Numbers, int, _Numbers], ...]
    columns: tuple[_Numbers, ...]

    @classmethod
    def of(cls, visual: torch.Tensor, needed: torch.Tensor, causal: bool) -> Tiles:
        """Make them of the visual columns [Q] and the needed rows [Q], bool."""
        places = torch.nonzero(visual)[:, 0].tolist()
        blocks, edges = [], [0]
        for rows, own in _needed_rows(len(visual), needed, causal):
            seen = bisect.bisect_left(places, own)
            if not seen:  # a sample whose visual tokens have all left still has a question
                continue
            blocks.append((rows, seen, _numbers(places[:seen], visual.device)))
            if seen > edges[-1]:
                size = balanced(seen - edges[-1], SCORE_BLOCK)
                edges += [*range(edges[-1] + size, seen, size), seen]
        return cls(tuple(blocks), tuple(_numbers(places[a:b], visual.device) for a, b in itertools.pairwise(edges)))


def strongest_by_lse(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, tiles: Tiles, softmax: Softmax
) -> Strongest:
    """Take the maximum over heads of products less log-sum-exp, and then one exponential.

    In fp32 the product is added to the log-sum-exp. In shorter types, which would round that, it rides along:
    LSE_COLUMNS behind the queries, the second of which holds what rounding has left, against ones behind the keys.
    One tile of products is held at a time, in one place: what is written is still in the processor's cache when it is
    read, and no page of memory is asked for twice.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    past, each, wide = keys - length, heads // groups, score_width(width, query.element_size())
    rest = lse * (-1 / softmax.scaling)
    if not softmax.only_causal:
        rest.nan_to_num_(0, 0, 0)  # of a row that sees no key: hidden below, but must be no NaN
    behind = query.new_zeros(batch, heads, length, wide - width)
    if wide > width:
        behind[..., 0] = rest
        behind[..., 1] = rest - behind[..., 0]
    else:
        rest = rest.to(query.dtype)
    theirs = []
    for columns in tiles.columns:
        part = key[:, :, past:][:, :, columns]
        if wide > width:
            part = torch.cat([part, key.new_ones(1, 1, 1, 1).expand(*part.shape[:3], wide - width)], -1)
        theirs.append(part.flatten(0, 1).transpose(1, 2))
    at_once = each * min(length, SCORE_BLOCK) * max(tile.shape[2] for tile in theirs) if theirs else 1
    some = batch * groups if batch > 1 else max(1, TILE_BYTES // (at_once * query.element_size()))
    room = query.new_empty(min(some, batch * groups) * at_once)
    for rows, seen, columns in tiles.blocks:
        ours, added = query[:, :, rows], rest[:, :, rows]
        if wide > width:
            ours = torch.cat([ours, behind[:, :, rows]], -1)
        count = ours.shape[2]
        ours, added = (part.reshape(batch * groups, each * count, -1) for part in (ours, added))
        strongest, start = query.new_empty(batch, count, seen), 0
        for tile in theirs:
            if start >= seen:
                break
            here = strongest[:, :, start : start + tile.shape[2]]
            start += tile.shape[2]
            for first in range(0, batch * groups, some):
                mine, other = ours[first : first + some], tile[first : first + some]
                products = room[: mine.shape[0] * mine.shape[1] * other.shape[2]].view(*mine.shape[:2], -1)
                if wide > width:
                    torch.bmm(mine, other, out=products)
                else:
                    torch.baddbmm(added[first : first + some], mine, other, out=products)
                by_head = products.view(batch, -1, count, other.shape[2])
                if first == 0:
                    torch.amax(by_head, 1, out=here)
                else:
                    torch.maximum(here, by_head.amax(1), out=here)
        weights = strongest.float().mul_(softmax.scaling).exp_()
        if softmax.only_causal and isinstance(rows, slice) and isinstance(columns, slice):
            weights.tril_(rows.start - columns.start)
        else:
            numbers = torch.arange(length, device=query.device)[rows]
            weights.masked_fill_(softmax.hidden(numbers, past, keys)[:, 0, :, past:][..., columns], 0)
        yield rows, columns, weights


def row_blocks(
    query: torch.Tensor, key: torch.Tensor, needed: torch.Tensor, softmax: Softmax
) -> Iterator[tuple[_Numbers, int, torch.Tensor]]:
    """Give the attention of the needed rows [Q] bool in blocks.

    The last one first: what it frees is enough for each that follows. The other way round each is a little larger than
    what was freed before, and memory grows by hundreds of megabytes.

    Yields:
        Rows, how many of the last Q keys the block looks at, and its attention fp32 [B, H, r, past + those].
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    past = key.shape[2] - length
    numbers = torch.arange(length, device=query.device)
    at_once = max(1, min(SOFTMAX_ROWS, BLOCK_BYTES // (batch * heads * key.shape[2] * 4)))
    for rows, own in reversed(list(_needed_rows(length, needed, softmax.causal, at_once))):
        keys, index = past + own, numbers[rows]
        block = (query[:, :, rows] * softmax.scaling).reshape(batch, groups, heads // groups * len(index), width)
        products = block @ key[:, :, :keys].transpose(2, 3)
        yield rows, own, softmax.weights(products.view(batch, heads, len(index), keys), index, past)


def _needed_rows(
    length: int, needed: torch.Tensor, causal: bool, size: int = SCORE_BLOCK
) -> Iterator[tuple[_Numbers, int]]:
    """Give the needed rows [Q] bool in blocks, ascending, with how many of the last Q keys each looks at."""
    numbers = torch.nonzero(needed)[:, 0].tolist()
    size = balanced(len(numbers), size)
    for first in range(0, len(numbers), size):
        block = numbers[first : first + size]
        # In a causal layer later keys are behind every row of the block.
        yield _numbers(block, needed.device), block[-1] + 1 if causal else length


def _numbers(ascending: list[int], device: torch.device) -> _Numbers:
    """Make an index of numbers, of which there is at least one: a slice if none is missing between them."""
    begin, end = ascending[0], ascending[-1] + 1
    return slice(begin, end) if end - begin == len(ascending) else torch.tensor(ascending, device=device)
