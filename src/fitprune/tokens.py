"""From fractions to counts: the one rounding rule of the library.

Pure Python. A recipe holds, for each decoder layer, the fraction of an image's visual tokens that are still present
after the layer; images differ in token count, so counts are made here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral


def kept_counts(keep: Sequence[float], visual_tokens: int) -> list[int]:
    """Count the visual tokens still present after each layer, for an image that began with `visual_tokens`.

    Rounds half up, so that a fraction made as `count / visual_tokens` gives `count` back exactly.

    Args:
        keep: fraction kept after each layer, non-increasing, between 0 and 1.
        visual_tokens: the image's original number of visual tokens, 0 or more.

    Returns:
        One count per layer, non-increasing.

    Raises:
        ValueError: `visual_tokens` is negative or no integer.
    """
    if not isinstance(visual_tokens, Integral) or isinstance(visual_tokens, bool) or visual_tokens < 0:
        raise ValueError(f"visual_tokens={visual_tokens!r}: must be an integer of at least 0")
    return [math.floor(fraction * visual_tokens + 0.5) for fraction in keep]


def keep_fractions(removed: Sequence[int], visual_tokens: int) -> tuple[float, ...]:
    """Turn removals per layer into the fractions kept after each layer, the inverse of `PruningRecipe.counts`.

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
