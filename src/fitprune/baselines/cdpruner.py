"""CDPruner (arXiv:2506.10967): one removal before the decoder, by relevance to the question and diversity.

Tokens are picked by greedy MAP inference of a determinantal point process. Differs from the authors' code: relevance is
a cosine in the decoder's input space; theirs is in CLIP's joint space, for which LLaVA models in transformers hold no
text tower.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline, before_decoder
from fitprune.fitting.budget import Budget


@baseline(scorer="dpp", source="CDPruner, arXiv:2506.10967")
def cdpruner(target: Target, budget: Budget) -> Solution:
    """One removal, before the first layer."""
    return before_decoder("cdpruner", target, budget)
