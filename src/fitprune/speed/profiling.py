"""Measure a latency profile: time inside the real model, layer by layer, for prompts of different length."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fitprune.costs.latency import LatencyProfile, token_grid
from fitprune.engine.choose import choose_by, quotas_by
from fitprune.engine.remover import removing
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.images import visual_mask
from fitprune.families.provenance import provenance_of
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer

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
    for _ in tqdm(range(repeats + 1), desc="profile", unit="round", disable=not progress or None):
        profiler.round()
    return profiler.profile()


def require_inputs(inputs: Any) -> None:
    """Refuse what is no batch of a processor.

    Raises:
        ValueError: it is no mapping with `input_ids`.
    """
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise ValueError(f"inputs is a {type(inputs).__name__}: must be a processor's output, with 'input_ids'")


class Profiler:
    """Measures a latency profile round by round, so that rounds of something else can go between; see the function."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, tokens: Sequence[int] | None = None) -> None:
        require_inputs(inputs)
        self._inputs, self._adapted = inputs, adapt(model)
        self._model = self._adapted.model
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        visual = visual_mask(self._adapted, ids)
        each, longest = visual.sum(1).tolist(), ids.shape[1]
        if not each[0] or len(set(each)) > 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(f"inputs have {each} visual tokens, perhaps padding: give equal prompts with an image")
        self._visual = each[0]
        self.grid = sorted(set(tokens or token_grid(longest)))
        if self.grid[0] < 1 or self.grid[-1] < longest:
            raise ValueError(f"tokens={self.grid}: must be at least 1, and reach the prompt's {longest}")
        text = ids[~visual].view(len(ids), -1)
        self._text = text.repeat(1, -(-self.grid[-1] // text.shape[1]))
        # Layers that are all alike are timed by some of them; their weights are far more than a cache holds.
        shape, layers = self._adapted.fingerprint.decoder, len(self._adapted.layers)
        alike = not (shape.linear_layers or shape.mlps) and len(set(self._adapted.windows)) == 1
        self._timed = min(LAYERS_TIMED, layers) if alike else layers
        self._rounds: list[_Round] = []

    def round(self) -> None:
        """Measure everything once more."""
        self.begin()
        self.measure(self.grid)

    def begin(self, *, removal: bool = True) -> None:
        """Begin a round: measure what lies outside of layers, and, in one round at least, what removal takes."""
        self._rounds.append(_Round())
        with torch.inference_mode():
            with timed_layers(self._adapted) as found:
                self._model(**self._inputs, logits_to_keep=1)
            self._rounds[-1].outside = found[0].outside
            if removal:
                self._rounds[-1].removal = self._removal_seconds()

    def measure(self, tokens: Sequence[int]) -> None:
        """Measure some of the grid's lengths for the present round, each after another one, as in use."""
        with torch.inference_mode():
            for n in tokens:
                ids = self._text[:, :n]
                with contextlib.suppress(_Enough), _timed(self._adapted, self._timed) as found:
                    self._model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
                self._rounds[-1].layers[n] = statistics.mean(found[0].layers)
                self._rounds[-1].mlps[n] = statistics.mean(found[0].mlps)

    def profile(self, rounds: slice = slice(1, None)) -> LatencyProfile:
        """Take medians over complete rounds, by default without the first, which is to warm up."""
        chosen = self._rounds[rounds]
        # Within a round means, not medians: a prefill is the sum of its layers, slow ones too.
        layers = _medians([r.layers for r in chosen])
        mlps = _medians([r.mlps for r in chosen])
        removal = _medians([r.removal for r in chosen if r.removal] or [r.removal for r in self._rounds if r.removal])
        batch, longest = self._inputs["input_ids"].shape
        return LatencyProfile(
            model=self._adapted.fingerprint,
            tokens=tuple(self.grid),
            mixer_seconds=tuple(layers[n] - mlps[n] for n in self.grid),
            mlp_seconds=tuple(mlps[n] for n in self.grid),
            removal_seconds=tuple(_interpolated(removal, n) for n in self.grid),
            outside_seconds=statistics.median(r.outside for r in chosen),
            visual_tokens=self._visual,
            text_tokens=longest - self._visual,
            batch=batch,
            device=device_name(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            provenance=provenance_of(self._model),
        )

    def _removal_seconds(self) -> dict[int, float]:
        """Tokens of the prompt -> seconds that removal takes in a layer that so many enter."""
        decoder, text = self._adapted.fingerprint.decoder, self._inputs["input_ids"].shape[1] - self._visual
        found = {}
        for share in (1, 2, 4, 8):
            # All but a share leave in the first layer that lets them, then one in each.
            most = max(self._visual // share, 1)
            kept, left = [], self._visual
            for layer in range(decoder.layers):
                if layer in decoder.prunable:
                    left = most if left > most else max(left - 1, 0)
                kept.append(left / self._visual)
            recipe = PruningRecipe(tuple(kept), self._adapted.fingerprint, self._visual)
            watches = {name: Stopwatch(self._model) for name in REMOVING}
            choose, quotas = choose_by(get_scorer(recipe.scorer)), quotas_by(recipe)
            observe = lambda name, function, watches=watches: watches[name].timed(function)  # noqa: E731
            with removing(self._adapted, choose, quotas, observe=observe):
                self._model(**self._inputs, logits_to_keep=1)
            layers_timed = recipe.removing[1:] or recipe.removing  # the first saw all tokens
            total = 0.0
            for name, watch in watches.items():
                layers = decoder.attention_layers if name == "after_attention" else range(decoder.layers)
                by_layer = dict(zip(layers, watch.seconds(), strict=True))
                total += statistics.median(by_layer[layer] for layer in layers_timed)
            found[most + text] = total
        return found


# What a Remover does in a layer.
REMOVING = ("before_layer", "after_attention", "before_mlp", "after_mlp", "after_layer")


@dataclasses.dataclass
class _Round:
    """Seconds that one round found.

    Attributes:
        outside: of a prefill, outside of its layers.
        removal: tokens that enter a layer -> of scoring and removing in it.
        layers: tokens -> of a layer, mean over layers.
        mlps: tokens -> of its MLP.
    """

    outside: float = 0.0
    removal: dict[int, float] = dataclasses.field(default_factory=dict)
    layers: dict[int, float] = dataclasses.field(default_factory=dict)
    mlps: dict[int, float] = dataclasses.field(default_factory=dict)


def _medians(rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {n: statistics.median(found[n] for found in rounds) for n in rounds[0]}


class Stopwatch:
    """Times functions inside of prefills."""

    def __init__(self, model: Any) -> None:
        self._clock = _Clock(model.device)
        self._marks: list[tuple[Any, Any]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that does as this one, and is timed."""

        def run(*args: Any) -> Any:
            begin = self._clock.mark()
            result = function(*args)
            self._marks.append((begin, self._clock.mark()))
            return result

        return run

    def seconds(self) -> list[float]:
        """Give the seconds of each time that one ran, in order, and forget them."""
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
