"""Serving by vLLM, dense and pruned: throughput and time to first token, of an OpenAI server on loopback under load.

    python benchmarks/serving.py -o FILE [--requests 40] [--concurrency 4] [--rounds 2]

Builds a LLaVA of about 1.5 billion parameters with random weights in bf16 (CLIP ViT-L/14 at 336 pixels, a Llama of 16
layers of 2,048), fits recipes to an image of noise, and starts a server after another: dense, 60%, 80%, round after
round. A client keeps n chats open, each with an image of its own, and reads the streamed answers. Ratios are
against dense in the same round. Needs `pip install fitprune[vllm]`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fitprune import fit, measure
from fitprune._support import assets
from fitprune.speed.clocks import device_name

QUESTION = "What is the number of digits, and which colour does the largest of them have, row by row?"
PLAIN = ("--enforce-eager", "--no-enable-prefix-caching", "--no-enable-chunked-prefill")  # the same for all


def build(folder: Path) -> str:
    """Write the model, and recipes of 60 and 80% beside its folder; return the device's name."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=512, max_position_embeddings=4096, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14,
        ),
        image_token_index=3, image_seq_length=576, dtype="bfloat16",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(assets.folder("model"))
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    # The tower's older name, which vLLM asks for.
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=picture(0), return_tensors="pt").to(torch.bfloat16)
    stats = measure(model, [inputs])
    for budget in (60, 80):
        fit(stats, flops_reduction=budget / 100, max_removal_layers=8).save(folder.parent / f"{budget}.json")
    return device_name(model)


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (336, 336, 3), dtype=np.uint8))


@contextlib.contextmanager
def server(folder: Path, recipe: Path | None, log: Path) -> Iterator[str]:
    """Serve the model; give the API's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", "1024",
        "--max-num-batched-tokens", "4096", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**30), *PLAIN,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "FITPRUNE_RECIPE"}
    if recipe is not None:
        environment["FITPRUNE_RECIPE"] = str(recipe)
    with open(log, "w", encoding="utf-8") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(600):
            if running.poll() is not None:
                raise SystemExit(f"the server did not start: see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.terminate()
        running.wait(60)


async def load(url: str, requests: int, concurrency: int, tokens: int, first: int) -> dict[str, Any]:
    """Send chats, n at a time, and say what came of them."""
    from openai import AsyncOpenAI  # comes with vLLM; --help works without

    async def ask(number: int) -> tuple[float, int]:
        async with limit:
            begin, new_tokens, arrived = time.perf_counter(), 0, 0.0
            data = io.BytesIO()
            picture(number).save(data, "PNG")
            link = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
            content: Any = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": QUESTION}]
            stream = await client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": content}], stream=True, temperature=0,
                max_tokens=tokens, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for part in stream:
                if part.choices and not arrived:
                    arrived = time.perf_counter() - begin
                if part.usage:
                    new_tokens = part.usage.completion_tokens
            return arrived, new_tokens

    limit = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(ask(first + n) for n in range(2)))  # to warm up
        begin = time.perf_counter()
        done = await asyncio.gather(*(ask(first + 2 + n) for n in range(requests)))
        seconds = time.perf_counter() - begin
    waits = sorted(wait for wait, _ in done)
    return {
        "requests": sum(new_tokens == tokens for _, new_tokens in done),
        "seconds": seconds,
        "requests per second": requests / seconds,
        "first token, median s": statistics.median(waits),
        "first token, 90th percentile s": waits[int(0.9 * len(waits))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--requests", type=int, default=40, help="to each server")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        folder.mkdir()
        device = build(folder)
        rounds_of: dict[str, list[dict[str, Any]]] = {"dense": [], "60%": [], "80%": []}
        for turn in range(args.rounds):
            for name, rounds in rounds_of.items():
                recipe = None if name == "dense" else Path(work, f"{name[:-1]}.json")
                with server(folder, recipe, Path(work, "server.log")) as url:
                    first = 1000 * turn
                    rounds.append(asyncio.run(load(url, args.requests, args.concurrency, args.tokens, first)))
                dense, own = rounds_of["dense"][-1], rounds[-1]
                own["throughput over dense"] = own["requests per second"] / dense["requests per second"]
                own["first token over dense"] = own["first token, median s"] / dense["first token, median s"]
                print(name, {what: round(value, 3) for what, value in own.items()}, flush=True)
                arguments = {name: value for name, value in vars(args).items() if name != "output"}
                result = {"device": device, "arguments": arguments, "rounds": rounds_of}
                Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
