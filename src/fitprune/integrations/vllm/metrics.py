"""What operators see of pruning: counters in the server's /metrics, and a line in its log now and then.

The scheduler counts, in the engine's process. What is new goes with the statistics that vLLM sends after each step to
one of the API servers, as one more field of them; there it is added up. /metrics sums what all API servers have.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from fitprune.recipes.recipe import PruningRecipe

COUNTERS = {
    "prompts_pruned": "Prompts with images that are pruned.",
    "prompts_dense": "Prompts with images that run dense, by reason.",
    "prompts_held": "Prompts that waited for a step with room for all from their first image on.",
    "visual_token_layers": "Visual tokens of the pruned prompts, times the decoder's layers.",
    "visual_token_layers_pruned": "Of visual_token_layers, those at whose end the token had left.",
}

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


@dataclasses.dataclass
class Counts:
    """What a scheduler did with prompts that have images, since this was last sent.

    Attributes:
        new: by the counter's name; for `prompts_dense`, a slash and the reason follow it.
    """

    new: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def pruned(self, recipe: PruningRecipe, tokens: Iterable[int]) -> None:
        """Count a prompt that is pruned, whose images have these numbers of visual tokens."""
        self.new["prompts_pruned"] += 1
        for number in tokens:
            whole = number * len(recipe.keep)
            self.new["visual_token_layers"] += whole
            self.new["visual_token_layers_pruned"] += whole - sum(recipe.kept(number))

    def dense(self, reason: str) -> None:
        """Count a prompt with images that runs dense."""
        self.new[f"prompts_dense/{reason}"] += 1

    def hold(self) -> None:
        """Count a prompt that waits for a step with room for its images and all after them."""
        self.new["prompts_held"] += 1

    def sent_with(self, stats: Any) -> Any:
        """Put what is new into a step's statistics, and start again at 0; None, where vLLM makes none, stays None."""
        if stats is None:
            return None
        new, self.new = self.new, collections.Counter()
        return PruningStats(**vars(stats), fitprune=dict(new))


@dataclasses.dataclass
class PruningStats(SchedulerStats):  # type: ignore[misc]  # vLLM is not followed by mypy here: its classes are Any
    """vLLM's statistics of a step, with what is new in `Counts`."""

    fitprune: dict[str, int] = dataclasses.field(default_factory=dict)


def receive() -> None:
    """Have this process, if it is an API server, read the field; to others it is unknown, and they skip it."""
    EngineCoreOutputs.__annotations__["scheduler_stats"] = PruningStats | None


class PruningStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]  # as PruningStats
    """Adds up the counts of an API server's engines.

    Args:
        vllm_config: the engines' VllmConfig.
        engine_indexes: their numbers.
        reasons: why prompts may run dense.
        speaks: whether to log; as vLLM's own line, not where several API servers have a part each.
    """

    def __init__(
        self, vllm_config: Any, engine_indexes: Iterable[int], reasons: Iterable[str], speaks: bool = True
    ) -> None:
        self._model, self._speaks = vllm_config.model_config.served_model_name, speaks
        self._total: collections.Counter[str] = collections.Counter()
        self._logged = 0
        names = [*(COUNTERS.keys() - {"prompts_dense"}), *(f"prompts_dense/{reason}" for reason in reasons)]
        for engine, name in itertools.product(engine_indexes, names):
            self._counter(name, engine)  # which is shown as 0 from now on

    def _counter(self, name: str, engine: int) -> Any:
        name, *reason = name.split("/", 1)
        return counters()[name].labels(self._model, str(engine), *reason)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Add what is new; called by vLLM after each step."""
        for name, number in getattr(scheduler_stats, "fitprune", {}).items():
            self._total[name] += number
            self._counter(name, engine_idx).inc(number)

    def log(self) -> None:
        """Log all counts if one has changed; called by vLLM when it logs its throughput."""
        if self._speaks and (total := self._total.total()) != self._logged:
            self._logged = total
            logger.info("fitprune: %s", summary(self._total))

    def log_engine_initialized(self) -> None:
        """Do nothing; vLLM asks for the method."""


@functools.cache  # a process may have several engines, one after the other
def counters() -> dict[str, Any]:
    """Make the process's counters, with vLLM's labels."""
    from prometheus_client import Counter

    labels = ["model_name", "engine"]
    return {
        name: Counter(f"fitprune:{name}", text, [*labels, "reason"] if name == "prompts_dense" else labels)
        for name, text in COUNTERS.items()
    }


def summary(total: collections.Counter[str]) -> str:
    """Say in a line what was counted since the server started."""
    reasons = {name.split("/", 1)[1]: number for name, number in total.items() if "/" in name}
    line = f"{total['prompts_pruned']} prompts pruned"
    if total["visual_token_layers"]:
        line += f" ({total['visual_token_layers_pruned'] / total['visual_token_layers']:.0%} of visual token-layers)"
    line += f", {sum(reasons.values())} dense"
    if reasons:
        line += f" ({', '.join(f'{number} {reason}' for reason, number in reasons.items())})"
    return f"{line}, {total['prompts_held']} held"
