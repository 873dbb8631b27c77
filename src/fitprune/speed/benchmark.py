"""Time pruned against dense, fairly: in turn, in one run, on the same inputs; and say where the time goes."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fitprune._support.host import cache_argument, cache_in
from fitprune._support.text_tables import aligned
from fitprune.calibration.batches import make_batches
from fitprune.calibration.samples import Sample
from fitprune.costs.counts import entering_counts
from fitprune.costs.latency import LatencyProfile
from fitprune.engine.prune import prune
from fitprune.families.adapter import adapt
from fitprune.families.images import visual_mask
from fitprune.families.inputs import to_model
from fitprune.recipes.find import fitted_to
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer
from fitprune.speed.profiling import Profiler, Stopwatch, device_name, require_inputs, timed_layers

# Makes the block in which a method works; a null context is the dense model.
Block = Callable[[], contextlib.AbstractContextManager[Any]]


def prefill_seconds(
    model: Any, inputs: Mapping[str, Any], blocks: Sequence[Block], *, repeats: int = 5
) -> list[list[float]]:
    """Time the prefill of one batch in each block.

    The blocks take turns within every repeat, so that a drift of the machine meets all of them; one round before the
    first is thrown away; a CUDA device is synchronised.

    Args:
        model: a supported model.
        inputs: one batch, on the model's device.
        blocks: what is compared.
        repeats: rounds.

    Returns:
        For each block, seconds of each round.
    """

    def prefill() -> float:
        started = _now(model)
        model(**inputs, logits_to_keep=1)
        return _now(model) - started

    return _in_turn(prefill, blocks, repeats)


def decode_seconds(
    model: Any, inputs: Mapping[str, Any], blocks: Sequence[Block], *, steps: int = 16, repeats: int = 3
) -> list[list[float]]:
    """Time a step of decoding after the prefill of one batch in each block; arguments as for `prefill_seconds`.

    Args:
        steps: decoding steps timed in a row, of which the mean is taken.

    Returns:
        For each block, seconds a step of each round.
    """

    def decode() -> float:
        made = model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        position = mask.long().sum(1, keepdim=True)
        started = _now(model)
        for step in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            made = model(
                input_ids=made.logits[:, -1:].argmax(-1),
                attention_mask=mask,
                position_ids=position + step,
                **cache_argument(model, cache_in(made)),
                use_cache=True,
            )
        return (_now(model) - started) / steps

    return _in_turn(decode, blocks, repeats)


def _in_turn(timed: Callable[[], float], blocks: Sequence[Block], repeats: int) -> list[list[float]]:
    """Run `timed` in every block, round after round; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in blocks]
    for turn in range(repeats + 1):
        for block, kept in zip(blocks, seconds, strict=True):
            with torch.inference_mode(), block():
                spent = timed()
            if turn:
                kept.append(spent)
    return seconds


def time_ratios(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Give each entry's time as a ratio to the first's: the median over rounds of the ratio within the round."""
    return [statistics.median(b / a for a, b in zip(seconds[0], row, strict=True)) for row in seconds]


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one recipe, or the dense model, took with one batch.

    Attributes:
        name: "dense", or the recipe's.
        batch: samples run together.
        visual_tokens, text_tokens: of each prompt.
        prefill_seconds: of each round.
        ahead_seconds: of a prefill, up to the first layer: vision tower, projector, embeddings; median.
        step_seconds: of a step of decoding, median over rounds; None where none was asked for.
        answer_seconds: tokens of the answer -> seconds of prefill and decoding together, median.
        peak_bytes: memory held at the peak, weights included; None where the system does not tell.
        kv_bytes: bytes of the KV cache after prefill, all samples.
        cost_kv_bytes: what the cost model says.
        speedup: of the prefill, against dense in the same round; median over rounds.
        flops_speedup: what the FLOPs of the whole prefill would give.
        ideal_seconds: what the profile says: every layer at the tokens that it has, and nothing for scoring.
        efficiency: ideal over measured seconds of the same round; median over rounds.
        scoring_share: part of the prefill that goes into scores.
        verdict: whether it is worth it here, in words.
    """

    name: str
    batch: int
    visual_tokens: int
    text_tokens: int
    prefill_seconds: tuple[float, ...]
    ahead_seconds: float
    step_seconds: float | None
    answer_seconds: Mapping[int, float]
    peak_bytes: int | None
    kv_bytes: int
    cost_kv_bytes: int
    speedup: float
    flops_speedup: float
    ideal_seconds: float
    efficiency: float
    scoring_share: float
    verdict: str

    @property
    def seconds(self) -> float:
        """Median seconds of a prefill."""
        return statistics.median(self.prefill_seconds)


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
    adapted = adapt(model)
    model = adapted.model
    recipes = {
        name: fitted_to(recipe, adapted.fingerprint, force=False, what=f"recipe {name!r}")
        for name, recipe in recipes.items()
    }
    if rounds < 1 or not new_tokens or min(new_tokens) < 1:
        raise ValueError(f"rounds={rounds}, new_tokens={list(new_tokens)}: must be at least 1 each")
    batch, length = inputs["input_ids"].shape
    visual = int(visual_mask(adapted, inputs["input_ids"][:1]).sum())
    profiler = Profiler(model, inputs, tokens=_needed(recipes, visual, length)) if profile is None else None
    if profile is not None:
        _require_profile(profile, model, adapted, batch, length)
    watches = {name: Stopwatch(model) for name in recipes}
    blocks: dict[str, Block] = {"dense": contextlib.nullcontext}
    for name, recipe in recipes.items():
        blocks[name] = _pruned(model, recipe, watches[name])
    found: dict[str, list[_Run]] = {name: [] for name in blocks}
    for turn in tqdm(range(rounds + 1), desc="benchmark", unit="round", disable=not progress or None):
        if profiler is not None:
            profiler.begin(removal=turn == 0)  # no part of the ideal
        first = turn % len(blocks)  # who follows whom leaves traces in caches: another one begins each round
        for number, name in enumerate([*blocks, *blocks][first : first + len(blocks)]):
            with torch.inference_mode(), blocks[name]():
                run = _answer(model, adapted, inputs, sorted(new_tokens))
            if name in watches:
                run.scoring = sum(watches[name].seconds())
            if turn:
                found[name].append(run)
            if profiler is not None:  # lengths in turn with methods: a machine that slows down slows the ideal down
                profiler.measure(profiler.grid[number :: len(blocks)])
    # Where the ideal was measured in the same rounds, each round is held against its own.
    profiles = [] if profile is None else [profile] * rounds
    if profiler is not None:
        profiles = [profiler.profile(slice(turn, turn + 1)) for turn in range(1, rounds + 1)]
    return [
        _timing(name, recipes.get(name), found[name], found["dense"], profiles, (batch, visual, length - visual))
        for name in blocks
    ]


def _require_profile(profile: LatencyProfile, model: Any, adapted: Any, batch: int, length: int) -> None:
    """Refuse a profile of anything else than what is timed."""
    profile.model.require_same(adapted.fingerprint, what="profile")
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


def _needed(recipes: Mapping[str, PruningRecipe], visual: int, length: int) -> list[int]:
    """The token counts that layers see, so that no time between two of them must be guessed."""
    counts = {visual, *(n for recipe in recipes.values() for n in recipe.kept(visual))}
    counts |= {n for r in recipes.values() for n in entering_counts(visual, r.counts(visual), r.counts_before(visual))}
    return sorted(max(1, count + length - visual) for count in counts)


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
    model = adapted.model
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def batch(words: int, count: int) -> dict[str, Any]:
        samples = [Sample("noise", " ".join(["what"] * words), image)] * count
        made = make_batches(samples, processor, batch_size=count, prompt_template=prompt_template)
        return to_model(next(made), model)

    def too_few(words: int) -> bool:
        return int((~visual_mask(adapted, batch(words, 1)["input_ids"])).sum()) < text_tokens

    # Each word is at least one token, so no more than these are needed.
    words = bisect.bisect_left(range(1, text_tokens + 1), True, key=lambda n: not too_few(n)) + 1
    return batch(words, batch_size)


def _pruned(model: Any, recipe: PruningRecipe, watch: Stopwatch) -> Block:
    scorer = get_scorer(recipe.scorer)
    return lambda: prune(model, recipe, dataclasses.replace(scorer, score=watch.timed(scorer.score)))


@dataclasses.dataclass
class _Run:
    """One answer.

    Attributes:
        prefill, ahead: seconds, as in `Timing`.
        at: tokens -> seconds from the start.
        kv_bytes, peak_bytes: as in `Timing`.
        scoring: seconds of scoring in the prefill.
    """

    prefill: float
    ahead: float
    at: dict[int, float]
    kv_bytes: int
    peak_bytes: int | None
    scoring: float = 0.0


def _answer(model: Any, adapted: Any, inputs: Mapping[str, Any], lengths: Sequence[int]) -> _Run:
    """Answer one batch greedily, never ending early, and look at the clock at each of `lengths` tokens."""
    _reset_peak(model)
    started = _now(model)
    with timed_layers(adapted) as found:
        made = model(**inputs, use_cache=True, logits_to_keep=1)
    prefill = _now(model) - started
    held = [part for layer in cache_in(made).layers for part in (layer.keys, layer.values)]
    kv_bytes = sum(part.numel() * part.element_size() for part in held if part is not None)
    at, mask = {1: prefill}, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    position = mask.long().sum(1, keepdim=True)
    for token in range(2, lengths[-1] + 1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        made = model(
            input_ids=made.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            position_ids=position + token - 2,
            **cache_argument(model, cache_in(made)),
            use_cache=True,
        )
        if token in lengths:
            at[token] = _now(model) - started
    return _Run(prefill, found[0].ahead, at, kv_bytes, _peak(model))


def _timing(
    name: str,
    recipe: PruningRecipe | None,
    runs: Sequence[_Run],
    dense: Sequence[_Run],
    profiles: Sequence[LatencyProfile],
    sizes: tuple[int, int, int],
) -> Timing:
    """Summarise the rounds of one method, each with the profile that it is held against."""
    (batch, visual, text), profile = sizes, profiles[0]
    priced = recipe or PruningRecipe.dense(profile.model, visual)
    value_bytes = 4 if profile.dtype == "float32" else 2
    cost = priced.cost(visual_tokens=visual, text_tokens=text, value_bytes=value_bytes)
    kept = list(cost.kept)
    entering = entering_counts(visual, priced.counts(visual), priced.counts_before(visual))
    ideals = [p.prefill_seconds(visual, kept, entering, text_tokens=text, scoring=False) for p in profiles]
    longest = max(runs[0].at)
    steps = [(run.at[longest] - run.prefill) / (longest - 1) for run in runs] if longest > 1 else []
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    answers = {n: statistics.median(run.at[n] for run in runs) for n in runs[0].at}
    dense_answers = {n: statistics.median(run.at[n] for run in dense) for n in answers}
    ahead = statistics.median(run.ahead for run in runs)
    speedup = statistics.median(a.prefill / b.prefill for a, b in zip(dense, runs, strict=True))
    timing = Timing(
        name=name,
        batch=batch,
        visual_tokens=visual,
        text_tokens=text,
        prefill_seconds=tuple(run.prefill for run in runs),
        ahead_seconds=ahead,
        step_seconds=statistics.median(steps) if steps else None,
        answer_seconds=answers,
        peak_bytes=max(peaks) if peaks else None,
        kv_bytes=runs[0].kv_bytes,
        cost_kv_bytes=batch * cost.kv_bytes,
        speedup=speedup,
        flops_speedup=cost.dense_prefill_flops / cost.prefill_flops,
        ideal_seconds=statistics.median(ideals),
        efficiency=statistics.median(ideal / run.prefill for ideal, run in zip(ideals, runs, strict=True)),
        scoring_share=statistics.median(run.scoring / run.prefill for run in runs),
        verdict="",
    )
    if recipe is None:
        return timing
    overall = {n: dense_answers[n] / answers[n] for n in answers}
    return dataclasses.replace(timing, verdict=_verdict(timing, overall, recipe, profile))


def _verdict(timing: Timing, overall: Mapping[int, float], recipe: PruningRecipe, profile: LatencyProfile) -> str:
    """Say whether it is worth it, and if not, why."""
    if timing.speedup >= 1.1:
        longest = max(overall)
        more = f", {overall[longest]:.2f}x with an answer of {longest} tokens" if longest > 1 else ""
        return f"worth it: prefill {timing.speedup:.2f}x as fast{more}"
    visual, text, layers = timing.visual_tokens, timing.text_tokens, profile.model.decoder.layers
    share = visual / (visual + text)
    outside = profile.outside_seconds / profile.dense_seconds(visual, text_tokens=text)
    floor = profile.prefill_seconds(visual, [0] * layers, [0] * layers, text_tokens=text, scoring=False)
    if share < 0.5:
        why = f"the image is {share:.0%} of this prompt"
    elif outside > 0.5:
        why = f"{outside:.0%} of the prefill is vision tower and head, which are not pruned"
    elif recipe.cost(visual_tokens=visual).flops_reduction < 0.2:
        why = f"the recipe removes {recipe.cost(visual_tokens=visual).flops_reduction:.0%} of the visual FLOPs"
    elif floor > 0.8 * profile.dense_seconds(visual, text_tokens=text):
        why = "without the image the prefill would take as long: reading the weights is the floor"
    else:
        why = f"efficiency is {timing.efficiency:.2f}"
    return f"not here ({timing.speedup:.2f}x): {why}"


def table(timings: Sequence[Timing]) -> str:
    """Show timings as text."""
    lengths = [n for n in timings[0].answer_seconds if n > 1]
    heads = ["", "batch", "prefill s", "spread", "speed-up", "of FLOPs", "efficiency", "scoring", "tower s", "tokens/s"]
    heads += [f"{n} tokens s" for n in lengths] + ["KV MB", "peak GB"]
    rows = [tuple(heads)]
    for timing in timings:
        spread = (max(timing.prefill_seconds) - min(timing.prefill_seconds)) / timing.seconds
        step = timing.step_seconds
        rows.append(
            (
                timing.name,
                str(timing.batch),
                f"{timing.seconds:.3f}",
                f"{spread:.0%}",
                f"{timing.speedup:.2f}x",
                f"{timing.flops_speedup:.2f}x",
                f"{timing.efficiency:.2f}",
                f"{timing.scoring_share:.1%}",
                f"{timing.ahead_seconds:.3f}",
                "-" if step is None else f"{timing.batch / step:.2f}",
                *(f"{timing.answer_seconds[n]:.2f}" for n in lengths),
                f"{timing.kv_bytes / 1e6:.1f}",
                "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e9:.2f}",
            )
        )
    verdicts = [f"{timing.name}: {timing.verdict}" for timing in timings if timing.verdict]
    return "\n".join([aligned(rows), *verdicts])


def as_json(timings: Sequence[Timing], model: Any) -> dict[str, Any]:
    """Give all figures as one JSON document."""
    rows = [{**dataclasses.asdict(timing), "prefill_seconds_median": timing.seconds} for timing in timings]
    return {"model": str(model.name_or_path), "device": device_name(model), "torch": torch.__version__, "timings": rows}


def _reset_peak(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(model: Any) -> int | None:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
