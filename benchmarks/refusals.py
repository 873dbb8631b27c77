"""Time until the vLLM plug-in refuses a setting: from the start of the server's command to its end.

    python benchmarks/refusals.py

Starts an OpenAI server of the bundled model with a recipe and one setting that cannot be served, for each such setting;
prints seconds, exit code, line and place of the refusal in the output, and the output's last line.
Needs `pip install fitprune[vllm]`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import fit, load_samples, make_batches, measure
from fitprune._support import assets

SETTINGS = {
    "LoRA": ("--enable-lora",),
    "KV connector": ("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'),
}
REFUSAL = "fitprune cannot prune"


def main() -> None:
    source = assets.folder("model")
    model, processor = AutoModelForImageTextToText.from_pretrained(source), AutoProcessor.from_pretrained(source)
    batches = make_batches(load_samples(assets.folder("calibration"), samples=8), processor, batch_size=8)
    with tempfile.TemporaryDirectory() as work:
        recipe = Path(work, "recipe.json")
        fit(measure(model, batches), flops_reduction=0.6).save(recipe)
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source)]
        for name, arguments in SETTINGS.items():
            begin = time.perf_counter()
            done = subprocess.run(
                [*server, "--kv-cache-memory-bytes", str(2**28), *arguments], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, check=False, env={**os.environ, "FITPRUNE_RECIPE": str(recipe)},
            )  # fmt: skip
            seconds, lines = time.perf_counter() - begin, done.stdout.rstrip().splitlines()
            places = [number for number, line in enumerate(lines, 1) if REFUSAL in line]
            print(f"{name}: {seconds:.0f} s, exit code {done.returncode}, refused in lines {places} of {len(lines)}")
            print(f"  last line: {lines[-1]}", flush=True)


if __name__ == "__main__":
    main()
