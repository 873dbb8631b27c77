"""Scorers: pure functions that rank a layer's visual tokens for removal, lowest first.

A scorer looks at a `fitprune.views.LayerView`; shapes as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fitprune.views import LayerView


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to rank visual tokens.

    Attributes:
        score: from a layer's view to scores [B, m], higher is kept.
        query_aware: whether it reads cross attention. If not, none is computed, prompts need no question, and what is
            kept does not depend on any: such a cache can serve many questions.
        reads_vision: whether it reads the attention of the vision tower's [CLS] token.
    """

    score: Callable[[LayerView], torch.Tensor]
    query_aware: bool = True
    reads_vision: bool = False


def self_times_cross(view: LayerView) -> torch.Tensor:
    """Score tokens by received self attention x received cross attention, [B, m].

    Source: arXiv:2409.10197.
    """
    return view.self_attention * view.cross_attention


def self_alone(view: LayerView) -> torch.Tensor:
    """Score tokens by received self attention, whatever the question, [B, m].

    Source: the self half of arXiv:2409.10197's score.
    """
    return view.self_attention


SCORERS: dict[str, Scorer] = {"fitprune": Scorer(self_times_cross), "self": Scorer(self_alone, query_aware=False)}


def get_scorer(scorer: str | Scorer | Callable[[LayerView], torch.Tensor]) -> Scorer:
    """Look a scorer up by name, or take one as it is; a bare function counts as query-aware.

    Raises:
        ValueError: no scorer has that name.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if callable(scorer):
        return Scorer(scorer)
    if scorer not in SCORERS:
        raise ValueError(f"scorer={scorer!r}: must be one of {sorted(SCORERS)} or a function of LayerView")
    return SCORERS[scorer]


def checked_scores(score: Any, image: torch.Tensor) -> torch.Tensor:
    """Refuse what a scorer must not return.

    Args:
        score: what it returned.
        image: [B, N] int64, number of the image each token belongs to, -1 for text.

    Raises:
        ValueError: it is no tensor [B, N], or a visual token's score is NaN.
    """
    if not isinstance(score, torch.Tensor) or score.shape != image.shape:
        what = f"shape {list(score.shape)}" if isinstance(score, torch.Tensor) else f"type {type(score).__name__}"
        raise ValueError(f"the scorer returned {what}: must be a tensor {list(image.shape)}, a score for each token")
    if bool((score.isnan() & (image >= 0)).any()):
        raise ValueError("the scorer returned NaN for a visual token: scores must be numbers, or infinite")
    return score
