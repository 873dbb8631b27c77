"""Time pruned against dense, fairly: in turn, in one run, on the same inputs; and say where the time goes."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fitprune._support.host import cache_in
from fitprune.calibration.batches import make_batches
from fitprune.calibration.samples import Sample
from fitprune.costs.latency import LatencyProfile
from fitprune.engine.prune import prune
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.images import visual_mask
from fitprune.families.inputs import to_model
from fitprune.recipes.find import fitted_to
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer
from fitprune.speed.clocks import Stopwatch, device_name, medians, now, peak_bytes, reset_peak, timed_layers
from fitprune.speed.in_turn import Block, greedy_outputs
from fitprune.speed.profiling import Profiler, require_inputs
from fitprune.speed.timings import Timing, verdict


@dataclasses.dataclass
class _Run:
    """One answer.

    Attributes:
        prefill: seconds, as in `Timing`.
        ahead: seconds, as in `Timing`.
        at: tokens -> seconds from the start.
        kv_bytes: as in `Timing`.
        peak_bytes: as in `Timing`.
        scoring: seconds of scoring in the prefill.
    """

    prefill: float
    ahead: float
    at: dict[int, float]
    kv_bytes: int
    peak_bytes: int | None
    scoring: float = 0.0


@dataclasses.dataclass
class _Method:
    """The dense model, or a recipe, and its answers in the rounds that count."""

    name: str
    recipe: PruningRecipe | None
    block: Block
    watch: Stopwatch  # of its scorer
    runs: list[_Run] = dataclasses.field(default_factory=list)


def time_recipes(
    model: Any,
    inputs: Mapping[str, Any],
    recipes: Mapping[str, PruningRecipe],
    *,
    new_tokens: Sequence[int] = (1, 16),
    rounds: int = 5,
    profile: LatencyProfile | None = None,
    progress: bool = False,
) -> list[Timing]:
    """Time the dense model and recipes in turn, round after round, the first of which does not count.

    Args:
        model: a supported model.
        inputs: a batch of prompts with an image, all alike, on the model's device.
        recipes: name -> recipe.
        new_tokens: lengths of answers to time, greedy and never cut short. A prefill gives the first token.
        rounds: rounds that count.
        profile: of this model, batch and device; by default it is measured in the same rounds.
        progress: show a progress bar.

    Returns:
        Timings, dense first.

    Raises:
        ValueError: as for `profile_latency` and `prune`; or the profile is of another model, batch or shorter prompts.
    """
    require_inputs(inputs)
    if not isinstance(recipes, Mapping):
        raise ValueError(f"recipes is a {type(recipes).__name__}: must be a mapping, name -> PruningRecipe")
    if rounds < 1 or not new_tokens or min(new_tokens) < 1:
        raise ValueError(f"rounds={rounds}, new_tokens={list(new_tokens)}: must be at least 1 each")
    adapted = adapt(model)
    batch, length = inputs["input_ids"].shape
    visual = int(visual_mask(adapted, inputs["input_ids"][:1]).sum())
    methods = [_Method("dense", None, contextlib.nullcontext, Stopwatch(adapted.model))]
    methods += [_pruned(adapted, name, recipe) for name, recipe in recipes.items()]
    if profile is None:
        profiler = Profiler(adapted.model, inputs, tokens=_token_counts(methods, visual, length))
    else:
        profiler = None
        _require_profile(profile, adapted, batch, length)
    for turn in tqdm(range(rounds + 1), desc="time", unit="round", disable=not progress or None):
        _run_round(adapted, inputs, methods, sorted(new_tokens), profiler, turn)
    if profiler is None:
        profiles = [profile] * rounds if profile else []
    else:  # the ideal was measured in the same rounds: each round is compared with its own
        profiles = [profiler.profile(slice(turn, turn + 1)) for turn in range(1, rounds + 1)]
    dense, *pruned = (
        _timing(method, methods[0], profiles, visual=visual, text=length - visual, batch=batch) for method in methods
    )
    return [
        dense,
        *(
            dataclasses.replace(timing, verdict=verdict(timing, dense, method.recipe, profiles[0]))
            for timing, method in zip(pruned, methods[1:], strict=True)
            if method.recipe is not None
        ),
    ]


def _pruned(adapted: AdaptedModel, name: str, recipe: PruningRecipe) -> _Method:
    recipe = fitted_to(recipe, adapted.fingerprint, force=False, what=f"recipe {name!r}")
    scorer, watch = get_scorer(recipe.scorer), Stopwatch(adapted.model)
    timed = dataclasses.replace(scorer, score=watch.timed(scorer.score))
    return _Method(name, recipe, lambda: prune(adapted.model, recipe, timed), watch)


def _require_profile(profile: LatencyProfile, adapted: AdaptedModel, batch: int, length: int) -> None:
    """Refuse a profile of anything else than what is timed."""
    profile.model.require_same(adapted.fingerprint, what="profile")
    model = adapted.model
    timed = {"batch": batch, "dtype": str(model.dtype).removeprefix("torch."), "device": device_name(model)}
    for what, value in timed.items():
        if getattr(profile, what) != value:
            raise ValueError(
                f"the profile is of {what} {getattr(profile, what)}, and {what} {value} is timed: profile with the same"
            )
    if length > profile.tokens[-1]:
        raise ValueError(
            f"a prompt of {length} tokens: the profile was measured up to {profile.tokens[-1]}; profile longer ones"
        )


def _token_counts(methods: Iterable[_Method], visual: int, length: int) -> list[int]:
    """The token counts that layers see, so that no time between two of them must be guessed."""
    counts = {visual}
    for method in methods:
        if (recipe := method.recipe) is not None:
            layers = recipe.layer_counts(visual)
            counts.update(layers.kept, layers.entering)
    return sorted(max(1, count + length - visual) for count in counts)


def _run_round(
    adapted: AdaptedModel,
    inputs: Mapping[str, Any],
    methods: Sequence[_Method],
    lengths: Sequence[int],
    profiler: Profiler | None,
    turn: int,
) -> None:
    """Let every method answer once, and measure some lengths of the profile after each; round 0 does not count."""
    if profiler is not None:
        profiler.begin(removal=turn == 0)  # no part of the ideal
    first = turn % len(methods)  # who follows whom leaves traces in caches: another one begins each round
    for number, method in enumerate([*methods[first:], *methods[:first]]):
        with torch.inference_mode(), method.block():
            run = _answer(adapted, inputs, lengths)
        run.scoring = sum(method.watch.seconds())
        if turn:
            method.runs.append(run)
        if profiler is not None:  # lengths in turn with methods: a machine that slows down slows the ideal down
            profiler.measure(profiler.grid[number :: len(methods)])


def _answer(adapted: AdaptedModel, inputs: Mapping[str, Any], lengths: Sequence[int]) -> _Run:
    """Answer one batch greedily, never ending early, and look at the clock at each of `lengths` tokens."""
    model, outputs = adapted.model, greedy_outputs(adapted.model, inputs)
    reset_peak(model)
    begin = now(model)
    with timed_layers(adapted) as times:
        output = next(outputs)
    prefill = now(model) - begin
    parts = [part for layer in cache_in(output).layers for part in (layer.keys, layer.values)]
    kv_bytes = sum(part.numel() * part.element_size() for part in parts if part is not None)
    at = {1: prefill}
    for token in range(2, lengths[-1] + 1):
        next(outputs)
        if token in lengths:
            at[token] = now(model) - begin
    return _Run(prefill, times[0].ahead, at, kv_bytes, peak_bytes(model))


def _timing(
    method: _Method, dense: _Method, profiles: Sequence[LatencyProfile], *, visual: int, text: int, batch: int
) -> Timing:
    """Summarise the rounds of one method, each with the profile that it is compared with."""
    runs, recipe = method.runs, method.recipe or PruningRecipe.dense(profiles[0].model, visual)
    value_bytes = 4 if profiles[0].dtype == "float32" else 2
    cost = recipe.cost(visual_tokens=visual, text_tokens=text, value_bytes=value_bytes)
    entering = recipe.layer_counts(visual).entering
    ideals = [p.prefill_seconds(visual, cost.kept, entering, text_tokens=text, scoring=False) for p in profiles]
    longest = max(runs[0].at)
    steps = [(run.at[longest] - run.prefill) / (longest - 1) for run in runs] if longest > 1 else []
    return Timing(
        name=method.name,
        batch=batch,
        visual_tokens=visual,
        text_tokens=text,
        prefill_seconds=tuple(run.prefill for run in runs),
        ahead_seconds=statistics.median(run.ahead for run in runs),
        step_seconds=statistics.median(steps) if steps else None,
        answer_seconds=medians([run.at for run in runs]),
        peak_bytes=max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        kv_bytes=runs[0].kv_bytes,
        cost_kv_bytes=batch * cost.kv_bytes,
        speedup=statistics.median(a.prefill / b.prefill for a, b in zip(dense.runs, runs, strict=True)),
        flops_speedup=cost.dense_prefill_flops / cost.prefill_flops,
        ideal_seconds=statistics.median(ideals),
        efficiency=statistics.median(ideal / run.prefill for ideal, run in zip(ideals, runs, strict=True)),
        scoring_share=statistics.median(run.scoring / run.prefill for run in runs),
    )


def noise_inputs(
    model: Any,
    processor: Any,
    *,
    text_tokens: int = 64,
    batch_size: int = 1,
    side: int = 672,
    prompt_template: str | None = None,
) -> dict[str, Any]:
    """Make a batch of equal prompts with an image of noise, to measure speed with.

    Args:
        model: a supported model.
        processor: its processor.
        text_tokens: the least that a prompt's text is to have, its format included; a few more where words are long.
        batch_size: prompts.
        side: height and width of the image, in pixels.
        prompt_template: see `fitprune.calibration.prompts.format_prompt`.
    """
    adapted = adapt(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def batch(words: int, count: int) -> dict[str, Any]:
        samples = [Sample("noise", " ".join(["what"] * words), image)] * count
        batches = make_batches(samples, processor, batch_size=count, prompt_template=prompt_template)
        return to_model(next(batches), adapted.model)

    def too_few(words: int) -> bool:
        return int((~visual_mask(adapted, batch(words, 1)["input_ids"])).sum()) < text_tokens

    # Each word is at least one token, so no more than these are needed.
    words = bisect.bisect_left(range(1, text_tokens + 1), True, key=lambda n: not too_few(n)) + 1
    return batch(words, batch_size)
