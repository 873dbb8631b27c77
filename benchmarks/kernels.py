"""Time received attention on a GPU: by the Triton kernels, in blocks of PyTorch, and beside the layer's own attention.

    python benchmarks/kernels.py

Prints medians in milliseconds as a table; one JSON document last. A layer of LLaVA-1.5-7B's sizes in bf16, 32 heads of
128, with prompts of 640 (LLaVA-1.5), 1,088 (LLaVA-HR) and 2,944 tokens (LLaVA-NeXT), 64 of them text. Without a GPU it
ends with status 2.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fitprune.families.images import images_of
from fitprune.scoring import received
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax

HEADS, WIDTH, TEXT_BEFORE, TEXT_AFTER = 32, 128, 20, 44
LENGTHS, BATCHES = (640, 1088, 2944), (1, 8)


def milliseconds(call: Callable[[], object], repeats: int = 30, warm_up: int = 5) -> float:
    """Median time on the GPU of a call."""
    for _ in range(warm_up):
        call()
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def peak_mb(call: Callable[[], object]) -> float:
    """MB that a call holds at most beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured(length: int, batch: int) -> dict[str, float]:
    """Time one size."""
    query, key, value = torch.randn(3, batch, HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16)
    visual = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
    visual[:, TEXT_BEFORE : length - TEXT_AFTER] = True
    image, question, softmax = images_of(visual), text_after(visual, None), Softmax(WIDTH**-0.5)

    def received() -> object:
        return received_attention(query, key, image, question, softmax)

    figures: dict[str, float] = {"tokens": length, "batch": batch}
    figures["sdpa_ms"] = milliseconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    figures["kernels_ms"], figures["kernels_mb"] = milliseconds(received), peak_mb(received)
    fused, received._fused = received._fused, lambda *_: False
    try:
        figures["blocks_ms"], figures["blocks_mb"] = milliseconds(received), peak_mb(received)
    finally:
        received._fused = fused
    return figures


def main() -> None:
    if not torch.cuda.is_available():
        print("this needs a GPU: it times CUDA kernels", file=sys.stderr)
        sys.exit(2)
    probe = torch.empty(1, 1, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    if not received._fused(probe, Softmax(1.0)):
        print("this needs Triton and a GPU of compute capability 8.0 or more", file=sys.stderr)
        sys.exit(2)
    print("| tokens | batch | sdpa, ms | kernels, ms | blocks, ms | kernels / sdpa | kernels, MB | blocks, MB |")
    print("|" + "---|" * 8)
    rows = []
    for batch in BATCHES:
        for length in LENGTHS:
            row = measured(length, batch)
            rows.append(row)
            times = " | ".join(f"{row[name]:.3f}" for name in ("sdpa_ms", "kernels_ms", "blocks_ms"))
            memory = " | ".join(f"{row[name]:.1f}" for name in ("kernels_mb", "blocks_mb"))
            print(f"| {length} | {batch} | {times} | {row['kernels_ms'] / row['sdpa_ms']:.2f} | {memory} |", flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
