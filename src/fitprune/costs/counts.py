"""Visual tokens layer by layer: how many enter and are kept, and from these how many leave, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Counts:
    """Visual tokens of one image at each decoder layer.

    Attributes:
        visual_tokens: the image's.
        kept: tokens left after each layer.
        entering: tokens that enter each layer, which are those that its KV cache holds; by default what the layer
            before it kept. Fewer where some leave between two layers or before the first.
    """

    visual_tokens: int
    kept: tuple[int, ...]
    entering: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self.kept))
        object.__setattr__(self, "entering", tuple(self.entering) or self._reaching)

    @property
    def _reaching(self) -> tuple[int, ...]:
        """What the layer before each kept; the whole image reaches the first."""
        return (self.visual_tokens, *self.kept[:-1])

    @property
    def removed(self) -> list[int]:
        """Tokens that leave inside each layer."""
        return [enter - keep for enter, keep in zip(self.entering, self.kept, strict=True)]

    @property
    def before(self) -> list[int]:
        """Tokens that leave before each layer, after the layer before it."""
        return [reach - enter for reach, enter in zip(self._reaching, self.entering, strict=True)]

    @property
    def removing(self) -> list[int]:
        """The layers that tokens leave, inside or before them."""
        return [
            layer for layer, (reach, keep) in enumerate(zip(self._reaching, self.kept, strict=True)) if keep < reach
        ]

    @property
    def fractions(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What is kept after each layer and what enters it, of the image; the latter empty where it is the default."""
        n = self.visual_tokens
        entering = self.entering if any(self.before) else ()
        return tuple(count / n for count in self.kept), tuple(count / n for count in entering)


def entering_counts(visual_tokens: int, removed: Sequence[int], before: Sequence[int] | None = None) -> list[int]:
    """Count the tokens that enter each layer from those that leave inside each layer and before it."""
    counts, n = [], visual_tokens
    for inside, between in zip(removed, before or [0] * len(removed), strict=True):
        n -= between
        counts.append(n)
        n -= inside
    return counts
