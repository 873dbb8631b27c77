"""Received attention of visual tokens, from one layer's queries and keys, in blocks.

Never holds a map of all queries x all keys: memory is bounded by BLOCK_BYTES whatever the prompt's length.

Where the layer's attention kernel tells the log-sum-exp of each row, as PyTorch's does, a weight is the exponential of
a product less that; so the maximum over heads is taken of the products, in the model's own dtype, and one exponential
is left for all heads together.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size. The last Q keys are the queries' own
tokens; those before them, if any, are the past that a cache holds.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Collection, Iterator

import torch

from fitprune.costs.flops import SCORE_BLOCK, balanced, score_width

HEAD_KINDS = ("mean", "max", "last", "self")
BLOCK_BYTES = 16 * 2**20  # of attention weights or products held at a time; a few such blocks live at once
_TILE_BYTES = 8 * 2**20  # of products, where no softmax is made: two cores' caches
_SOFTMAX_ROWS = 64  # rows whose softmax is made at a time, where it is: fewer where these are more than BLOCK_BYTES


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
class Softmax:
    """How a layer makes attention weights of the products of queries and keys.

    Attributes:
        scaling: factor on the products.
        valid: [B, K] bool, False at padding; None where nothing is padded. Not looked at where there is a mask.
        mask: [B or 1, H or 1, Q, K], the layer's own: bool, True where a row sees a key, or a number to add. None: a
            row sees all keys up to its own.
        window: how many keys back a row looks, its own counted, where there is no mask to say it; None for all.
        softcap: products are bent to stay within it.
        sinks: [H], a logit for each head that takes weight and gives nothing.
    """

    scaling: float
    valid: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @functools.cached_property
    def causal(self) -> bool:
        """Whether no row sees a later key than its own."""
        if self.mask is None:
            return True
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        rows, keys = seen.shape[-2:]
        return not bool(seen.triu(keys - rows + 1).any())

    def of(self, samples: slice) -> Softmax:
        """The same for some samples of the batch."""
        return dataclasses.replace(
            self,
            valid=None if self.valid is None else self.valid[samples],
            mask=self.mask if self.mask is None or len(self.mask) == 1 else self.mask[samples],
        )

    def hidden(self, rows: torch.Tensor, past: int, keys: int) -> torch.Tensor:
        """Mark which of the first `keys` keys the rows [r] of this forward do not see: [B or 1, H or 1, r, keys] bool.

        Not where the mask is one of numbers.
        """
        if self.mask is not None:
            return ~self.mask[:, :, rows, :keys]
        key, own = torch.arange(keys, device=rows.device), past + rows[:, None]
        hidden = key > own if self.window is None else (key > own) | (key <= own - self.window)
        return hidden[None, None] if self.valid is None else hidden | ~self.valid[:, None, None, :keys]

    @property
    def only_causal(self) -> bool:
        """Whether a row sees all keys up to its own, and no other."""
        return self.mask is None and self.window is None and self.valid is None

    @property
    def plain(self) -> bool:
        """Whether a weight is the exponential of a product less its row's log-sum-exp, or hidden in all heads."""
        masked_alike = self.mask is None or (self.mask.dtype == torch.bool and self.mask.shape[1] == 1)
        return masked_alike and self.softcap is None and self.sinks is None

    def weights(self, products: torch.Tensor, rows: torch.Tensor, past: int) -> torch.Tensor:
        """Make weights of scaled products [B, H, r, k] of the rows [r] of this forward and the first k keys: fp32."""
        logits, keys = products.float(), products.shape[-1]
        lowest = torch.finfo(torch.float32).min  # not -inf: a padded row sees no key and must not turn into NaN
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = (logits + self.mask[:, :, rows, :keys]).clamp_(min=lowest)
        else:
            logits = logits.masked_fill_(self.hidden(rows, past, keys), lowest)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


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
        self._tiles: dict[tuple[int, int, bool], _Tiles] = {}

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
                at_once = max(1, BLOCK_BYTES // (heads * _SOFTMAX_ROWS * keys * 4))
            else:
                at_once = max(1, _TILE_BYTES // (heads * min(keys, SCORE_BLOCK) ** 2 * query.element_size()))
            for first in range(0, batch, at_once):
                samples = slice(first, first + at_once)
                own = softmax.of(samples)
                if known is None:
                    needed = (self._row_weight[samples] > 0).any(1).any(0)
                    strongest = _strongest_by_softmax(query[samples], key[samples], needed, own)
                else:
                    tiles = self._tiles_of(samples, own.causal)
                    strongest = _strongest_by_lse(query[samples], key[samples], known[samples], tiles, own)
                self._accumulate(received[samples], strongest, samples)
        received.masked_fill_(self._text, 0)
        return ReceivedAttention(received[:, 0], received[:, 1])

    def _tiles_of(self, samples: slice, causal: bool) -> _Tiles:
        place = samples.start, samples.stop, causal
        if place not in self._tiles:
            visual, needed = (self._image[samples] >= 0).any(0), (self._row_weight[samples] > 0).any(1).any(0)
            self._tiles[place] = _Tiles.of(visual, needed, causal)
        return self._tiles[place]

    def _accumulate(self, received: torch.Tensor, strongest: _Strongest, samples: slice) -> None:
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
    per_sample = max(1, BLOCK_BYTES // (heads * _SOFTMAX_ROWS * key.shape[2] * 4))
    for first in range(0, batch, per_sample):
        rows = slice(first, first + per_sample)
        for index, own, weights in _row_blocks(query[rows], key[rows], wanted[rows].any(0), softmax.of(rows)):
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


# Numbers of rows or columns of this forward, or, where they stand together, a slice.
_Numbers = slice | torch.Tensor
# Rows r, columns c, and the strongest weight of any head there, [B, r, c] fp32.
_Strongest = Iterator[tuple[_Numbers, _Numbers, torch.Tensor]]


def _strongest_by_softmax(query: torch.Tensor, key: torch.Tensor, needed: torch.Tensor, softmax: Softmax) -> _Strongest:
    """Make the weights of the needed rows [Q] bool, and take the maximum over heads."""
    past = key.shape[2] - query.shape[2]
    for rows, own, weights in _row_blocks(query, key, needed, softmax):
        strongest = weights.amax(1)[..., past:]
        del weights  # before the next block is made
        yield rows, slice(0, own), strongest


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Row blocks against tiles of visual columns.

    Attributes:
        blocks: rows, how many of the visual columns some of them sees, and which these are.
        columns: of each tile. A tile ends where a block's columns do, since a part of one would be copied.
    """

    blocks: tuple[tuple[_Numbers, int, _Numbers], ...]
    columns: tuple[_Numbers, ...]

    @classmethod
    def of(cls, visual: torch.Tensor, needed: torch.Tensor, causal: bool) -> _Tiles:
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


def _strongest_by_lse(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, tiles: _Tiles, softmax: Softmax
) -> _Strongest:
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
    some = batch * groups if batch > 1 else max(1, _TILE_BYTES // (at_once * query.element_size()))
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


def _row_blocks(
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
    at_once = max(1, min(_SOFTMAX_ROWS, BLOCK_BYTES // (batch * heads * key.shape[2] * 4)))
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
