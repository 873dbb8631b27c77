"""Choose a set of tokens that differ from each other. Pure tensor functions; no model.

Shapes: n tokens, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def max_min_order(features: torch.Tensor, count: int) -> torch.Tensor:
    """Pick tokens so that the least distance between any two picked is large: greedy max-min, cosine distance.

    First comes the token whose nearest neighbour is farthest, then each time the one farthest from all picked.

    Args:
        features: [n, d].
        count: tokens to pick, at most n.

    Returns:
        [count] int64, in the order in which they are picked.

    Source: DivPrune (Alvar et al., arXiv:2503.02175) and its authors' code. Differs from it: fp32 whatever the model's
    type, and a token is never picked twice.
    """
    unit = F.normalize(features.float(), dim=1)
    distance = 1 - unit @ unit.T
    nearest = distance.topk(min(2, len(distance)), dim=0, largest=False).values[-1]  # the nearest of all is itself
    picked: list[int] = []
    for _ in range(count):
        nearest[picked] = -torch.inf
        picked.append(int(nearest.argmax()))
        nearest = distance[picked[-1]].clone() if len(picked) == 1 else torch.minimum(nearest, distance[picked[-1]])
    return torch.tensor(picked, dtype=torch.long, device=features.device)


def dpp_order(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """Pick tokens by greedy MAP inference of a determinantal point process.

    Args:
        kernel: [n, n], symmetric, positive semidefinite.
        count: tokens to pick, at most n.

    Returns:
        [count] int64, in the order in which they are picked.

    Source: Chen et al., arXiv:1709.05135, as CDPruner (arXiv:2506.10967) uses it. Differs from the latter's code: where
    the kernel has no rank left the next token is picked all the same, instead of NaN.
    """
    gain = kernel.diagonal().clone()
    rows = kernel.new_zeros(count, len(kernel))
    picked: list[int] = []
    for step in range(count):
        token = int(gain.argmax())
        scale = gain[token].clamp(min=1e-12).sqrt()
        rows[step] = (kernel[token] - rows[:step, token] @ rows[:step]) / scale
        gain = gain - rows[step] ** 2
        picked.append(token)
        gain[picked] = -torch.inf
    return torch.tensor(picked, dtype=torch.long, device=kernel.device)


def least_similar_order(features: torch.Tensor, pivots: torch.Tensor, own: int, count: int) -> torch.Tensor:
    """Pick, for one pivot after the other, the tokens that resemble it least.

    Args:
        features: [n, d] of the tokens.
        pivots: [p, d]; the first `own` of them are tokens 0, 1, ... themselves, and are picked first.
        own: pivots that are tokens.
        count: tokens to pick, at most n.

    Returns:
        [count] int64, the own pivots first. The others are shared out evenly, the first pivots taking what is over.

    Source: DART (Wen et al., arXiv:2502.11494) and its authors' code. Differs from it: exactly `count` tokens, where
    the authors keep 4 + 8 * floor(count / 8).
    """
    similarity = F.normalize(pivots.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    picked = list(range(min(own, count)))
    share, over = divmod(count - len(picked), max(len(pivots), 1))
    for number in range(len(pivots)):
        similarity[:, picked] = torch.inf
        take = share + (number < over)
        picked += similarity[number].topk(take, largest=False).indices.tolist()
    return torch.tensor(picked, dtype=torch.long, device=features.device)


def relevant_and_different(
    relevance: torch.Tensor, features: torch.Tensor, member: torch.Tensor, counts: torch.Tensor, weight: float
) -> torch.Tensor:
    """Pick, one after the other, the token with the best rank of relevance less its likeness to those picked.

    Likeness is the largest cosine to a picked token, of features less their mean over the image, and at least 0.

    Args:
        relevance: [B, n]; only its order counts. Of equal ones the later token ranks higher.
        features: [B, n, d].
        member: [B, n] bool, the tokens to pick from.
        counts: [B] int64, tokens to pick, at most as many as there are.
        weight: of likeness; ranks run from 0 to 1.

    Returns:
        [B, n] fp32: the sample's count at the token picked first, 1 at the last, 0 elsewhere.

    Source: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).
    """
    among = member.sum(1, keepdim=True)
    rising = relevance.argsort(dim=1, stable=True)
    rising = rising.gather(1, member.gather(1, rising).int().argsort(dim=1, stable=True))  # members last
    number = torch.arange(1, member.shape[1] + 1, device=member.device).expand_as(rising)
    rank = torch.empty_like(rising).scatter_(1, rising, number) - (member.shape[1] - among)
    value = (rank / among.clamp(min=1)).masked_fill(~member, -torch.inf)
    features = features.float().masked_fill(~member[..., None], 0)
    mean = features.sum(1, keepdim=True) / among.clamp(min=1)[..., None]
    unit = F.normalize((features - mean) * member[..., None], dim=2)
    likeness, picked = torch.zeros_like(value), torch.zeros_like(value)
    rows = torch.arange(len(value), device=value.device)
    for step in range(int(counts.max()) if len(counts) else 0):
        token = (value - weight * likeness).argmax(1)
        picked[rows, token] += (counts - step).clamp(min=0)  # nothing for a sample that has all it may keep
        value[rows, token] = -torch.inf
        likeness = torch.maximum(likeness, (unit @ unit[rows, token, :, None])[..., 0])
    return picked
