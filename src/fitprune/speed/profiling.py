"""Measure a latency profile: time inside the real model, layer by layer, for prompts of different length."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fitprune.costs.counts import Counts
from fitprune.costs.latency import LatencyProfile, interpolated, token_grid
from fitprune.engine.choose import choose_by, quotas_by
from fitprune.engine.remover import removing
from fitprune.families.adapter import adapt
from fitprune.families.images import visual_mask
from fitprune.families.provenance import provenance_of
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer
from fitprune.speed.clocks import Stopwatch, device_name, medians, timed_layers

LAYERS_TIMED = 8


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
    count of `tokens`. What lies outside of them, and what scoring takes, is timed in the prompt of `inputs`.

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

    Args:
        inputs: what a caller passed as one.

    Raises:
        ValueError: it is no mapping with `input_ids`.
    """
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise ValueError(f"inputs is a {type(inputs).__name__}: must be a processor's output, with 'input_ids'")


class Profiler:
    """Measures a latency profile round by round, so that rounds of something else can go between.

    Args:
        model: as for `profile_latency`.
        inputs: as for `profile_latency`.
        tokens: as for `profile_latency`.

    Attributes:
        grid: tokens of a sample that are measured.
    """

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
        sizes, layers = self._adapted.fingerprint.decoder, len(self._adapted.layers)
        alike = not (sizes.linear_layers or sizes.mlps) and len(set(self._adapted.windows)) == 1
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
            with timed_layers(self._adapted) as times:
                self._model(**self._inputs, logits_to_keep=1)
            self._rounds[-1].outside = times[0].outside
            if removal:
                self._rounds[-1].removal = self._removal_seconds()

    def measure(self, tokens: Sequence[int]) -> None:
        """Measure some of the grid's lengths for the present round, each after another one, as in use."""
        with torch.inference_mode():
            for n in tokens:
                ids = self._text[:, :n]
                with timed_layers(self._adapted, self._timed) as times:
                    self._model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
                self._rounds[-1].layers[n] = statistics.mean(times[0].layers)
                self._rounds[-1].mlps[n] = statistics.mean(times[0].mlps)

    def profile(self, rounds: slice = slice(1, None)) -> LatencyProfile:
        """Take medians over complete rounds, by default without the first, which is to warm up."""
        chosen = self._rounds[rounds]
        # Within a round means, not medians: a prefill is the sum of its layers, slow ones too.
        layers = medians([r.layers for r in chosen])
        mlps = medians([r.mlps for r in chosen])
        removal = medians([r.removal for r in chosen if r.removal] or [r.removal for r in self._rounds if r.removal])
        counts = sorted(removal)
        batch, longest = self._inputs["input_ids"].shape
        return LatencyProfile(
            model=self._adapted.fingerprint,
            tokens=tuple(self.grid),
            mixer_seconds=tuple(layers[n] - mlps[n] for n in self.grid),
            mlp_seconds=tuple(mlps[n] for n in self.grid),
            removal_seconds=tuple(interpolated(counts, [removal[n] for n in counts], n) for n in self.grid),
            outside_seconds=statistics.median(r.outside for r in chosen),
            visual_tokens=self._visual,
            text_tokens=longest - self._visual,
            batch=batch,
            device=device_name(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            provenance=provenance_of(self._model),
        )

    def _removal_seconds(self) -> dict[int, float]:
        """Tokens of the prompt -> seconds that removal takes in a layer that this number of tokens enters."""
        decoder, text = self._adapted.fingerprint.decoder, self._inputs["input_ids"].shape[1] - self._visual
        seconds = {}
        for share in (1, 2, 4, 8):
            # All but a share leave in the first layer that lets them, then one in each.
            most = max(self._visual // share, 1)
            kept, left = list[int](), self._visual
            for layer in range(decoder.layers):
                if layer in decoder.prunable:
                    left = most if left > most else max(left - 1, 0)
                kept.append(left)
            recipe = PruningRecipe.from_counts(Counts(self._visual, tuple(kept)), self._adapted.fingerprint)
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
            seconds[most + text] = total
        return seconds


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
