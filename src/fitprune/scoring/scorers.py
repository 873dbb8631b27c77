"""Scorers: pure functions that rank a layer's visual tokens for removal, lowest first.

A scorer looks at a `fitprune.scoring.view.LayerView`; shapes as there. Each has a name in `SCORERS` and perhaps
parameters, so that a recipe can hold it as data: {"name": ..., "parameters": {...}}. Every scorer takes the
parameter `diversity`. A scorer of your own gets a name by an entry in `SCORERS`: its parameters -> `Scorer`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fitprune.recipes.recipe import scorer_parts, short
from fitprune.scoring.diversity import dpp_order, least_similar_order, max_min_order, relevant_and_different
from fitprune.scoring.received import HEAD_KINDS
from fitprune.scoring.view import LayerView

Score = Callable[[LayerView], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to rank visual tokens.

    Attributes:
        score: from a layer's view to scores [B, m], higher is kept.
        query_aware: whether it reads cross attention. If not, none is computed, prompts need no question, and what is
            kept does not depend on any: such a cache can serve many questions.
        reads_vision: whether it reads the attention of the vision tower's [CLS] token.
        accumulates: whether it reads the attention of all layers so far (`view.prompt.received`), which is then
            computed in each layer up to the last that removes.
        reads_previous: whether it reads the layer before, so that it works only where tokens leave before a layer.
    """

    score: Score
    query_aware: bool = True
    reads_vision: bool = False
    accumulates: bool = False
    reads_previous: bool = False


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


def cross_alone(view: LayerView) -> torch.Tensor:
    """Score tokens by received cross attention, maximum over heads, [B, m].

    Source: the cross half of arXiv:2409.10197's score.
    """
    return view.cross_attention


def cross_mean(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the question's rows, mean over rows and heads, [B, m]."""
    return view.by_head("mean")["mean"].mean(1)


def by_last_row(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the prompt's last token, mean over heads, [B, m].

    Source: FastV (arXiv:2403.06764) and PyramidDrop (arXiv:2410.17247).
    """
    return view.last_attention


def value_weighted(view: LayerView) -> torch.Tensor:
    """Score tokens by what they add to the question's rows: attention x norm of the value, maximum over heads, [B, m].

    Source: the norm of the value counts as well as the weight (Kobayashi et al., arXiv:2004.10102).
    """
    return (view.by_head("mean")["mean"] * view.value_norms).amax(1)


def accumulated(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the question's rows in all layers so far, mean over heads, [B, m].

    Raises:
        ValueError: no layer has run yet.
    """
    return view.prompt.received.to(view.column.device).gather(1, view.column.clamp(min=0))


def by_place(view: LayerView) -> torch.Tensor:
    """Score tokens by their place: the first leave first, [B, m]. For methods that do not rank."""
    return view.place.float()


def by_cls(view: LayerView) -> torch.Tensor:
    """Score tokens by the attention of the vision tower's [CLS] token, [B, m].

    Source: the dominant tokens of VisionZip (arXiv:2412.04467).
    """
    return view.cls_attention


def by_max_min(view: LayerView) -> torch.Tensor:
    """Score tokens by when DivPrune picks them, the first highest, [B, m]."""
    return _by_order(view, lambda b, rows, count: max_min_order(view.hidden[b, rows], count))


def by_dpp(view: LayerView) -> torch.Tensor:
    """Score tokens by when CDPruner picks them, the first highest, [B, m].

    Relevance is the negated cosine between a visual token and the question's embeddings, scaled to 0..1 in the image.

    Source: CDPruner (arXiv:2506.10967). Differs from the authors' code: their negated cosine is in CLIP's joint space,
    which needs a text tower that LLaVA models in transformers do not hold; here it is in the decoder's input space.
    """

    def order(b: int, rows: torch.Tensor, count: int) -> torch.Tensor:
        unit = F.normalize(view.hidden[b, rows].float(), dim=1)
        words = F.normalize(view.hidden[b, view.question[b]].float(), dim=1)
        relevance = -(unit @ words.T).mean(1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min()).clamp(min=1e-6)
        return dpp_order(relevance[:, None] * (unit @ unit.T) * relevance[None], count)

    return _by_order(view, order)


def by_duplication(view: LayerView) -> torch.Tensor:
    """Score tokens by when DART picks them, the first highest, [B, m].

    Pivots are the four visual tokens and the four question tokens with the largest keys (L1 norm, in the layer before);
    picked are, pivot by pivot, the tokens least similar to it (cosine of the normed hidden states).

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
        asked = view.question[b].nonzero()[:, 0]
        largest = [part[size[b, part].argsort(descending=True, stable=True)[:4]] for part in (rows, asked)]
        first = torch.isin(rows, largest[0])
        place = {int(row): number for number, row in enumerate(rows)}
        own = torch.tensor([place[int(row)] for row in largest[0]], device=rows.device)
        by_pivot = torch.cat([own, (~first).nonzero()[:, 0]])  # the pivots, then the others
        features = hidden[b, rows[by_pivot]]
        picked = least_similar_order(features, hidden[b, torch.cat(largest)], len(own), count)
        return by_pivot[picked]

    return _by_order(view, order)


def _by_order(view: LayerView, order: Callable[[int, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Turn orders of picking into scores; `order` takes sample, rows and count, and gives places among the rows."""
    score = torch.zeros(view.image.shape, device=view.image.device)
    for b, counts in enumerate(view.left.tolist()):
        for group, count in enumerate(counts):
            rows = (view.group[b] == group).nonzero()[:, 0]
            if 0 < count < len(rows):
                picked = rows[order(b, rows, count)]
                score[b, picked] = torch.arange(count, 0, -1, device=score.device, dtype=score.dtype)
    return score


def _by_chance(seed: int) -> Score:
    """Score tokens by chance, the same at every layer; which number a sample has, `view.prompt.numbers` says."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed={short(seed)}: must be at least 0, a whole number")

    def score(view: LayerView) -> torch.Tensor:
        longest = int(view.place.max()) + 1
        # numpy: its streams begin alike whatever their length, so padding changes nothing.
        drawn = np.stack([np.random.default_rng([seed, number]).random(longest) for number in view.prompt.numbers])
        return torch.from_numpy(drawn).to(view.place.device).gather(1, view.place)

    return score


def _heads(terms: Sequence[Sequence[Any]]) -> Score:
    """Score tokens by a weighted sum over heads; `terms` are (kind, head, weight), kinds as in `head_attention`."""
    if not isinstance(terms, (list, tuple)):
        raise ValueError(f"terms={short(terms)}: must be a list of [kind, head, weight]")
    for term in terms:
        if (
            not isinstance(term, (list, tuple))
            or len(term) != 3
            or term[0] not in HEAD_KINDS
            or type(term[1]) is not int
            or not _is_number(term[2])
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


def _debiased(profile: Sequence[float]) -> Score:
    """Score tokens by cross attention over what their place in the image receives anyway, [B, m].

    `profile` is the mean attention along the image's tokens, first to last; it is read at the nearest entry.
    """
    usable = isinstance(profile, (list, tuple)) and all(_is_number(value) and value >= 0 for value in profile)
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


def _by_stage(stages: Mapping[str, Mapping[str, Any]]) -> Scorer:
    """Score with a scorer for each place where tokens leave: "3" is inside layer 3, "before 3" before it."""
    if not isinstance(stages, Mapping) or not stages:
        raise ValueError(f"stages={short(stages)}: must name a scorer for each place, such as '3' or 'before 3'")
    if any(isinstance(spec, Mapping) and spec.get("name") == "by-stage" for spec in stages.values()):
        raise ValueError("a stage names 'by-stage' again: must name another scorer")
    scorers = {place: get_scorer(spec) for place, spec in stages.items()}

    def score(view: LayerView) -> torch.Tensor:
        place = stage_name(view.layer, view.before)
        if place not in scorers:
            raise ValueError(f"tokens leave at {place!r}, for which the recipe names no scorer: fit it again")
        return scorers[place].score(view)

    reads = ("query_aware", "reads_vision", "accumulates", "reads_previous")
    return Scorer(score, **{name: any(getattr(scorer, name) for scorer in scorers.values()) for name in reads})


def stage_name(layer: int, before: bool) -> str:
    """Name a place where tokens leave, as the scorer "by-stage" does."""
    return f"before {layer}" if before else str(layer)


def _diverse(score: Score, weight: float) -> Score:
    """Trade a token's rank by `score` against its likeness to those kept already; see `relevant_and_different`."""

    def diverse(view: LayerView) -> torch.Tensor:
        value = checked_scores(score(view), view.image)
        picked = torch.zeros_like(value, dtype=torch.float32)
        for group in range(view.left.shape[1]):
            member = view.group == group
            picked = picked + relevant_and_different(value, view.hidden, member, view.left[:, group], weight)
        return picked

    return diverse


def _plain(score: Score, **options: Any) -> Callable[[], Scorer]:
    """A scorer without parameters; a partial of Scorer would take its fields for such."""
    return lambda: Scorer(score, **options)


def _is_number(value: Any) -> bool:
    """Whether fp32 can hold it."""
    largest = torch.finfo(torch.float32).max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


SCORERS: dict[str, Callable[..., Scorer]] = {
    "fitprune": _plain(self_times_cross),
    "self": _plain(self_alone, query_aware=False),
    "cross": _plain(cross_alone),
    "cross-mean": _plain(cross_mean),
    "last": _plain(by_last_row),
    "value": _plain(value_weighted),
    "accumulated": _plain(accumulated, accumulates=True),
    "heads": lambda terms: Scorer(_heads(terms)),
    "debiased": lambda profile: Scorer(_debiased(profile)),
    "by-stage": _by_stage,
    "random": lambda seed: Scorer(_by_chance(seed), query_aware=False),
    "place": _plain(by_place, query_aware=False),
    "cls": _plain(by_cls, query_aware=False, reads_vision=True),
    "max-min": _plain(by_max_min, query_aware=False),
    "dpp": _plain(by_dpp),
    "duplication": _plain(by_duplication, reads_previous=True),
}


def get_scorer(scorer: str | Scorer | Mapping[str, Any] | Score) -> Scorer:
    """Make a scorer of its name, of name and parameters as a recipe holds them, or take one as it is.

    A bare function counts as query-aware.

    Raises:
        ValueError: no scorer has that name, or a parameter is unknown, missing or out of range.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if callable(scorer):
        return Scorer(scorer)
    name, parameters = scorer_parts({"name": scorer} if isinstance(scorer, str) else scorer)
    if name not in SCORERS:
        raise ValueError(f"scorer={short(name)}: must be one of {sorted(SCORERS)} or a function of LayerView")
    diversity = parameters.pop("diversity", 0)
    if not _is_number(diversity) or diversity < 0:
        raise ValueError(f"scorer {name!r}: diversity={short(diversity)} must be a number of at least 0")
    known = list(inspect.signature(SCORERS[name]).parameters)
    if unknown := sorted(map(str, set(parameters) - set(known))):
        raise ValueError(f"scorer {name!r}: no parameter {short(unknown[0])}; must be among {[*known, 'diversity']}")
    if missing := [parameter for parameter in known if parameter not in parameters]:
        raise ValueError(f"scorer {name!r}: missing parameter {missing[0]!r}; state it, or fit the recipe again")
    try:
        made = SCORERS[name](**parameters)
    except ValueError as error:
        raise ValueError(f"scorer {name!r}: {error}") from None
    score = _diverse(made.score, diversity) if diversity else made.score
    return dataclasses.replace(made, score=score)


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
