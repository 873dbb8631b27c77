"""Counters of pruning: from the scheduler's process into /metrics and the log."""

import base64
import collections
import concurrent.futures
import contextlib
import json
import logging
import re
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForImageTextToText

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from msgspec import msgpack
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from fitprune import PruningRecipe, load_samples
from fitprune._support import assets
from fitprune.families.adapter import adapt
from fitprune.integrations.vllm.metrics import Counts, PruningStatLogger, PruningStats, receive, summary
from helpers.served import free_port, listening
from helpers.vllm_engines import ENVIRONMENT

IMAGE_TOKENS = 144  # of the embedded model
STEP = 256  # tokens; two of its images are more


@pytest.fixture(scope="module")
def recipe():
    """Half of the tokens leave in the middle of the embedded model, and half of these at its end."""
    model = adapt(AutoModelForImageTextToText.from_pretrained(assets.folder("model"))).fingerprint
    last = model.decoder.layers - 1
    return PruningRecipe((1.0,) * 2 + (0.5,) * (last - 2) + (0.25,), model, IMAGE_TOKENS)


def token_layers(recipe, *tokens):
    whole = sum(tokens) * len(recipe.keep)
    return {
        "visual_token_layers": whole,
        "visual_token_layers_pruned": whole - sum(sum(recipe.kept(number)) for number in tokens),
    }


def test_a_step_sends_what_is_new(recipe):
    receive()
    counts = Counts()
    counts.pruned(recipe, [IMAGE_TOKENS, 3])
    counts.dense("longer_than_step")
    counts.dense("longer_than_step")
    counts.hold()
    assert counts.sent_with(None) is None  # vLLM has --disable-log-stats
    message = EngineCoreOutputs(scheduler_stats=counts.sent_with(SchedulerStats(num_running_reqs=2)))
    found = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(message)).scheduler_stats
    expected = {"prompts_pruned": 1, "prompts_dense/longer_than_step": 2, "prompts_held": 1}
    assert found == PruningStats(2, fitprune={**expected, **token_layers(recipe, IMAGE_TOKENS, 3)})
    assert counts.sent_with(SchedulerStats()).fitprune == {}


def test_one_who_does_not_know_the_field_skips_it():
    """Such as vLLM's coordinator of data-parallel engines."""
    sent = msgpack.encode(PruningStats(3, fitprune={"prompts_pruned": 1}))
    assert msgpack.decode(sent, type=SchedulerStats) == SchedulerStats(3)


def test_engines_are_counted_apart_and_logged_together(caplog):
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="unit"))
    logger = PruningStatLogger(config, [0, 1], ["other_media"])
    quiet = PruningStatLogger(config, [1], [], speaks=False)

    def value(name, engine, **more):
        return REGISTRY.get_sample_value(f"fitprune:{name}_total", {"model_name": "unit", "engine": engine, **more})

    assert value("prompts_pruned", "0") == value("prompts_pruned", "1") == 0
    assert value("prompts_dense", "1", reason="other_media") == 0
    logger.record(PruningStats(fitprune={"prompts_pruned": 2, "prompts_dense/other_media": 1}), None, engine_idx=1)
    logger.record(PruningStats(fitprune={"prompts_pruned": 3}), None, engine_idx=0)
    quiet.record(PruningStats(fitprune={"prompts_pruned": 4}), None, engine_idx=1)
    for nothing in (None, SchedulerStats(), PruningStats()):
        logger.record(nothing, None)
    assert (value("prompts_pruned", "0"), value("prompts_pruned", "1")) == (3, 6)
    assert value("prompts_dense", "1", reason="other_media") == 1
    with caplog.at_level(logging.INFO, "vllm.fitprune"):
        for each in (logger, logger, quiet):
            each.log()
    assert [record.getMessage() for record in caplog.records] == [
        "fitprune: 5 prompts pruned, 1 dense (1 other_media), 0 held"
    ]


def test_the_line_says_how_much_leaves():
    total = collections.Counter({
        "prompts_pruned": 120, "visual_token_layers": 1000, "visual_token_layers_pruned": 604, "prompts_held": 14,
        "prompts_dense/longer_than_step": 2, "prompts_dense/other_media": 1,
    })  # fmt: skip
    assert summary(total) == (
        "120 prompts pruned (60% of visual token-layers), 3 dense (2 longer_than_step, 1 other_media), 14 held"
    )


def counters(url):
    """The server's counters of pruning: engines summed, reasons too."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = collections.Counter()
    for line in lines:
        if match := re.fullmatch(r"fitprune:(\w+)_total\{(.*)\} (\S+)", line):
            assert 'model_name="digits"' in match[2]
            found[match[1]] += float(match[3])
    return found


def ask(url, images, text="What is this?"):
    """A chat about so many pictures."""
    files = [Path(sample.image) for sample in load_samples(assets.folder("test"))[:images]]
    data = [base64.b64encode(file.read_bytes()).decode() for file in files]
    content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{each}"}} for each in data]
    content.append({"type": "text", "text": text})
    body = {"model": "digits", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def check_counters(url, recipe, step=STEP):
    """Count chats of one, two and no images at once, on a server whose step has so many tokens."""
    before = counters(url)
    chats = [1] * 12 + [2] * 3 + [0] * 4
    healthy = []
    with concurrent.futures.ThreadPoolExecutor(len(chats)) as threads:
        asked = [threads.submit(ask, url, images) for images in chats]
        while not all(each.done() for each in asked):
            with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
                healthy.append(answer.status)
            time.sleep(0.05)
    for each in asked:
        each.result()
    assert set(healthy) == {200}
    fit = [images for images in chats if 0 < images * IMAGE_TOKENS < step]
    found = counters(url)
    found.subtract(before)
    assert found.pop("prompts_held") <= len(fit)
    assert {name: number for name, number in found.items() if number} == {
        "prompts_pruned": len(fit),
        **token_layers(recipe, *[IMAGE_TOKENS] * sum(fit)),
        **({"prompts_dense": dense} if (dense := sum(images > 0 for images in chats) - len(fit)) else {}),
    }


@contextlib.contextmanager
def server(folder, *options):
    """A server of the embedded model with a recipe beside it."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--served-model-name", "digits", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512",
        "--max-num-batched-tokens", str(STEP), "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(50 * 2**20),
        *options,
    ]  # fmt: skip
    log = folder / "server.log"
    with listening(command, port, {**ENVIRONMENT, "VLLM_LOG_STATS_INTERVAL": "0.5"}, log):
        yield f"http://127.0.0.1:{port}", log


def test_a_server_shows_them(tmp_path, recipe):
    folder = tmp_path / "model"
    shutil.copytree(assets.folder("model"), folder)
    recipe.save_pretrained(folder)
    with server(folder) as (url, log):
        assert counters(url) == dict.fromkeys(counters(url), 0) != {}
        check_counters(url, recipe)
        time.sleep(1.5)  # a line each half second
        check_counters(url, recipe)
    left = token_layers(recipe, IMAGE_TOKENS)
    share = left["visual_token_layers_pruned"] / left["visual_token_layers"]
    assert re.search(
        rf"fitprune: 12 prompts pruned \({share:.0%} of visual token-layers\), 3 dense \(3 longer_than_step\)",
        log.read_text(),
    )
