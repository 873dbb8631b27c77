"""The vLLM plug-in in an OpenAI server that is started with its model, and a recipe in the environment, alone."""

import asyncio
import base64
import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from openai import AsyncOpenAI

from fitprune import load_samples
from fitprune._support import assets
from helpers.served import by_transformers, chat, free_port, in_text, listening
from helpers.vllm_engines import ENVIRONMENT, runner_environment

SAMPLES = 80  # of one image; and a quarter as many long texts
CHATS = 500
ROOM = ["--dtype", "float32", "--kv-cache-memory-bytes", str(100 * 2**20)]  # for exact answers on a small machine
PREFACE = "Answer in one word. " * 50


@contextlib.contextmanager
def server(folder, runner):
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), *ROOM]
    environment = {**ENVIRONMENT, **runner_environment(runner), "FITPRUNE_RECIPE": str(folder / "60.json")}
    log = folder / f"server-{runner}.log"
    with listening(command, port, environment, log):
        assert ("Using V2 Model Runner" in log.read_text()) == (runner == "v2")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def serving(digits, runner):
    with server(digits, runner) as url:
        yield url, str(digits / "model")


@pytest.fixture(scope="module")
def questions(digits):
    """(messages, the right answer): four of an image, then a text, in turns."""
    samples = load_samples(assets.folder("test"))[:SAMPLES]
    asked = [[chat(sample.text, 1), [str(sample.image)]] for sample in samples]
    texts = [PREFACE + sample.text for sample in samples[: SAMPLES // 4]]
    right = by_transformers([*asked, *([chat(text), []] for text in texts)], digits / "60.json")
    right = [in_text(ids) for ids in right.ids]
    messages = []
    for sample in samples:
        data = base64.b64encode(Path(sample.image).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        messages.append([{"role": "user", "content": [image, {"type": "text", "text": sample.text}]}])
    pairs = list(zip(messages, right, strict=False))
    for n, text in enumerate(texts):
        pairs.insert(5 * n + 4, ([{"role": "user", "content": text}], right[SAMPLES + n]))
    return pairs


def metric(url, name):
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def test_a_chat_by_curl(serving, questions, tmp_path):
    url, model = serving
    messages, right = questions[0]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}
    (tmp_path / "body.json").write_text(json.dumps(body))
    command = ["curl", "-sS", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", f"@{tmp_path}/body.json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == right


def test_the_server_loses_no_request(serving, questions):
    """500 streamed chats, 24 at a time, every tenth given up after its first token: all others are answered right."""
    url, model = serving

    async def ask(client, limit, number):
        messages, right = questions[number % len(questions)]
        said = ""
        async with limit:
            stream = await client.chat.completions.create(
                model=model, messages=messages, stream=True, temperature=0, max_tokens=8
            )
            async for part in stream:
                said += part.choices[0].delta.content or ""
                if number % 10 == 3 and said:
                    await stream.close()
                    return None
        return number, said.strip(), right

    async def ask_all():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            limit = asyncio.Semaphore(24)
            return await asyncio.gather(*(ask(client, limit, number) for number in range(CHATS)))

    answers = [each for each in asyncio.run(ask_all()) if each is not None]
    assert len(answers) == 0.9 * CHATS
    assert [(number, said, right) for number, said, right in answers if said != right] == []
    assert metric(url, "vllm:prefix_cache_hits_total") > 0
