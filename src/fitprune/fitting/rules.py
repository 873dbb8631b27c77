"""Which visual tokens leave: the rule of the fit and the rule of inference. They are two rules.

* The fit counts, per layer, the tokens that are in both lowest-attention sets. `lowest_in_both` is the paper's rule as
  the authors' fit runs it (`baselines.authors_fit`). `fit` has the same rule a second time, for all samples at
  once (`walk.Simulation`); `tests/fitting/test_rules.py` checks that the two are equal.
* Inference removes a number of tokens, those with the lowest score (`keep_highest`).

Pure tensor functions: no model. Legend: B samples, N tokens.
"""

from __future__ import annotations

import torch


def keep_highest(score: torch.Tensor, image: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Choose the tokens that stay: per image the `left` highest-scored ones, and everything that is not visual.

    Of equal scores the later token stays.

    Args:
        score: [B, N], higher is kept.
        image: [B, N] int64, number of the image each token belongs to, -1 for text.
        left: [B, images] int64, tokens that each image keeps.

    Returns:
        [B, N] bool, True where the token stays.

    Source: arXiv:2409.10197, the authors' `modeling_llama.py` (they sort ascending and cut the head of the list).
    """
    # By falling score, stably in the mirrored row, so that of equal scores the later token comes first; a token's rank
    # is then the number of its image's tokens before it.
    order = score.flip(1).argsort(dim=1, descending=True, stable=True)
    own = image.flip(1).gather(1, order)
    numbered = own.clamp(min=0)
    among = own[..., None] == torch.arange(left.shape[1], device=image.device)
    up_to = among.cumsum(1).gather(2, numbered[..., None])[..., 0]
    stays = (own < 0) | (up_to <= left.gather(1, numbered))
    return torch.empty_like(stays).scatter_(1, order, stays).flip(1)


def lowest_in_both(
    self_attention: torch.Tensor,
    cross_attention: torch.Tensor,
    present: torch.Tensor,
    self_floor: torch.Tensor,
    cross_floor: torch.Tensor,
) -> torch.Tensor:
    """Find the tokens that a layer can lose within a tolerance: in both lowest-attention sets.

    For each kind of attention, the set is the longest start of the ascending order that can leave while the tokens that
    remain still hold the floor.

    Args:
        self_attention: [B, N] received self attention, 0 or more.
        cross_attention: [B, N] received cross attention, 0 or more.
        present: [B, N] bool, visual tokens that are still there.
        self_floor: [B] attention that the remaining tokens must hold.
        cross_floor: [B], the same for cross attention.

    Returns:
        [B, N] bool, True where the token may leave.

    Source: arXiv:2409.10197, the authors' `statistical_analysis.py`.
    """
    return _removable(self_attention, present, self_floor) & _removable(cross_attention, present, cross_floor)


def _removable(attention: torch.Tensor, present: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    order = torch.where(present, attention, float("inf")).argsort(dim=1, stable=True)
    value = attention.masked_fill(~present, 0).gather(1, order)
    slack = value.sum(1) - floor
    removable = value.cumsum(1) <= slack[:, None]
    return torch.zeros_like(present).scatter_(1, order, removable) & present
