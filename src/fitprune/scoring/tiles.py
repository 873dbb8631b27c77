"""Attention weights in blocks, the maximum over heads of each: by a softmax, or by log-sum-exps that a kernel gave.

Shapes as in `fitprune.scoring.received`; r rows and c columns of a block.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from fitprune.costs.flops import SCORE_BLOCK, balanced, score_width
from fitprune.scoring.softmax import Softmax

BLOCK_BYTES = 16 * 2**20  # of attention weights or products in memory at a time; a few such blocks exist at once
TILE_BYTES = 8 * 2**20  # of products, where no softmax is computed: two cores' caches
SOFTMAX_ROWS = 64  # rows whose softmax is computed at a time; fewer where these are more than BLOCK_BYTES

# Numbers of rows or columns of this forward, or, where none is missing between them, a slice.
_Numbers = slice | torch.Tensor

# Rows r, columns c, and the strongest weight of any head there, [B, r, c] fp32.
Strongest = Iterator[tuple[_Numbers, _Numbers, torch.Tensor]]


def strongest_by_softmax(query: torch.Tensor, key: torch.Tensor, needed: torch.Tensor, softmax: Softmax) -> Strongest:
    """Compute the weights of the needed rows [Q] bool, and take the maximum over heads."""
    past = key.shape[2] - query.shape[2]
    for rows, own, weights in row_blocks(query, key, needed, softmax):
        strongest = weights.amax(1)[..., past:]
        del weights  # before the next block is computed
        yield rows, slice(0, own), strongest


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Row blocks against tiles of visual columns.

    Attributes:
        blocks: rows, the number of visual columns that they see together, and these columns.
        columns: of each tile. A tile ends where a block's columns do, since a part of a tile would be copied.
    """

    blocks: tuple[tuple[_Numbers, int, _Numbers], ...]
    columns: tuple[_Numbers, ...]

    @classmethod
    def of(cls, visual: torch.Tensor, needed: torch.Tensor, causal: bool) -> Tiles:
        """Divide the visual columns [Q] bool and the needed rows [Q] bool; causal if no row sees a later key."""
        places = torch.nonzero(visual)[:, 0].tolist()
        blocks, edges = [], [0]
        for rows, own in _needed_rows(len(visual), needed, causal):
            count = bisect.bisect_left(places, own)
            if not count:  # a sample whose visual tokens have all left still has a question
                continue
            blocks.append((rows, count, _numbers(places[:count], visual.device)))
            if count > edges[-1]:
                size = balanced(count - edges[-1], SCORE_BLOCK)
                edges += [*range(edges[-1] + size, count, size), count]
        return cls(tuple(blocks), tuple(_numbers(places[a:b], visual.device) for a, b in itertools.pairwise(edges)))


def strongest_by_lse(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, tiles: Tiles, softmax: Softmax
) -> Strongest:
    """Take the maximum over heads of products less log-sum-exp, and then one exponential.

        a block's queries  log-sum-exp      keys of visual tokens          a block's weights
        +---------------+  +---------+     +--------+--------+---         +--------+--------+---
        |  H x r x D    |  |  H x r  |  x  | tile 0 | tile 1 |  ...  ->   |  r x c | r x c  |  ...   max over H, exp
        +---------------+  +---------+     +--------+--------+---         +--------+--------+---

    One tile of products is held at a time, in one place: what is written is still in the processor's cache when it is
    read, and no page of memory is asked for twice.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    past, each = keys - length, heads // groups
    offset = lse * (-1 / softmax.scaling)
    if not softmax.only_causal:
        offset.nan_to_num_(0, 0, 0)  # of a row that sees no key: hidden below, but must be no NaN
    operands = _lse_as_columns if score_width(width, query.element_size()) > width else _lse_added
    block_of, key_tiles = operands(query, key[:, :, past:], offset, tiles)
    key_tiles = [tile.flatten(0, 1).transpose(1, 2) for tile in key_tiles]
    largest = each * min(length, SCORE_BLOCK) * max((tile.shape[2] for tile in key_tiles), default=1)
    at_once = batch * groups if batch > 1 else max(1, TILE_BYTES // (largest * query.element_size()))
    room = query.new_empty(min(at_once, batch * groups) * largest)
    for rows, count, columns in tiles.blocks:
        block, added = block_of(rows)
        queries = block.reshape(batch * groups, -1, block.shape[-1])
        added = None if added is None else added.reshape(batch * groups, -1, 1)
        strongest = query.new_empty(batch, queries.shape[1] // each, count)
        _maximum_over_heads(strongest, queries, added, key_tiles, room, at_once)
        weights = strongest.float().mul_(softmax.scaling).exp_()
        if softmax.only_causal and isinstance(rows, slice) and isinstance(columns, slice):
            weights.tril_(rows.start - columns.start)
        else:
            numbers = torch.arange(length, device=query.device)[rows]
            weights.masked_fill_(softmax.hidden(numbers, past, keys)[:, 0, :, past:][..., columns], 0)
        yield rows, columns, weights


# A block's queries [B, H, r, D or more], and what to add to their products [B, H, r, 1].
_BlockOf = Callable[[_Numbers], tuple[torch.Tensor, torch.Tensor | None]]


def _lse_added(
    query: torch.Tensor, key: torch.Tensor, offset: torch.Tensor, tiles: Tiles
) -> tuple[_BlockOf, list[torch.Tensor]]:
    """Take queries and tiles of keys as they are, and add `offset` [B, H, Q] to their products: in fp32."""
    offset = offset.to(query.dtype)[..., None]
    return lambda rows: (query[:, :, rows], offset[:, :, rows]), [key[:, :, columns] for columns in tiles.columns]


def _lse_as_columns(
    query: torch.Tensor, key: torch.Tensor, offset: torch.Tensor, tiles: Tiles
) -> tuple[_BlockOf, list[torch.Tensor]]:
    """Make `offset` [B, H, Q] part of the products, which shorter types than fp32 would round if it were added.

    LSE_COLUMNS after each query hold it, the second of them what rounding has left of the first; after each key are
    ones.
    """
    columns = score_width(query.shape[-1], query.element_size()) - query.shape[-1]
    beside = query.new_zeros(*query.shape[:3], columns)
    beside[..., 0] = offset
    beside[..., 1] = offset - beside[..., 0]
    ones = key.new_ones(1, 1, 1, 1).expand(*key.shape[:2], -1, columns)
    parts = [key[:, :, tile] for tile in tiles.columns]
    key_tiles = [torch.cat([part, ones.expand(-1, -1, part.shape[2], -1)], -1) for part in parts]
    return lambda rows: (torch.cat([query[:, :, rows], beside[:, :, rows]], -1), None), key_tiles


def _maximum_over_heads(
    strongest: torch.Tensor,
    queries: torch.Tensor,
    added: torch.Tensor | None,
    key_tiles: Sequence[torch.Tensor],
    room: torch.Tensor,
    at_once: int,
) -> None:
    """Write the maximum over heads of products to `strongest`.

    Args:
        strongest: [B, r, c], to be written; the c columns end where one of the tiles does.
        queries: [B * G, H / G * r, D].
        added: [B * G, H / G * r, 1], to add to the products, or None.
        key_tiles: [B * G, D, columns] each.
        room: where products are held, of at most `at_once` groups and one tile.
        at_once: groups whose products are held at a time: all of them, or a part of one sample's.
    """
    batch, rows, columns = strongest.shape
    start = 0
    for tile in key_tiles:
        if start >= columns:
            return
        here = strongest[:, :, start : start + tile.shape[2]]
        start += tile.shape[2]
        for first in range(0, len(queries), at_once):
            groups = slice(first, first + at_once)
            mine, keys = queries[groups], tile[groups]
            products = room[: mine.shape[0] * mine.shape[1] * keys.shape[2]].view(*mine.shape[:2], -1)
            if added is None:
                torch.bmm(mine, keys, out=products)
            else:
                torch.baddbmm(added[groups], mine, keys, out=products)
            by_head = products.view(batch, -1, rows, keys.shape[2])
            if first == 0:
                torch.amax(by_head, 1, out=here)
            else:
                torch.maximum(here, by_head.amax(1), out=here)


def row_blocks(
    query: torch.Tensor, key: torch.Tensor, needed: torch.Tensor, softmax: Softmax
) -> Iterator[tuple[_Numbers, int, torch.Tensor]]:
    """Compute the attention of the needed rows in blocks.

    The last block comes first: the memory that it frees is enough for each that follows. In ascending order each block
    would be a little larger than what was freed before, and memory would grow by hundreds of megabytes.

    Args:
        query: [B, H, Q, D].
        key: [B, G, K, D].
        needed: [Q] bool.
        softmax: how the layer computes its weights.

    Yields:
        Rows, how many of the last Q keys the block sees, and its attention fp32 [B, H, r, past + that number].
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
    """Divide the needed rows [Q] bool into blocks, ascending, each with how many of the last Q keys it sees."""
    numbers = torch.nonzero(needed)[:, 0].tolist()
    size = balanced(len(numbers), size)
    for first in range(0, len(numbers), size):
        block = numbers[first : first + size]
        # In a causal layer no row of the block sees a key after its last row's own.
        yield _numbers(block, needed.device), block[-1] + 1 if causal else length


def _numbers(ascending: list[int], device: torch.device) -> _Numbers:
    """Make an index of at least one ascending number: a slice if none is missing between them."""
    begin, end = ascending[0], ascending[-1] + 1
    return slice(begin, end) if end - begin == len(ascending) else torch.tensor(ascending, device=device)
