"""Time a 1,024-pixel image through LLaVA-HR-7B at full size, dense and with the authors' 60% recipe, in turn.

    python benchmarks/llava_hr.py

Random weights in bf16 on the CPU (15 GB of memory, some minutes): speed, not answers. Prints a table, then one JSON
document. Prefill: image through both towers, 1,024 visual and 64 text tokens through the decoder, one row of logits.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import statistics
import time

import numpy as np
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fitprune import PruningRecipe, prune
from fitprune.costs.flops import prefill_flops
from fitprune.families.config import fingerprint_of
from fitprune.families.llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration
from fitprune.speed.in_turn import decode_seconds, prefill_seconds

TEXT_TOKENS = 64
ROUNDS = 3


def inputs_of(config: LlavaHrConfig) -> dict[str, torch.Tensor]:
    """A random photograph through LLaVA's image processor, in front of random text."""
    size = config.vision_config.input_image_size
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (768, 1024, 3), dtype=np.uint8))
    images = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = images(photo, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
    text = torch.from_numpy(generator.integers(3, 32000, TEXT_TOKENS))
    ids = torch.cat([text[:35], torch.full((config.image_seq_length,), config.image_token_id), text[35:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def main() -> None:
    config = LlavaHrConfig()
    started = time.perf_counter()
    torch.manual_seed(0)
    model = LlavaHrForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    built = time.perf_counter() - started
    recipe = PruningRecipe.published("llava-hr-7b", 60)
    inputs = inputs_of(config)
    tower = prefill_tower(model, inputs["pixel_values"])
    blocks = [contextlib.nullcontext, lambda: prune(model, recipe)]
    dense, pruned = (statistics.median(s) for s in prefill_seconds(model, inputs, blocks, repeats=ROUNDS))
    steps = [statistics.median(s) for s in decode_seconds(model, inputs, blocks, steps=8, repeats=2)]
    fingerprint, visual = fingerprint_of(config), config.image_seq_length
    ideal = [
        prefill_flops(fingerprint, visual, removed, text_before=35, text_after=TEXT_TOKENS - 35).total
        for removed in ([0] * fingerprint.decoder.layers, recipe.counts(visual))
    ]
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds to build": round(built, 1),
        "seconds of the vision tower": round(tower, 2),
        "prefill seconds, dense": round(dense, 2),
        "prefill seconds, 60%": round(pruned, 2),
        "prefill speed-up": round(dense / pruned, 2),
        "prefill TFLOPs, dense": round(ideal[0] / 1e12, 2),
        "prefill TFLOPs, 60%": round(ideal[1] / 1e12, 2),
        "ratio of TFLOPs": round(ideal[0] / ideal[1], 2),
        "decode seconds a step, dense": round(steps[0], 3),
        "decode seconds a step, 60%": round(steps[1], 3),
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    for name, value in figures.items():
        print(f"{name:32} {value:,}" if isinstance(value, (int, float)) else f"{name:32} {value}")
    print(json.dumps(figures))


def prefill_tower(model: LlavaHrForConditionalGeneration, pixels: torch.Tensor) -> float:
    """Median seconds of both towers and the projector for one image."""
    seconds = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            started = time.perf_counter()
            model.get_image_features(pixels)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
