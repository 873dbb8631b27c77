"""Clocks for a model on its device: of calls, of their layers, of functions inside of them; and its peak of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitprune.families.adapter import AdaptedModel


@dataclasses.dataclass
class LayerTimes:
    """Seconds of one call of the model.

    Attributes:
        ahead: up to the first layer.
        layers: of each layer.
        mlps: of each layer's MLP.
        total: of the whole call.
    """

    ahead: float
    layers: list[float]
    mlps: list[float]
    total: float

    @property
    def outside(self) -> float:
        """Outside of the layers."""
        return self.total - sum(self.layers)


class _Clock:
    """Marks points in time on a device: host clock on a CPU, events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second) / 1e3 if self.cuda else second - first)


@contextlib.contextmanager
def timed_layers(adapted: AdaptedModel, count: int | None = None) -> Iterator[list[LayerTimes]]:
    """Time the decoder's layers in every call of the model; undone on exit.

    Args:
        adapted: the model.
        count: run only the first `count` layers, and after them what follows the last one; by default all run.

    Yields:
        A list that each call appends to. On CUDA a call then ends with a synchronisation.
    """
    clock, times = _Clock(adapted.model.device), list[LayerTimes]()
    layers, marks = list(adapted.layers)[:count], dict[Any, Any]()

    def at(*key: Any) -> Any:
        def hook(*_: Any) -> None:
            marks[key] = clock.mark()

        return hook

    def end(*_: Any) -> None:
        marks["end",] = clock.mark()
        if clock.cuda:
            torch.cuda.synchronize(adapted.model.device)
        by_layer = [clock.between(marks["layer", n], marks["layer end", n]) for n in range(len(layers))]
        by_mlp = [clock.between(marks["mlp", n], marks["mlp end", n]) for n in range(len(layers))]
        ahead = clock.between(marks["begin",], marks["layer", 0])
        times.append(LayerTimes(ahead, by_layer, by_mlp, clock.between(marks["begin",], marks["end",])))

    # First of all hooks: prune encodes the images in one of its own.
    handles = [adapted.model.register_forward_pre_hook(at("begin"), prepend=True)]
    handles.append(adapted.model.register_forward_hook(end))
    for number, (layer, mlp) in enumerate(zip(layers, adapted.mlps, strict=False)):
        for module, name in ((layer, "layer"), (mlp, "mlp")):
            handles.append(module.register_forward_pre_hook(at(name, number)))
            handles.append(module.register_forward_hook(at(f"{name} end", number)))
    if count is not None:
        adapted.decoder.layers = nn.ModuleList(layers)
    try:
        yield times
    finally:
        adapted.decoder.layers = adapted.layers
        for handle in handles:
            handle.remove()


class Stopwatch:
    """Times functions inside of prefills.

    Args:
        model: on whose device they run.
    """

    def __init__(self, model: Any) -> None:
        self._clock = _Clock(model.device)
        self._marks: list[tuple[Any, Any]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that does the same, and is timed."""

        def run(*args: Any) -> Any:
            begin = self._clock.mark()
            result = function(*args)
            self._marks.append((begin, self._clock.mark()))
            return result

        return run

    def seconds(self) -> list[float]:
        """Give the seconds of each run of a timed function since the last call of this, in order."""
        if self._clock.cuda:
            torch.cuda.synchronize()
        seconds = [self._clock.between(*pair) for pair in self._marks]
        self._marks.clear()
        return seconds


def now(model: Any) -> float:
    """Read the clock, once the model's device has done all that it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def medians(rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Take the median over rounds of each of their values, which all rounds have."""
    return {n: statistics.median(values[n] for values in rounds) for n in rounds[0]}


def reset_peak(model: Any) -> None:
    """Begin again to look for the peak of memory."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(model: Any) -> int | None:
    """Give the most memory in use since `reset_peak`, weights included; None where the system does not say."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def device_name(model: Any) -> str:
    """Name the device that a model is on, and how many threads a CPU has for it."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    cpu = _cpu_info()
    names = [line for line in cpu if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    amx = ", AMX" if any("amx_bf16" in line for line in cpu) else ""
    return f"{name}{amx}, {torch.get_num_threads()} threads"


def _cpu_info() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return []
