"""Scorers: pure functions that rank a layer's visual tokens for removal, lowest first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fitprune.attention import ReceivedAttention

Scorer = Callable[[ReceivedAttention], torch.Tensor]


def self_times_cross(received: ReceivedAttention) -> torch.Tensor:
    """Score tokens by received self attention x received cross attention, [B, N].

    Source: arXiv:2409.10197.
    """
    return received.self_attention * received.cross_attention


SCORERS: dict[str, Scorer] = {"fitprune": self_times_cross}


def get_scorer(scorer: str | Scorer) -> Scorer:
    """Look a scorer up by name, or take a function as it is.

    Raises:
        ValueError: no scorer has that name.
    """
    if callable(scorer):
        return scorer
    if scorer not in SCORERS:
        raise ValueError(f"scorer={scorer!r}: must be one of {sorted(SCORERS)} or a function of ReceivedAttention")
    return SCORERS[scorer]
