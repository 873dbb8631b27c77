"""Scorers by name: what ranks a layer's visual tokens for removal, lowest first.

A recipe holds a scorer as data, {"name": ..., "parameters": {...}}. Every scorer takes the parameter `diversity`.
docs/extending.md says how to add one of your own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from fitprune._support.messages import line
from fitprune._support.registry import Registry, failures_of
from fitprune.recipes.recipe import scorer_parts, short
from fitprune.scoring import attention_scorers as attention
from fitprune.scoring import diversity, fitted_scorers
from fitprune.scoring.announced import VIEW_FLAGS, Announced
from fitprune.scoring.view import LayerView

Score = Callable[..., torch.Tensor]  # of a LayerView, and of keyword-only parameters where the scorer is registered


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to rank visual tokens, and what it reads of a `LayerView`: nothing else is computed for it.

    Attributes:
        score: from a layer's view to scores [B, m], higher is kept. It gets a stand-in for the view, which shows what
            the flags announce, and must change nothing that it is shown. A change in place is refused, but for one
            through `.data` or a NumPy array of the same memory, which nothing notices. Under `inference_mode` it is
            shown copies.
        query_aware: whether it reads the question. If not, no cross attention is computed, prompts need no question,
            and of the question the stand-in shows the number of its tokens alone: text rows of `hidden`, `keys` and
            `value_norms` are 0. What is kept then depends on no question, and such a cache can serve many, unless the
            scorer draws by `prompt.numbers`, which are made of all ids.
        reads_vision: whether it reads the attention of the vision tower's [CLS] token.
        accumulates: whether it reads the cross attention of all layers up to this one (`view.prompt.received`), which
            is then computed in each layer up to the last that removes.
        reads_previous: whether it reads the layer before, so that it works only where tokens leave before a layer.
        name: for messages.

    Raises:
        ValueError: `score` is no function, a flag is not true or false, or `accumulates` without `query_aware`.
    """

    score: Score
    query_aware: bool = True
    reads_vision: bool = False
    accumulates: bool = False
    reads_previous: bool = False
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not callable(self.score):
            raise ValueError(f"score={short(self.score)}: must be a function of a LayerView")
        for flag in _FLAGS:
            if not isinstance(value := getattr(self, flag), bool):
                raise ValueError(f"{flag}={short(value)}: must be True or False")
        if self.accumulates and not self.query_aware:
            raise ValueError("accumulates=True: is attention of the question, so set query_aware=True too")

    def __call__(self, view: LayerView) -> torch.Tensor:
        """Score a layer's tokens [B, m].

        Args:
            view: the layer's.

        Raises:
            ValueError: `score` fails, reads what no flag announces, changes what it is shown, or what it returns is
                refused; see `checked_scores`.
        """
        name = f"scorer {self.name or getattr(self.score, '__name__', type(self.score).__name__)!r}"
        stand_in = Announced(view, vars(self), VIEW_FLAGS, [])
        if self.reads_previous and view.previous is None:
            name += " (no layer is shown as `previous` here: let tokens leave before a layer from 1 on, and only there)"
        with failures_of(name):
            score = self.score(cast(LayerView, stand_in))
        for part, tensor, version in stand_in._versions:
            if tensor._version != version:
                raise ValueError(f"{name} changes {part} of its view in place: must change nothing; clone it first")
        return checked_scores(score, view.image)


_FLAGS = ("query_aware", "reads_vision", "accumulates", "reads_previous")


def checked_scores(score: Any, image: torch.Tensor) -> torch.Tensor:
    """Refuse what a scorer must not return.

    Args:
        score: what it returned.
        image: [B, m] int64, number of the image each token belongs to, -1 for text.

    Raises:
        ValueError: it is no dense tensor [B, m] of real numbers on the view's device, or a visual token's score is NaN.
    """
    if not isinstance(score, torch.Tensor) or score.shape != image.shape:
        what = f"shape {list(score.shape)}" if isinstance(score, torch.Tensor) else f"type {type(score).__name__}"
        raise ValueError(f"the scorer returned {what}: must be a tensor {list(image.shape)}, a score for each token")
    if score.is_complex() or score.layout != torch.strided or score.device != image.device:
        raise ValueError(
            f"the scorer returned {score.dtype}, {score.layout}, on {score.device}: must be real numbers, dense, on "
            f"{image.device} as the view is"
        )
    if bool((score.isnan() & (image >= 0)).any()):
        raise ValueError("the scorer returned NaN for a visual token: scores must be numbers, or infinite")
    return score


def _by_stage(*, stages: Mapping[str, Mapping[str, Any]]) -> Scorer:
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
        return scorers[place](view)

    flags: dict[str, Any] = {flag: any(getattr(scorer, flag) for scorer in scorers.values()) for flag in _FLAGS}
    return Scorer(score, **flags)


def stage_name(layer: int, before: bool) -> str:
    """Name a place where tokens leave, as the scorer "by-stage" does."""
    return f"before {layer}" if before else str(layer)


def _diverse(score: Score, weight: float) -> Score:
    """Trade a token's rank by `score` against its likeness to those kept; see `diversity.relevant_and_different`."""

    def diverse(view: LayerView) -> torch.Tensor:
        value = checked_scores(score(view), view.image)
        picked = torch.zeros_like(value, dtype=torch.float32)
        for group in range(view.left.shape[1]):
            member, counts = view.group == group, view.left[:, group]
            picked = picked + diversity.relevant_and_different(value, view.hidden, member, counts, weight)
        return picked

    return diverse


# What is registered: a `Scorer`, a function of a view, or a function that makes a Scorer; see `register_scorer`.
Entry = Scorer | Callable[..., Any]

SCORERS: Registry[Entry] = Registry(
    "scorer",
    "fitprune.scorers",
    (Scorer, Callable),  # type: ignore[arg-type]  # isinstance takes it
    {
        "fitprune": attention.self_times_cross,
        "self": Scorer(attention.self_alone, query_aware=False),
        "cross": attention.cross_alone,
        "cross-mean": attention.cross_mean,
        "last": attention.by_last_row,
        "value": attention.value_weighted,
        "accumulated": Scorer(attention.accumulated, accumulates=True),
        "heads": lambda *, terms: Scorer(fitted_scorers.weighted_heads(terms)),
        "debiased": lambda *, profile: Scorer(fitted_scorers.debiased(profile)),
        "by-stage": _by_stage,
        "random": lambda *, seed: Scorer(attention.by_chance(seed), query_aware=False),
        "place": Scorer(attention.by_place, query_aware=False),
        "cls": Scorer(attention.by_cls, query_aware=False, reads_vision=True),
        "max-min": Scorer(diversity.by_max_min, query_aware=False),
        "dpp": diversity.by_dpp,
        "duplication": Scorer(diversity.by_duplication, reads_previous=True),
    },
)


def register_scorer(name: str, scorer: Entry, *, replace: bool = False) -> None:
    """Give a scorer a name in this process, by which recipes can hold it.

    For every process, install a package with an entry point of that name in the group "fitprune.scorers"; its object is
    what `scorer` is here.

    Args:
        name: letters, digits, "-", "_" and "."; no name of fitprune's own or one that is registered already.
        scorer: one of three. A function of a view, `def late(view, *, power=1.0)`, which counts as query-aware.
            `Scorer(late, query_aware=False)`, which announces what it reads. Where the parameters decide that, or are
            to be checked before a model runs: a function that makes a Scorer, `def late(*, power=1.0)`. Keyword-only
            arguments are the parameters, which a recipe holds as numbers, text, lists or objects. One without a default
            must be in the recipe; one with a default must be of its kind.
        replace: take the place of a scorer that was registered under this name.

    Raises:
        ValueError: the name is taken or not allowed, or `scorer` has another form.
    """
    if callable(scorer):
        _signature(name, scorer)
    SCORERS.add(name, scorer, replace=replace)


def get_scorer(scorer: str | Scorer | Mapping[str, Any] | Score) -> Scorer:
    """Make a scorer of its name, of name and parameters as a recipe holds them, or take one as it is.

    Args:
        scorer: a name in `SCORERS`, {"name": ..., "parameters": {...}}, a Scorer, or a function of a LayerView, which
            counts as query-aware.

    Raises:
        ValueError: no scorer has that name, or a parameter is unknown, missing or out of range.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if callable(scorer):
        return Scorer(scorer)
    name, parameters = scorer_parts({"name": scorer} if isinstance(scorer, str) else scorer)
    entry = _entry(name)
    weight = parameters.pop("diversity", 0)
    if not fitted_scorers.is_number(weight) or weight < 0:
        raise ValueError(f"scorer {name!r}: diversity={short(weight)} must be a number of at least 0")
    takes_view, known = _signature(name, entry)
    if unknown := sorted(map(str, set(parameters) - set(known))):
        raise ValueError(f"scorer {name!r}: no parameter {short(unknown[0])}; must be among {[*known, 'diversity']}")
    for parameter, default in known.items():
        if parameter not in parameters and default is inspect.Parameter.empty:
            raise ValueError(f"scorer {name!r}: missing parameter {parameter!r}; state it, or fit the recipe again")
        value, kind = parameters.get(parameter, default), fitted_scorers.kind_of(default)
        if kind and fitted_scorers.kind_of(value) != kind:
            raise ValueError(f"scorer {name!r}: {parameter}={short(value)}: must be {kind}, as {short(default)} is")
    try:
        scorer = _with_parameters(entry, takes_view, parameters)
    except ValueError as error:
        raise ValueError(f"scorer {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        why = f"failed: {type(error).__name__}: {line(error, 200)}"
        raise ValueError(f"scorer {name!r} with parameters {short(parameters)} {why}") from error
    return dataclasses.replace(scorer, name=name, score=_diverse(scorer.score, weight) if weight else scorer.score)


def parameters_of(name: str) -> list[str]:
    """Name the parameters that a scorer takes, but for `diversity`; a ValueError says that there is no such scorer."""
    return list(_signature(name, _entry(name))[1])


def _entry(name: str) -> Entry:
    """Find what is registered under a name, or refuse the name."""
    if name not in SCORERS:
        raise ValueError(
            f"scorer={short(name)}: must be one of {', '.join(sorted(SCORERS))}; install the package that has it, or "
            "register_scorer it"
        )
    return SCORERS[name]


def _with_parameters(entry: Entry, takes_view: bool, parameters: dict[str, Any]) -> Scorer:
    """Make a scorer of what is registered and of the parameters that a recipe holds."""
    if not takes_view:
        scorer = cast(Callable[..., Any], entry)(**parameters)
        if not isinstance(scorer, Scorer):
            raise ValueError(f"its function gave a {type(scorer).__name__}: must give a Scorer, or take a view")
        return scorer
    scorer = entry if isinstance(entry, Scorer) else Scorer(entry)
    return dataclasses.replace(scorer, score=functools.partial(scorer.score, **parameters)) if parameters else scorer


def _signature(name: str, entry: Entry) -> tuple[bool, dict[str, Any]]:
    """Read whether what is registered takes a view, and its parameters with their defaults.

    Args:
        name: for messages.
        entry: what has this name; see `register_scorer`.

    Raises:
        ValueError: its arguments have another form, or a default is nothing that a recipe holds.
    """
    function = entry.score if isinstance(entry, Scorer) else entry
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"scorer {name!r}: has no signature to read; wrap it in a function of a view") from None
    views = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) and a.default is a.empty]
    known = {a.name: a.default for a in arguments if a.kind == a.KEYWORD_ONLY}
    if len(views) + len(known) < len(arguments) or not isinstance(entry, Scorer) <= len(views) <= 1:
        raise ValueError(
            f"scorer {name!r}: takes {inspect.signature(function)}; must take a view, then keyword-only parameters, as "
            "`def late(view, *, power=1.0)` does; or these parameters alone, and give a Scorer"
        )
    if "diversity" in known:
        raise ValueError(f"scorer {name!r}: takes 'diversity', which every scorer has; choose another name for it")
    for parameter, default in known.items():
        if default is not None and default is not inspect.Parameter.empty and not fitted_scorers.kind_of(default):
            raise ValueError(
                f"scorer {name!r}: {parameter}={short(default)}: a default must be what a recipe can hold: a number, "
                "text, a list, an object or None"
            )
    return bool(views), known
