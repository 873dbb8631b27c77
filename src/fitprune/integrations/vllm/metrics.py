"""What an engine's scheduler counts of pruning."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class Counts:
    """Prompts with images, of one engine since it started."""

    prompts: int = 0
    tokens: int = 0
    holds: int = 0
    dense_by_reason: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def pruned(self, tokens: int) -> None:
        """Count a prompt that is pruned, and the visual tokens that leave it."""
        self.prompts += 1
        self.tokens += tokens

    def dense(self, reason: str) -> None:
        """Count a prompt with images that runs dense."""
        self.dense_by_reason[reason] += 1

    def hold(self) -> None:
        """Count a prompt that waits for a step that holds it whole."""
        self.holds += 1
