"""Choose a set of tokens that differ from each other: the orders in which to pick them, and the scorers made of these.

Shapes: n tokens, d features; of scorers as in `fitprune.scoring.view`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fitprune.scoring.view import LayerView


def by_max_min(view: LayerView) -> torch.Tensor:
    """Score tokens by when DivPrune picks them, the first highest; see `max_min_order`."""
    return _by_order(view, lambda b, rows, count: max_min_order(view.hidden[b, rows], count))


def by_dpp(view: LayerView) -> torch.Tensor:
    """Score tokens by when CDPruner picks them, the first highest; see `dpp_order`.

    Relevance is the negated cosine between a visual token and the question's embeddings, scaled to 0..1 in the image.

    Source: CDPruner (arXiv:2506.10967). Differs from the authors' code: their negated cosine is in CLIP's joint space,
    which needs a text tower that LLaVA models in transformers do not have; here it is in the decoder's input space.
    """

    def order(b: int, rows: torch.Tensor, count: int) -> torch.Tensor:
        unit = F.normalize(view.hidden[b, rows].float(), dim=1)
        words = F.normalize(view.hidden[b, view.question[b]].float(), dim=1)
        relevance = -(unit @ words.T).mean(1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min()).clamp(min=1e-6)
        return dpp_order(relevance[:, None] * (unit @ unit.T) * relevance[None], count)

    return _by_order(view, order)


def by_duplication(view: LayerView) -> torch.Tensor:
    """Score tokens by when DART picks them, the first highest; see `least_similar_order`.

    Pivots are the four visual tokens and the four question tokens with the largest keys (L1 norm, in the layer before);
    picked are, pivot by pivot, the tokens least similar to it (cosine of the normed hidden states).

    Args:
        view: before a layer from 1 on, with the view of the layer before it.

    Raises:
        ValueError: tokens left in the layer before, or there is none.

    Source: DART (arXiv:2502.11494) and its authors' code. Differs from it: pivots take turns in falling order of their
    keys, not in the order of a Python set.
    """
    previous = view.previous
    if previous is None:
        raise ValueError(
            "scorer 'duplication' reads the keys of the layer before: remove before a layer from 1 on, and only there"
        )
    size = previous.keys.float().abs().sum(2)
    hidden = view.prompt.norm(view.hidden)

    def order(b: int, rows: torch.Tensor, count: int) -> torch.Tensor:
        question = view.question[b].nonzero()[:, 0]
        largest = [part[size[b, part].argsort(descending=True, stable=True)[:4]] for part in (rows, question)]
        first = torch.isin(rows, largest[0])
        place = {int(row): number for number, row in enumerate(rows)}
        own = torch.tensor([place[int(row)] for row in largest[0]], device=rows.device)
        by_pivot = torch.cat([own, (~first).nonzero()[:, 0]])  # the pivots, then the others
        features = hidden[b, rows[by_pivot]]
        picked = least_similar_order(features, hidden[b, torch.cat(largest)], len(own), count)
        return by_pivot[picked]

    return _by_order(view, order)


def _by_order(view: LayerView, order: Callable[[int, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Turn orders of picking into scores [B, m].

    Args:
        view: the layer's.
        order: from a sample's number, its candidate rows and how many to pick, to the places picked among those rows.
    """
    score = torch.zeros(view.image.shape, device=view.image.device)
    for b, counts in enumerate(view.left.tolist()):
        for group, count in enumerate(counts):
            rows = (view.group[b] == group).nonzero()[:, 0]
            if 0 < count < len(rows):
                picked = rows[order(b, rows, count)]
                score[b, picked] = torch.arange(count, 0, -1, device=score.device, dtype=score.dtype)
    return score


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
        [count] int64, the own pivots first. The others are shared out evenly, the first pivots taking the remainder.

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
