"""Random models at full size against the cost model, as a Markdown table: parameters, sizes, prefill FLOPs, KV bytes.

    python benchmarks/random_models.py

On the meta device: seconds on a laptop, no weights, no download. Configs and published figures, with their sources, are
in tests/helpers/full_sizes.py; tests/behaviour/test_full_sizes.py compares the table's columns.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fitprune.costs import flops
from fitprune.families.config import fingerprint_of
from helpers.full_sizes import FULL_SIZES, TEXT_TOKENS, FullSize, build, hand_flops, prefill

HEADER = (
    "model",
    "parameters: measured / published",
    "layers",
    "hidden",
    "MLP",
    "heads / KV heads x size",
    "visual + text tokens",
    "prefill TFLOPs: measured / cost model / by hand",
    "KV MB: measured / cost model",
)


def row(entry: FullSize) -> tuple[str, ...]:
    """Measure one model."""
    model = build(entry)
    counted, kv_measured = prefill(model, entry.tokens)
    fingerprint = fingerprint_of(model.config)
    decoder, dense = fingerprint.decoder, [0] * fingerprint.decoder.layers
    cost = flops.prefill_flops(fingerprint, entry.visual_tokens, dense, text_after=TEXT_TOKENS)
    kv = flops.kv_bytes(decoder, entry.visual_tokens, dense, text_tokens=TEXT_TOKENS)
    products = (counted, cost.decoder + cost.head, hand_flops(entry.decoder, entry.tokens))
    return (
        entry.name,
        f"{sum(p.numel() for p in model.parameters()):,} / "
        + (f"{entry.parameters:,}" if entry.exact else f"{entry.parameters / 1e9:g}e9"),
        str(decoder.layers),
        str(decoder.hidden),
        str(decoder.intermediate),
        f"{decoder.heads} / {decoder.kv_heads} x {decoder.head_dim}",
        f"{entry.visual_tokens} + {TEXT_TOKENS}",
        " / ".join(f"{value / 1e12:.3f}" for value in products),
        f"{kv_measured / 1e6:.2f} / {kv / 1e6:.2f}",
    )


def main() -> None:
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    for entry in FULL_SIZES:
        print("| " + " | ".join(row(entry)) + " |", flush=True)


if __name__ == "__main__":
    main()
