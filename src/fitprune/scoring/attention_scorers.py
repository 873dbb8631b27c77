"""Scorers of the attention that a visual token receives, and the two that read none: by place and by chance.

Each takes a `fitprune.scoring.view.LayerView` and returns scores [B, m], higher is kept; shapes as in its module.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fitprune.recipes.recipe import short
from fitprune.scoring.view import LayerView


def self_times_cross(view: LayerView) -> torch.Tensor:
    """Score tokens by received self attention x received cross attention.

    Source: arXiv:2409.10197.
    """
    return view.self_attention * view.cross_attention


def self_alone(view: LayerView) -> torch.Tensor:
    """Score tokens by received self attention, whatever the question.

    Source: the self half of arXiv:2409.10197's score.
    """
    return view.self_attention


def cross_alone(view: LayerView) -> torch.Tensor:
    """Score tokens by received cross attention, maximum over heads.

    Source: the cross half of arXiv:2409.10197's score.
    """
    return view.cross_attention


def cross_mean(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the question's rows, mean over rows and heads."""
    return view.by_head("mean")["mean"].mean(1)


def by_last_row(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the prompt's last token, mean over heads.

    Source: FastV (arXiv:2403.06764) and PyramidDrop (arXiv:2410.17247).
    """
    return view.last_attention


def value_weighted(view: LayerView) -> torch.Tensor:
    """Score tokens by what they add to the question's rows: attention x norm of the value, maximum over heads.

    Source: the norm of the value counts as well as the weight (Kobayashi et al., arXiv:2004.10102).
    """
    return (view.by_head("mean")["mean"] * view.value_norms).amax(1)


def accumulated(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the question's rows in all layers up to this one, mean over heads.

    Args:
        view: after at least one layer.

    Raises:
        ValueError: no layer has run yet.
    """
    return view.prompt.received.to(view.column.device).gather(1, view.column.clamp(min=0))


def by_cls(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the vision tower's [CLS] token.

    Source: the dominant tokens of VisionZip (arXiv:2412.04467).
    """
    return view.cls_attention


def by_place(view: LayerView) -> torch.Tensor:
    """Score tokens by their place, so that the first leave first: for methods that do not rank."""
    return view.place.float()


def by_chance(seed: int) -> Callable[[LayerView], torch.Tensor]:
    """Make a scorer that draws scores at random, the same in every layer.

    Args:
        seed: of the draws; together with the sample's number, which is `view.prompt.numbers`.

    Raises:
        ValueError: the seed is no whole number, or negative.
    """
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed={short(seed)}: must be at least 0, a whole number")

    def score(view: LayerView) -> torch.Tensor:
        longest = int(view.place.max()) + 1
        # numpy: a longer draw begins with the numbers of a shorter one, so padding changes nothing.
        drawn = np.stack([np.random.default_rng([seed, number]).random(longest) for number in view.prompt.numbers])
        return torch.from_numpy(drawn).to(view.place.device).gather(1, view.place)

    return score
