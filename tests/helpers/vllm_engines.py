"""Engines of vLLM that live for several jobs, and are shared by the tests that start them with the same options.

An engine takes its process whole, and importing vLLM takes longer than starting a small engine. So a process per model
runner imports it once and forks an engine from itself for each set of options (integrations/vllm_engine.py).
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

HERE = Path(__file__).parent
RUNNERS = ("v1", "v2")
ALIVE = 4  # engines at a time
PATIENCE = 900  # seconds for one job
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FITPRUNE_")},
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def runner_environment(runner):
    """What makes vLLM take a model runner; without a GPU, Triton's interpreter runs the second one's kernels."""
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": str(RUNNERS.index(runner))}
    if runner == "v2" and not torch.cuda.is_available():
        path = filter(None, [str(HERE / "interpreter"), os.environ.get("PYTHONPATH")])
        chosen |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    return chosen


class Engine:
    """One engine.

    Args:
        connection: to its process.
        log: the file that it writes to.
    """

    def __init__(self, connection, log):
        self._connection, self._log = connection, log

    @property
    def log(self):
        return self._log.read_text()

    def answer(self, prompts, **sampling):
        """Answer [text, image files] or vLLM's own prompts, all at once: ids, logprobs, cached and others, as lists.

        Greedily, with the log-probability of each token, 8 tokens at most, if `sampling` does not say otherwise.
        """
        prompts = [each if isinstance(each, dict) else prompt_of(*each) for each in prompts]
        sampling = {"temperature": 0, "max_tokens": 8, "logprobs": 0, **sampling}
        return SimpleNamespace(**self.call("generate", prompts, **sampling))

    def call(self, method, *args, **kwargs):
        """Call a method of vllm.LLM."""
        self._connection.send((method, args, kwargs))
        return self.receive()

    def receive(self):
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
        raise RuntimeError(f"the engine ended, or took over {PATIENCE} seconds:\n{self.log[-6000:]}")

    def close(self):
        self._connection.close()


def prompt_of(text, files=()):
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    return {"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text}


class Engines:
    """Starts engines, and keeps the last few."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="engines-")
        self._roots, self._alive, self._count = {}, OrderedDict(), 0

    def __call__(self, model, recipe=None, runner="v1", environment=None, **options):
        """Give the engine of these options, started now or before.

        Args:
            model: folder.
            recipe: file; None for none.
            runner: "v1" or "v2".
            environment: further variables.
            options: of vllm.LLM.

        Raises:
            RuntimeError: with the end of its log, if it does not start.
        """
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **({"FITPRUNE_RECIPE": str(recipe)} if recipe else {})}
        variables |= environment or {}
        key = repr((str(model), runner, sorted(variables.items()), sorted(options.items())))
        if key not in self._alive:
            while len(self._alive) >= ALIVE:
                self._alive.popitem(last=False)[1].close()
            self._alive[key] = self._start(str(model), runner, variables, options)
        self._alive.move_to_end(key)
        return self._alive[key]

    def _start(self, model, runner, variables, options):
        root, socket = self._root(runner)
        self._count += 1
        log = Path(self._folder.name, f"{self._count}.log")
        log.touch()
        root.stdin.write("\n")
        root.stdin.flush()
        connection = None
        while connection is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                connection = Client(socket, "AF_UNIX")
            if root.poll() is not None:
                raise RuntimeError(f"vLLM is not imported:\n{Path(socket + '.log').read_text()[-6000:]}")
            time.sleep(0.05)
        connection.send((model, options, variables, str(log)))
        engine = Engine(connection, log)
        engine.receive()
        return engine

    def _root(self, runner):
        socket = f"{self._folder.name}/{runner}"
        if runner not in self._roots:
            with open(socket + ".log", "w") as log:
                command = [sys.executable, str(HERE.parent / "integrations" / "vllm_engine.py"), socket]
                self._roots[runner] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                    env={**ENVIRONMENT, **runner_environment(runner)},
                )  # fmt: skip
        return self._roots[runner], socket

    def close(self):
        for engine in self._alive.values():
            engine.close()
        for root in self._roots.values():
            root.stdin.close()
            root.wait(60)
        self._folder.cleanup()
