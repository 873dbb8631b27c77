"""Measure a latency profile: time inside the real model, layer by layer, for prompts of different length."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fitprune.adapters import AdaptedModel, adapt
from fitprune.images import visual_mask
from fitprune.measurement import provenance_of
from fitprune.profiles import LatencyProfile, token_grid
from fitprune.pruning import prune
from fitprune.recipe import PruningRecipe
from fitprune.scoring import Scorer, get_scorer
from fitprune.views import LayerView


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

    # First of all hooks: prune encodes the images in one of its own.
    handles = [adapted.model.register_forward_pre_hook(at("begin"), prepend=True)]
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


def profile_latency(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    tokens: Sequence[int] | None = None,
    repeats: int = 3,
    progress: bool = False,
) -> LatencyProfile:
    """Measure what the parts of a prefill take on the model's device, against the number of tokens.

    Layers are timed inside the model, where they find memory and caches as in use: in prompts of text alone, of each
    count of `tokens`. What lies outside of them, and what scoring takes, is timed in the prompt that is given.

    Args:
        model: a supported model.
        inputs: a batch of prompts with an image, all alike, on the model's device.
        tokens: tokens of a sample to measure; by default up to those of `inputs`, closer together where they are few.
        repeats: times that each is measured, after once that does not count. Medians are taken.
        progress: show a progress bar.

    Raises:
        ValueError: `inputs` have no image, rows differ, or `tokens` ends below the prompt's length.
    """
    adapted = adapt(model)
    ids = inputs["input_ids"]
    visual = visual_mask(adapted, ids).sum(1)
    count, longest = int(visual[0]), ids.shape[1]
    mask = inputs.get("attention_mask")
    if not count or bool((visual != count).any()) or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"inputs have {visual.tolist()} visual tokens, perhaps padding: give equal prompts with an image"
        )
    grid = sorted(set(tokens or token_grid(longest)))
    if grid[0] < 1 or grid[-1] < longest:
        raise ValueError(f"tokens={grid}: must be at least 1, and reach the prompt's {longest}")
    text = ids[~visual_mask(adapted, ids)].view(len(ids), -1)
    text = text.repeat(1, -(-grid[-1] // text.shape[1]))
    layers, mlps = [], []
    with torch.inference_mode():
        for n in tqdm(grid, desc="profile", unit="length", disable=not progress):
            with timed_layers(adapted) as found:
                for _ in range(repeats + 1):
                    model(input_ids=text[:, :n], attention_mask=torch.ones_like(text[:, :n]), logits_to_keep=1)
            layers.append(_mean_of_medians([times.layers for times in found[1:]]))
            mlps.append(_mean_of_medians([times.mlps for times in found[1:]]))
        with timed_layers(adapted) as found:
            for _ in range(repeats + 1):
                model(**inputs, logits_to_keep=1)
        scored = _scoring_seconds(model, adapted, inputs, count, repeats)
    return LatencyProfile(
        model=adapted.shape,
        tokens=tuple(grid),
        mixer_seconds=tuple(whole - mlp for whole, mlp in zip(layers, mlps, strict=True)),
        mlp_seconds=tuple(mlps),
        removal_seconds=tuple(_interpolated(scored, n) for n in grid),
        outside_seconds=statistics.median(times.outside for times in found[1:]),
        visual_tokens=count,
        text_tokens=longest - count,
        batch=len(ids),
        device=device_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
        provenance=provenance_of(model),
    )


def _mean_of_medians(repeats: Sequence[Sequence[float]]) -> float:
    """Mean over layers of the median over repeats."""
    return float(statistics.mean(statistics.median(of_layer) for of_layer in zip(*repeats, strict=True)))


def _scoring_seconds(
    model: Any, adapted: AdaptedModel, inputs: Mapping[str, Any], count: int, repeats: int
) -> dict[int, float]:
    """Tokens of the prompt -> seconds that scoring takes in a layer that so many enter."""
    decoder, text = adapted.shape.decoder, inputs["input_ids"].shape[1] - count
    found = {}
    for share in (1, 2, 4, 8):
        # All but a share leave in the first layer that lets them, then one in each.
        most = max(count // share, 1)
        kept, left = [], count
        for layer in range(decoder.layers):
            if layer in decoder.prunable:
                left = max(min(left, most) - (0 if left > most else 1), 0)
            kept.append(left / count)
        recipe = PruningRecipe(tuple(kept), adapted.shape, count)
        seconds = []
        for _ in range(repeats):
            clock = ScoringClock(model)
            with prune(model, recipe, clock.scorer(recipe.scorer)):
                model(**inputs, logits_to_keep=1)
            own = clock.seconds()
            seconds.append(statistics.median(own[1:] or own))  # the first saw all tokens
        found[most + text] = statistics.median(seconds)
    return found


class ScoringClock:
    """Times a scorer inside of pruned prefills."""

    def __init__(self, model: Any) -> None:
        self._clock = _Clock(model.device)
        self._marks: list[tuple[Any, Any]] = []

    def scorer(self, scorer: Any) -> Scorer:
        """Make a scorer that does as this one, and is timed."""
        made = get_scorer(scorer)

        def score(view: LayerView) -> torch.Tensor:
            begin = self._clock.mark()
            result = made.score(view)
            self._marks.append((begin, self._clock.mark()))
            return result

        return dataclasses.replace(made, score=score)

    def seconds(self) -> list[float]:
        """Give the seconds of each time that it scored, in order, and forget them."""
        if self._clock.cuda:
            torch.cuda.synchronize()
        spent = [self._clock.between(*pair) for pair in self._marks]
        self._marks.clear()
        return spent


def _interpolated(known: Mapping[int, float], at: int) -> float:
    """Read a value between known ones, and the nearest beyond them."""
    points = sorted(known)
    right = bisect.bisect_left(points, at)
    if right in (0, len(points)):
        return known[points[min(right, len(points) - 1)]]
    low, high = points[right - 1], points[right]
    return known[low] + (at - low) / (high - low) * (known[high] - known[low])


def device_name(model: Any) -> str:
    """Name the device that a model is on, and how many threads a CPU has for it."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    names = [line for line in _cpu_info() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    amx = ", AMX" if any("amx_bf16" in line for line in _cpu_info()) else ""
    return f"{name}{amx}, {torch.get_num_threads()} threads"


def _cpu_info() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return []
