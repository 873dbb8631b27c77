"""What timing found: one `Timing` for each method, a verdict in words, a table, JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune._support.text_tables import aligned
from fitprune.costs.latency import LatencyProfile
from fitprune.recipes.recipe import PruningRecipe
from fitprune.speed.clocks import device_name

WORTH_IT = 1.1  # speed-up of the prefill


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one recipe, or the dense model, took with one batch.

    Attributes:
        name: "dense", or the recipe's.
        batch: samples run together.
        visual_tokens: of each prompt.
        text_tokens: of each prompt.
        prefill_seconds: of each round.
        ahead_seconds: of a prefill, up to the first layer: vision tower, projector, embeddings; median.
        step_seconds: of a step of decoding, median over rounds; None where none was asked for.
        answer_seconds: tokens of the answer -> seconds of prefill and decoding together, median.
        peak_bytes: memory in use at the peak, weights included; None where the system does not say.
        kv_bytes: bytes of the KV cache after prefill, all samples.
        cost_kv_bytes: what the cost model says.
        speedup: of the prefill, against dense in the same round; median over rounds.
        flops_speedup: what the FLOPs of the whole prefill would give.
        ideal_seconds: what the profile says: every layer at the tokens that it has, and nothing for scoring.
        efficiency: ideal over measured seconds of the same round; median over rounds.
        scoring_share: part of the prefill that goes into scores.
        verdict: whether it is worth it here, in words; empty for dense.
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
    verdict: str = ""

    @property
    def seconds(self) -> float:
        """Median seconds of a prefill."""
        return statistics.median(self.prefill_seconds)


def verdict(timing: Timing, dense: Timing, recipe: PruningRecipe, profile: LatencyProfile) -> str:
    """Say whether a recipe is worth it, and if not, why."""
    if timing.speedup >= WORTH_IT:
        longest = max(timing.answer_seconds)
        ratio = dense.answer_seconds[longest] / timing.answer_seconds[longest]
        more = f", {ratio:.2f}x with an answer of {longest} tokens" if longest > 1 else ""
        return f"worth it: prefill {timing.speedup:.2f}x as fast{more}"
    visual, text, layers = timing.visual_tokens, timing.text_tokens, profile.model.decoder.layers
    share = visual / (visual + text)
    whole = profile.dense_seconds(visual, text_tokens=text)
    outside = profile.outside_seconds / whole
    floor = profile.prefill_seconds(visual, [0] * layers, [0] * layers, text_tokens=text, scoring=False)
    removed = recipe.cost(visual_tokens=visual).flops_reduction
    if share < 0.5:
        why = f"the image is {share:.0%} of this prompt"
    elif outside > 0.5:
        why = f"{outside:.0%} of the prefill is vision tower and head, which are not pruned"
    elif removed < 0.2:
        why = f"the recipe removes {removed:.0%} of the visual FLOPs"
    elif floor > 0.8 * whole:
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
