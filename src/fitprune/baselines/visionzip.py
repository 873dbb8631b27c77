"""VisionZip (arXiv:2412.04467), dominant tokens: one removal before the decoder, by the vision tower's [CLS] attention.

Differs from the authors' code: the contextual tokens, merged from the rest, and the [CLS] token itself are left out.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline, before_decoder
from fitprune.fitting.budget import Budget


@baseline(scorer="cls", source="VisionZip (dominant tokens), arXiv:2412.04467")
def visionzip(target: Target, budget: Budget) -> Solution:
    """One removal, before the first layer."""
    return before_decoder("visionzip", target, budget)
