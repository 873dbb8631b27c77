"""Scorers: pure functions that rank a layer's visual tokens for removal, lowest first.

A scorer looks at a `fitprune.views.LayerView`; shapes as there. Each has a name in `SCORERS` and perhaps parameters, so
that a recipe can hold it as data: {"name": ..., "parameters": {...}}. Every scorer takes the parameter `diversity`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fitprune.attention import HEAD_KINDS
from fitprune.diversity import relevant_and_different
from fitprune.views import LayerView

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
        spec: its name and parameters, as a recipe holds them; None for a scorer that has no name.
    """

    score: Score
    query_aware: bool = True
    reads_vision: bool = False
    accumulates: bool = False
    spec: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)


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
    received = view.prompt.received
    if received is None:
        raise ValueError("no layer has run before layer 0: with 'accumulated', remove inside it or later")
    return received.to(view.column.device).gather(1, view.column.clamp(min=0))


def _heads(terms: Sequence[Sequence[Any]]) -> Score:
    """Score tokens by a weighted sum over heads; `terms` are (kind, head, weight), kinds as in `head_attention`."""
    if not isinstance(terms, (list, tuple)):
        raise ValueError(f"terms={terms!r}: must be a list of [kind, head, weight]")
    for term in terms:
        if (
            not isinstance(term, (list, tuple))
            or len(term) != 3
            or term[0] not in HEAD_KINDS
            or type(term[1]) is not int
            or not _is_number(term[2])
        ):
            raise ValueError(f"terms={term!r}: must be a kind of {list(HEAD_KINDS)}, a head's number and a weight")
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
            f"profile={profile!r}: must hold a mean attention, 0 or more, for at least one place, and not 0 for all; "
            "fit the recipe again"
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
        raise ValueError(f"stages={stages!r}: must name a scorer for each place, such as '3' or 'before 3'")
    scorers = {place: get_scorer(spec) for place, spec in stages.items()}

    def score(view: LayerView) -> torch.Tensor:
        place = stage_name(view.layer, view.before)
        if place not in scorers:
            raise ValueError(f"tokens leave at {place!r}, for which the recipe names no scorer: fit it again")
        return scorers[place].score(view)

    return Scorer(
        score,
        any(s.query_aware for s in scorers.values()),
        any(s.reads_vision for s in scorers.values()),
        any(s.accumulates for s in scorers.values()),
    )


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
    spec: Mapping[str, Any] = {"name": scorer} if isinstance(scorer, str) else scorer
    if (
        not isinstance(spec, Mapping)
        or not set(spec) <= {"name", "parameters"}
        or not isinstance(spec.get("parameters", {}), Mapping)
    ):
        raise ValueError(
            f"scorer={scorer!r}: must be a name, an object with a 'name' and perhaps 'parameters', or a function of "
            "LayerView"
        )
    name, parameters = spec.get("name"), dict(spec.get("parameters", {}))
    if not isinstance(name, str) or name not in SCORERS:
        raise ValueError(f"scorer={name!r}: must be one of {sorted(SCORERS)} or a function of LayerView")
    diversity = parameters.pop("diversity", 0)
    if not _is_number(diversity) or diversity < 0:
        raise ValueError(f"scorer {name!r}: diversity={diversity!r} must be a number of at least 0")
    known = list(inspect.signature(SCORERS[name]).parameters)
    if unknown := sorted(map(str, set(parameters) - set(known))):
        raise ValueError(f"scorer {name!r}: no parameter {unknown[0]!r}; must be among {[*known, 'diversity']}")
    if missing := [parameter for parameter in known if parameter not in parameters]:
        raise ValueError(f"scorer {name!r}: missing parameter {missing[0]!r}; state it, or fit the recipe again")
    try:
        made = SCORERS[name](**parameters)
    except ValueError as error:
        raise ValueError(f"scorer {name!r}: {error}") from None
    score = _diverse(made.score, diversity) if diversity else made.score
    return dataclasses.replace(made, score=score, spec=spec)


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
