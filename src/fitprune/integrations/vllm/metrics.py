"""What operators see of pruning: counters in the server's /metrics, and a line in its log now and then.

The scheduler counts, in the engine's process; what is new travels with vLLM's own statistics to an API server, which
adds it up. With several API servers vLLM hands each step's statistics to one of them and sums them in /metrics.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from fitprune.recipes.recipe import PruningRecipe


@dataclasses.dataclass
class Counts:
    """What a scheduler did with prompts that have images, since it was last read.

    Attributes:
        recipe: what they are pruned by.
        new: how often each of `COUNTERS`; a reason follows the counter's name behind a slash.
    """

    recipe: PruningRecipe
    new: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def pruned(self, tokens: Iterable[int]) -> None:
        """Count a prompt that is pruned, of so many visual tokens in each of its images."""
        layers = len(self.recipe.keep)
        self.new["prompts_pruned"] += 1
        for count in tokens:
            self.new["visual_token_layers"] += count * layers
            self.new["visual_token_layers_pruned"] += count * layers - sum(self.recipe.kept(count))

    def dense(self, reason: str) -> None:
        """Count a prompt with images that runs dense, and why."""
        self.new[f"prompts_dense/{reason}"] += 1

    def hold(self) -> None:
        """Count a step in which a prompt was held back until it fits whole."""
        self.new["prompt_holds"] += 1

    def take(self) -> dict[str, int]:
        """Give what was counted, and begin anew."""
        new, self.new = self.new, collections.Counter()
        return dict(new)
