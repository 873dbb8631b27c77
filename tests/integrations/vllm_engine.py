"""Engines of vLLM, each in a process of its own: what helpers/vllm_engines.py starts.

    python vllm_engine.py SOCKET

imports vLLM once, then starts an engine for each line that it reads, as a fork that asks SOCKET for its work. It ends
when nobody writes any more.
"""

import contextlib
import functools
import os
import socket
import sys
import traceback
from collections import Counter
from multiprocessing.connection import Connection

import prometheus_client
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def counters():
    """Those of vLLM by name, and of fitprune, "fitprune:NAME"; "/REASON" is added where there is one."""
    found = Counter()
    for metric in prometheus_client.REGISTRY.collect():
        for sample in metric.samples:
            if metric.type == "counter" and sample.name.endswith("_total"):
                name, reason = metric.name.removeprefix("vllm:"), sample.labels.get("reason")
                found[f"{name}/{reason}" if reason else name] += sample.value
    return found


def token_logprobs(ids, each):
    return [None if there is None else there[token].logprob for token, there in zip(ids, each or [], strict=False)]


def generate(llm, prompts, **sampling):
    """Answers to prompts in their order, and by how much counters grew."""
    if structure := sampling.pop("structured_outputs", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**structure)
    for prompt in prompts:
        if "encoded" in prompt:  # an array, since tensors do not go through the connection
            prompt["multi_modal_data"] = {"image": torch.from_numpy(prompt.pop("encoded"))}
    before = counters()
    done = llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False)
    after = counters()
    answers = [each.outputs[0] for each in done]
    return {
        "ids": [list(answer.token_ids) for answer in answers],
        "samples": [[list(answer.token_ids) for answer in each.outputs] for each in done],
        "texts": [answer.text for answer in answers],
        "logprobs": [token_logprobs(answer.token_ids, answer.logprobs) for answer in answers],
        "prompt_logprobs": [token_logprobs(each.prompt_token_ids, each.prompt_logprobs) for each in done],
        "cached": [each.num_cached_tokens for each in done],
        "counters": {name: after[name] - before[name] for name in after},
    }


def interrupted(llm, prompts, steps, how, **sampling):
    """Answers where after a few steps every other request is aborted, or the engine sleeps, keeps them and wakes up."""
    engine, done = llm.llm_engine, {}
    names = llm.enqueue(prompts, SamplingParams(**sampling), use_tqdm=False)

    def step():
        done.update({int(each.request_id): list(each.outputs[0].token_ids) for each in engine.step() if each.finished})

    for _ in range(steps):
        step()
    if how == "abort":
        engine.abort_request(names[::2], internal=True)
    else:
        llm.sleep(mode="keep")
        llm.wake_up()
    while engine.has_unfinished_requests():
        step()
    return [done[number] for number in sorted(done)]


OWN = {"generate": generate, "interrupted": interrupted}


def serve(connection, model, options, environment, log):
    """Run one engine until its connection ends."""
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    llm = LLM(model, disable_log_stats=False, **options)
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            method, args, kwargs = connection.recv()
            call = functools.partial(OWN[method], llm) if method in OWN else getattr(llm, method)
            connection.send(call(*args, **kwargs))
    llm.llm_engine.engine_core.shutdown()


def main():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    listener.settimeout(60)
    for _ in sys.stdin:
        if os.fork():
            continue
        status = 1
        try:
            connection = Connection(listener.accept()[0].detach())
            serve(connection, *connection.recv())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os._exit(0)  # at once: Python would take seconds to clear vLLM away


if __name__ == "__main__":
    main()
