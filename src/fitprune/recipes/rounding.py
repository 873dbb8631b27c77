"""From fractions to counts: the one rounding rule of the library.

Pure Python. A recipe holds, for each decoder layer, the fraction of an image's visual tokens that are still present
after the layer; images differ in their number of tokens, so fractions become counts here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fitprune._support import checked
from fitprune.costs.sizes import MOST_TOKENS

_NOISE = 1e-9  # a fraction below it is 0 with a rounding error, as of 1 - 10 * 0.1


def kept_counts(keep: Sequence[float], visual_tokens: int) -> list[int]:
    """Count the visual tokens still present after each layer, for an image that began with `visual_tokens`.

    Rounds half up, so that `count / visual_tokens` gives `count` back exactly. A fraction above 0 keeps at least one
    token: the share of an image of one or two tokens would round to nothing.

    Args:
        keep: fraction kept after each layer, non-increasing, between 0 and 1.
        visual_tokens: the image's original number of visual tokens, 0 to MOST_TOKENS.

    Returns:
        One count per layer, non-increasing; 0 only where the fraction is.

    Raises:
        ValueError: `visual_tokens` is out of range or no integer.
    """
    if not visual_tokens:
        return rounded_counts(keep, visual_tokens)
    counts = zip(keep, rounded_counts(keep, visual_tokens), strict=True)
    return [max(count, int(fraction > _NOISE)) for fraction, count in counts]


def rounded_counts(keep: Sequence[float], visual_tokens: int) -> list[int]:
    """Count as `kept_counts` but without its least token: a fit may decide that a layer keeps none."""
    checked.whole("visual_tokens", visual_tokens, 0, MOST_TOKENS)
    return [math.floor(fraction * visual_tokens + 0.5) for fraction in keep]


def keep_fractions(removed: Sequence[int], visual_tokens: int) -> tuple[float, ...]:
    """Turn removals per layer into the fractions kept after each layer, the inverse of `PruningRecipe.counts`.

    Args:
        removed: tokens that leave inside each layer.
        visual_tokens: the image's original number of visual tokens.

    Raises:
        ValueError: a removal is negative, or more tokens leave than there are.
    """
    kept, fractions = visual_tokens, []
    for layer, count in enumerate(removed):
        if not 0 <= count <= kept:
            raise ValueError(
                f"removed[{layer}]={count}: must be between 0 and the {kept} visual tokens that reach layer {layer}"
            )
        kept -= count
        fractions.append(kept / visual_tokens)
    return tuple(fractions)
