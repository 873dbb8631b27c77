"""Measure a latency profile: time inside the real model, layer by layer, for prompts of different length."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fitprune.adapters import AdaptedModel, adapt
from fitprune.attention import Softmax, received_attention
from fitprune.flops import DecoderShape
from fitprune.images import visual_mask
from fitprune.profiles import LatencyProfile, token_grid


@dataclasses.dataclass
class LayerTimes:
    """Seconds of one forward.

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
def timed_layers(adapted: AdaptedModel) -> Iterator[list[LayerTimes]]:
    """Time the decoder's layers in every call of the model; undone on exit.

    Yields:
        A list that each call appends to. On CUDA a call then ends with a synchronisation.
    """
    clock, found = _Clock(adapted.model.device), []
    marks: dict[Any, Any] = {}
    count = len(adapted.layers)

    def at(*key: Any) -> Any:
        def hook(*_: Any) -> None:
            marks[key] = clock.mark()

        return hook

    def end(*_: Any) -> None:
        marks["end"] = clock.mark()
        if clock.cuda:
            torch.cuda.synchronize(adapted.model.device)
        layers = [clock.between(marks["layer", n], marks["layer end", n]) for n in range(count)]
        mlps = [clock.between(marks["mlp", n], marks["mlp end", n]) for n in range(count)]
        ahead = clock.between(marks["begin",], marks["layer", 0])
        found.append(LayerTimes(ahead, layers, mlps, clock.between(marks["begin",], marks["end"])))

    handles = [adapted.model.register_forward_pre_hook(at("begin"))]
    for number, (layer, mlp) in enumerate(zip(adapted.layers, adapted.mlps, strict=True)):
        for module, name in ((layer, "layer"), (mlp, "mlp")):
            handles.append(module.register_forward_pre_hook(at(name, number)))
            handles.append(module.register_forward_hook(at(f"{name} end", number)))
    handles.append(adapted.model.register_forward_hook(end))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
