"""Scorers whose parameters are fitted: weights of attention heads, and a profile of attention along the image.

Shapes as in `fitprune.scoring.view`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fitprune.recipes.recipe import short
from fitprune.scoring.attention_scorers import cross_mean
from fitprune.scoring.by_head import HEAD_KINDS
from fitprune.scoring.view import LayerView


def weighted_heads(terms: Sequence[Sequence[Any]]) -> Callable[[LayerView], torch.Tensor]:
    """Make a scorer of the weighted sum over attention heads.

    Args:
        terms: a list of [kind, head, weight], kinds as in `head_attention`; weights of one head add up.

    Raises:
        ValueError: there is no term, or one has another form.
    """
    if not isinstance(terms, (list, tuple)):
        raise ValueError(f"terms={short(terms)}: must be a list of [kind, head, weight]")
    for term in terms:
        if (
            not isinstance(term, (list, tuple))
            or len(term) != 3
            or term[0] not in HEAD_KINDS
            or type(term[1]) is not int
            or not is_number(term[2])
        ):
            raise ValueError(f"terms={short(term)}: must be a kind of {list(HEAD_KINDS)}, a head's number and a weight")
    if not terms:
        raise ValueError("terms is empty: at least one head must count")
    kinds = sorted({kind for kind, _, _ in terms})

    def score(view: LayerView) -> torch.Tensor:
        attention = view.by_head(*kinds)
        heads = next(iter(attention.values())).shape[1]
        if beyond := [head for _, head, _ in terms if not 0 <= head < heads]:
            raise ValueError(f"terms name head {beyond[0]}: the model has heads 0 to {heads - 1}")
        weight = {kind: torch.zeros(heads, device=view.image.device) for kind in kinds}
        for kind, head, value in terms:
            weight[kind][head] += float(value)
        return torch.stack([torch.einsum("bhm,h->bm", attention[kind], weight[kind]) for kind in kinds]).sum(0)

    return score


def debiased(profile: Sequence[float]) -> Callable[[LayerView], torch.Tensor]:
    """Make a scorer of cross attention divided by what a token's place in the image receives anyway.

    Args:
        profile: mean attention along the image's tokens, first to last; it is read at the nearest entry.

    Raises:
        ValueError: the profile is empty, all 0, or holds anything but numbers of at least 0.
    """
    usable = isinstance(profile, (list, tuple)) and all(is_number(value) and value >= 0 for value in profile)
    if not usable or not any(profile):
        raise ValueError(
            f"profile={short(profile)}: must hold a mean attention, 0 or more, for at least one place, and not 0 for "
            "all; fit the recipe again"
        )

    def score(view: LayerView) -> torch.Tensor:
        usual = torch.tensor(profile, dtype=torch.float32, device=view.image.device)
        images = view.prompt.images.to(view.image.device)  # all tokens, those that left too
        number, size = torch.zeros_like(images), torch.ones_like(images)
        for image in range(int(images.max()) + 1):
            member = images == image
            number = torch.where(member, member.long().cumsum(1) - 1, number)
            size = torch.where(member, member.sum(1, keepdim=True), size)
        place = (number * len(usual) // size).gather(1, view.column.clamp(min=0))
        return cross_mean(view) / (usual[place] + usual.mean() / 10)

    return score


def is_number(value: Any) -> bool:
    """Whether a value is a number that fp32 can hold."""
    largest = torch.finfo(torch.float32).max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def kind_of(value: Any) -> str | None:
    """Name the kind of a parameter's value; None for what no recipe holds, and for None, which says nothing."""
    if is_number(value):
        return "a number"
    kinds: dict[Any, str] = {bool: "true or false", str: "text", (list, tuple): "a list", Mapping: "an object"}
    return next((kind for types, kind in kinds.items() if isinstance(value, types)), None)
