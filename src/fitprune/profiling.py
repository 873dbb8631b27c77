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

LAYERS_TIMED = 8


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


class _Enough(Exception):
    """Ends a forward whose remaining layers need no timing."""


@contextlib.contextmanager
def timed_layers(adapted: AdaptedModel) -> Iterator[list[LayerTimes]]:
    """Time the decoder's layers in every call of the model; undone on exit.

    Yields:
        A list that each call appends to. On CUDA a call then ends with a synchronisation.
    """
    with _timed(adapted, len(adapted.layers)) as found:
        yield found


@contextlib.contextmanager
def _timed(adapted: AdaptedModel, count: int) -> Iterator[list[LayerTimes]]:
    """Time the first `count` layers; fewer than all end the call by `_Enough`."""
    clock, found = _Clock(adapted.model.device), []
    marks: dict[Any, Any] = {}

    def at(*key: Any) -> Any:
        def hook(*_: Any) -> None:
            marks[key] = clock.mark()

        return hook

    def end(*_: Any) -> None:
        ended = clock.mark()
        if clock.cuda:
            torch.cuda.synchronize(adapted.model.device)
        layers = [clock.between(marks["layer", n], marks["layer end", n]) for n in range(count)]
        mlps = [clock.between(marks["mlp", n], marks["mlp end", n]) for n in range(count)]
        ahead = clock.between(marks["begin",], marks["layer", 0])
        found.append(LayerTimes(ahead, layers, mlps, clock.between(marks["begin",], ended)))

    def stop(*_: Any) -> None:
        end()
        raise _Enough

    # First of all hooks: prune encodes the images in one of its own.
    handles = [adapted.model.register_forward_pre_hook(at("begin"), prepend=True)]
    for number, (layer, mlp) in enumerate(zip(adapted.layers[:count], adapted.mlps, strict=False)):
        for module, name in ((layer, "layer"), (mlp, "mlp")):
            handles.append(module.register_forward_pre_hook(at(name, number)))
            handles.append(module.register_forward_hook(at(f"{name} end", number)))
    if count < len(adapted.layers):
        handles.append(adapted.layers[count - 1].register_forward_hook(stop))
    else:
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
    profiler = Profiler(model, inputs, tokens=tokens)
    for turn in tqdm(range(repeats + 1), desc="profile", unit="round", disable=not progress):
        profiler.round(counts=turn > 0)
    return profiler.profile()


class Profiler:
    """Measures a latency profile round by round, so that rounds of something else can go between; see the function."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, tokens: Sequence[int] | None = None) -> None:
        self._model, self._inputs, self._adapted = model, inputs, adapt(model)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        visual = visual_mask(self._adapted, ids)
        each, longest = visual.sum(1).tolist(), ids.shape[1]
        if not each[0] or len(set(each)) > 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(f"inputs have {each} visual tokens, perhaps padding: give equal prompts with an image")
        self._visual = each[0]
        self._grid = sorted(set(tokens or token_grid(longest)))
        if self._grid[0] < 1 or self._grid[-1] < longest:
            raise ValueError(f"tokens={self._grid}: must be at least 1, and reach the prompt's {longest}")
        text = ids[~visual].view(len(ids), -1)
        self._text = text.repeat(1, -(-self._grid[-1] // text.shape[1]))
        # Layers that are all alike are timed by some of them; their weights are far more than a cache holds.
        shape, layers = self._adapted.shape.decoder, len(self._adapted.layers)
        alike = not (shape.linear_layers or shape.mlps) and len(set(self._adapted.windows)) == 1
        self._timed = min(LAYERS_TIMED, layers) if alike else layers
        self._found: dict[int, list[LayerTimes]] = {n: [] for n in self._grid}
        self._whole: list[LayerTimes] = []
        self._scored: dict[int, list[float]] = {}

    def round(self, *, counts: bool = True) -> None:
        """Measure everything once, each length after another one, as in use; the first round is not to count."""
        with torch.inference_mode():
            for n in self._grid:
                ids = self._text[:, :n]
                with contextlib.suppress(_Enough), _timed(self._adapted, self._timed) as found:
                    self._model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
                if counts:
                    self._found[n] += found
            with timed_layers(self._adapted) as found:
                self._model(**self._inputs, logits_to_keep=1)
            if counts:
                self._whole += found
                for n, seconds in self._scoring_seconds().items():
                    self._scored.setdefault(n, []).append(seconds)

    def profile(self) -> LatencyProfile:
        """Take medians of the rounds so far."""
        scored = {n: statistics.median(seconds) for n, seconds in self._scored.items()}
        mlps = [_mean_of_medians([times.mlps for times in self._found[n]]) for n in self._grid]
        layers = [_mean_of_medians([times.layers for times in self._found[n]]) for n in self._grid]
        batch, longest = self._inputs["input_ids"].shape
        return LatencyProfile(
            model=self._adapted.shape,
            tokens=tuple(self._grid),
            mixer_seconds=tuple(whole - mlp for whole, mlp in zip(layers, mlps, strict=True)),
            mlp_seconds=tuple(mlps),
            removal_seconds=tuple(_interpolated(scored, n) for n in self._grid),
            outside_seconds=statistics.median(times.outside for times in self._whole),
            visual_tokens=self._visual,
            text_tokens=longest - self._visual,
            batch=batch,
            device=device_name(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            provenance=provenance_of(self._model),
        )

    def _scoring_seconds(self) -> dict[int, float]:
        """Tokens of the prompt -> seconds that scoring takes in a layer that so many enter."""
        decoder, text = self._adapted.shape.decoder, self._inputs["input_ids"].shape[1] - self._visual
        found = {}
        for share in (1, 2, 4, 8):
            # All but a share leave in the first layer that lets them, then one in each.
            most = max(self._visual // share, 1)
            kept, left = [], self._visual
            for layer in range(decoder.layers):
                if layer in decoder.prunable:
                    left = most if left > most else max(left - 1, 0)
                kept.append(left / self._visual)
            recipe = PruningRecipe(tuple(kept), self._adapted.shape, self._visual)
            clock = ScoringClock(self._model)
            with prune(self._model, recipe, clock.scorer(recipe.scorer)):
                self._model(**self._inputs, logits_to_keep=1)
            own = clock.seconds()
            found[most + text] = statistics.median(own[1:] or own)  # the first saw all tokens
        return found


def _mean_of_medians(repeats: Sequence[Sequence[float]]) -> float:
    """Mean over layers of the median over repeats."""
    return float(statistics.mean(statistics.median(of_layer) for of_layer in zip(*repeats, strict=True)))


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
