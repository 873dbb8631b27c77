"""Received attention on a GPU: Triton kernels that hold tiles of logits in registers and nothing of rows x keys.

`received.received_attention` imports this module where it computes on CUDA and Triton is installed. Importing it
imports Triton, which nothing else of the library needs.

Shapes as in `received`: B batch, H query heads, G key/value heads, Q queries, K keys, D head size; the last Q keys are
the queries' own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import subprocess

import torch
import triton
import triton.language as tl

logger = logging.getLogger(__name__)

# At most this number of programs share the column sums of one block of keys. One sample of 3,000 tokens has 47 blocks
# of keys and a large GPU more than a hundred processors; and the first keys are seen by all rows, the last by few.
# The number does not depend on the batch, so that a sample's sums do not either.
SPLITS = 16


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton can compile for a CUDA device; where it cannot, a warning is logged once.

    The kernels' sizes are for NVIDIA's GPUs from compute capability 8.0 on. Triton builds its launcher with a C
    compiler and Python's headers, which not every machine with a GPU has.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        triton.runtime.driver.active.get_current_target()  # builds what it launches with
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        logger.warning("attention is scored without Triton, which is slower: Triton does not work here: %s", error)
        return False
    return True


def launch_sizes(width: int, element_size: int) -> dict[str, dict[str, int]]:
    """Choose tile and launch sizes of each kernel for heads of `width` numbers of `element_size` bytes.

    A tile of queries and one of keys must fit a processor's shared memory, 99 KiB on the smaller ones; where two pairs
    fit, one is loaded while the other is multiplied. Products of fp32 are computed without tensor cores, and larger
    tiles or fewer warps than these spill registers by the kilobyte (ptxas for 8.0 and 9.0). They were not tuned by
    time.
    """
    padded = max(16, triton.next_power_of_2(width))  # tl.dot's smallest
    wide = padded * element_size
    block = 64 if element_size < 4 else 32
    tile = {"WIDTH": width, "PADDED": padded, "BLOCK": block, "num_stages": 2 if block * wide <= 2**14 else 1}
    return {
        "statistics": {**tile, "num_warps": 4 if wide <= 512 else 8},
        "sums": {**tile, "num_warps": 8 if block == 64 or wide > 512 else 4},
    }


def received_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over rows, by weight, the strongest of all heads' causal attention weights.

    Args:
        query: [B, H, Q, D], fp32, bf16 or fp16, any strides. D is at most 256.
        key: [B, G, K, D], of the same type, any strides; H is a multiple of G, K at least Q.
        image: [B, Q] int64, number of the image that each token belongs to, -1 for text and padding.
        row_weight: [B, 2, Q] fp32, not negative: 0 for the sum over rows of a column's own image, 1 for that over all.
        scaling: as in `fitprune.scoring.softmax.Softmax`, like the next four; there is no mask.
        valid: as there.
        window: as there.
        softcap: as there.
        sinks: as there.

    Returns:
        [B, 2, Q] fp32; columns that hold no visual token are undefined. A row that sees no key adds
        nothing. Two runs give the same bits, and so does a sample alone or in a batch: every sum has a fixed order.

    Source: arXiv:2205.14135 for the softmax in tiles; the maximum over heads is taken before the exponential, of
    logits less their row's log-sum-exp.
    """
    batch, heads, length, width = query.shape
    keys = key.shape[2]
    sizes = launch_sizes(width, query.element_size())
    blocks = triton.cdiv(length, sizes["sums"]["BLOCK"])
    splits = min(SPLITS, blocks)
    shapes = ((batch, heads, length), (splits, batch, 2, length), (batch, 2, length))
    lse, parts, received = (torch.empty(shape, device=query.device, dtype=torch.float32) for shape in shapes)
    # Only queries and keys are large: the others are copied where they are not contiguous, which spares strides.
    image, row_weight = image.contiguous(), row_weight.contiguous()
    valid = None if valid is None else valid.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    states = (query, key, *query.stride(), *key.stride(), row_weight, valid)
    layer = {"HEADS": heads, "GROUP": heads // key.shape[1], "WINDOW": window, "SOFTCAP": softcap}
    # Triton launches on the current device, and a layer may be on another. Its interpreter has none.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        _row_statistics[(blocks, batch * heads)](
            *states, sinks, lse, length, keys, scaling, **layer, **sizes["statistics"]
        )
        _column_sums[(blocks, batch, splits)](
            *states, image, lse, parts, length, keys, scaling, **layer, **sizes["sums"]
        )
        _sum_parts[(triton.cdiv(received.numel(), 1024),)](parts, received, splits, received.numel(), BLOCK=1024)
    return received


@triton.jit
def _logits(q, k, scaling, SOFTCAP: tl.constexpr):
    """Products of a tile of queries [BLOCK, PADDED] and one of keys [PADDED, BLOCK], after the soft cap: fp32."""
    logits = tl.dot(q, k, input_precision="ieee") * scaling
    if SOFTCAP is not None:
        # tanh x = 1 - 2 / (exp(2 x) + 1), which is right where the exponential is 0 or infinite.
        logits = SOFTCAP * (1 - 2 / (tl.exp(2 * (logits / SOFTCAP)) + 1))
    return logits


@triton.jit
def _visible(rows, columns, valid, sample, past, keys, WINDOW: tl.constexpr):
    """Which of the keys `columns` [BLOCK] each of the rows [BLOCK] sees: [BLOCK, BLOCK]."""
    own = past + rows[:, None]
    visible = columns[None, :] <= own
    if WINDOW is not None:
        visible = visible & (columns[None, :] > own - WINDOW)
    if valid is not None:
        real = tl.load(valid + sample * keys + columns, mask=columns < keys, other=0) != 0
        visible = visible & real[None, :]
    return visible


@triton.jit(do_not_specialize=["length", "keys"])
def _row_statistics(
    query, key, query_b, query_h, query_r, query_d, key_b, key_h, key_r, key_d,
    row_weight, valid, sinks, lse, length, keys, scaling,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of each row's logits, sink included, to `lse` [B, H, Q]; 0 for a row that sees no key.

    Grid: blocks of rows, B x H. Blocks without a row that has a weight are left unwritten.
    """
    first_row = tl.program_id(0) * BLOCK
    sample = (tl.program_id(1) // HEADS).to(tl.int64)  # offsets within one sample fit 32 bits, not those of a batch
    head = tl.program_id(1) % HEADS
    rows = first_row + tl.arange(0, BLOCK)
    there = rows < length
    weights = row_weight + sample * 2 * length + rows
    weight = tl.load(weights, mask=there, other=0.0) + tl.load(weights + length, mask=there, other=0.0)
    if tl.sum(weight, 0) == 0:
        return

    past = keys - length
    inside = tl.arange(0, PADDED)
    q_at = query + sample * query_b + head * query_h + rows[:, None] * query_r + inside[None, :] * query_d
    q = tl.load(q_at, mask=there[:, None] & (inside[None, :] < WIDTH), other=0.0)
    key += sample * key_b + (head // GROUP) * key_h
    top = tl.full([BLOCK], -3.4e38, tl.float32)  # not -inf, whose difference to itself is NaN
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    if WINDOW is not None:
        start = tl.maximum(past + first_row - WINDOW + 1, 0) // BLOCK * BLOCK
    for first in range(start, tl.minimum(past + first_row + BLOCK, keys), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        k_at = key + columns[None, :] * key_r + inside[:, None] * key_d
        k = tl.load(k_at, mask=(columns[None, :] < keys) & (inside[:, None] < WIDTH), other=0.0)
        visible = _visible(rows, columns, valid, sample, past, keys, WINDOW)
        logits = tl.where(visible, _logits(q, k, scaling, SOFTCAP), -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(top, sink)
        total = total * tl.exp(top - higher) + tl.exp(sink - higher)
        top = higher
    log_sum = tl.where(total > 0, top + tl.log(total), 0.0)
    tl.store(lse + (sample * HEADS + head) * length + rows, log_sum, mask=there)


@triton.jit(do_not_specialize=["length", "keys"])
def _column_sums(
    query, key, query_b, query_h, query_r, query_d, key_b, key_h, key_r, key_d,
    row_weight, valid, image, lse, parts, length, keys, scaling,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what each own key receives from this program's blocks of rows to `parts` [splits, B, 2, Q].

    Grid: blocks of own keys, B, splits. A program takes every splits-th block of rows from its keys' own block on.
    """
    first_column = tl.program_id(0) * BLOCK
    sample = tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    past = keys - length
    inside = tl.arange(0, PADDED)
    own = first_column + tl.arange(0, BLOCK)  # counted from the first own key
    k_there = (own[None, :] < length) & (inside[:, None] < WIDTH)
    query += sample * query_b
    key += sample * key_b
    lse += sample * HEADS * length
    row_weight += sample * 2 * length
    image += sample * length
    column_image = tl.load(image + own, mask=own < length, other=-1)
    from_own = tl.zeros([BLOCK], tl.float32)
    from_all = tl.zeros([BLOCK], tl.float32)
    end = length
    if WINDOW is not None:
        end = tl.minimum(end, first_column + BLOCK - 1 + WINDOW)  # later rows see none of these keys
    for first_row in range(first_column + split * BLOCK, end, splits * BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        there = rows < length
        own_weight = tl.load(row_weight + rows, mask=there, other=0.0)
        all_weight = tl.load(row_weight + length + rows, mask=there, other=0.0)
        if tl.sum(own_weight + all_weight, 0) > 0:
            best = tl.full([BLOCK, BLOCK], -float("inf"), tl.float32)
            for head in range(HEADS):
                q_at = query + head * query_h + rows[:, None] * query_r + inside[None, :] * query_d
                q = tl.load(q_at, mask=there[:, None] & (inside[None, :] < WIDTH), other=0.0)
                k_at = key + (head // GROUP) * key_h + (past + own)[None, :] * key_r + inside[:, None] * key_d
                k = tl.load(k_at, mask=k_there, other=0.0)
                row_lse = tl.load(lse + head * length + rows, mask=there, other=0.0)
                best = tl.maximum(best, _logits(q, k, scaling, SOFTCAP) - row_lse[:, None])
            # No head sees what another does not: the mask is applied once. Rows without a weight may hold anything.
            counted = (
                _visible(rows, past + own, valid, sample, past, keys, WINDOW) & (own_weight + all_weight > 0)[:, None]
            )
            strongest = tl.where(counted, tl.exp(best), 0.0)
            from_all += tl.sum(strongest * all_weight[:, None], 0)
            row_image = tl.load(image + rows, mask=there, other=-1)
            same = row_image[:, None] == column_image[None, :]
            from_own += tl.sum(tl.where(same, strongest, 0.0) * own_weight[:, None], 0)
    samples = tl.num_programs(1)
    parts += (split * samples + sample) * 2 * length + own
    tl.store(parts, from_own, mask=own < length)
    tl.store(parts + length, from_all, mask=own < length)


@triton.jit(do_not_specialize=["splits", "count"])
def _sum_parts(parts, received, splits, count, BLOCK: tl.constexpr):
    """Sum `parts` [splits, count] into `received` [count], in order. Grid: blocks of numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + at, mask=at < count, other=0.0)
    tl.store(received + at, total, mask=at < count)
