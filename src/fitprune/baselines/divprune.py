"""DivPrune (arXiv:2503.02175): one removal before the decoder; the most different embeddings stay.

Tokens are picked one by one, each the farthest from those picked already (max-min cosine distance). Differs from the
authors' code: fp32 whatever the model's type, and a token is never picked twice.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline, before_decoder
from fitprune.fitting.budget import Budget


@baseline(scorer="max-min", source="DivPrune, arXiv:2503.02175")
def divprune(target: Target, budget: Budget) -> Solution:
    """One removal, before the first layer."""
    return before_decoder("divprune", target, budget)
