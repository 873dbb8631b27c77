"""What one person has on the screen: picture, question, what is left of the picture, answers. Knows no web page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fitprune.app.limits import Picture
from fitprune.app.recipes import Choice
from fitprune.app.served import Prompt, Pruning, ServedModel
from fitprune.app.turns import Answer
from fitprune.app.words import Word, marked, words_of
from fitprune.costs.cost import Cost
from fitprune.pictures.kept import KeptImage


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What a person asks.

    Attributes:
        picture: about which is asked.
        question: about the picture.
        choice: how tokens are to leave.
        tokens: the most of an answer.
    """

    picture: Picture
    question: str
    choice: Choice
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Screen:
    """What a person sees.

    Attributes:
        request: what it answers.
        pruning: the recipe, and the scorer.
        cost: of the prompt, beside dense.
        pruned: the pruned answer so far; None before it was asked for.
        dense: the dense one.
        words: of both answers, pruned first, once they have ended.
        answered: the choice that the answers were made with; None before there are some.
        kept: what is left of the picture; None until that is known.
        word: number of the pruned answer's word that is looked at; None for none.
        fresh: whether question and picture are still those in the page's controls.
    """

    request: Request
    pruning: Pruning
    cost: Cost
    pruned: Answer | None = None
    dense: Answer | None = None
    words: tuple[Sequence[Word], Sequence[Word]] = ((), ())
    answered: Choice | None = None
    kept: KeptImage | None = None
    word: int | None = None
    fresh: bool = True

    @property
    def current(self) -> bool:
        """Whether the answers are whole, and to what is in the page's controls."""
        return self.fresh and self.answered == self.request.choice and self.pruned is not None and self.pruned.done


def read_request(
    served: ServedModel,
    picture: str | None,
    question: object,
    percent: object,
    method: object,
    scorer: object,
    tokens: object,
) -> Request:
    """Check all that a person sends.

    Args:
        served: the model.
        picture: file of the picture.
        question: about it.
        percent: of the visual FLOPs to save.
        method: as for `Recipes.choice`.
        scorer: as there.
        tokens: the most of the answer.

    Raises:
        ValueError: something is missing or out of range; the message says what, and what to do.
    """
    limits = served.limits
    choice = served.recipes.choice(percent, method, scorer)
    text, most = limits.check_question(question), limits.check_answer(tokens)
    return Request(limits.read_picture(picture), text, choice, most)


def look(served: ServedModel, request: Request, before: Screen | None = None) -> Screen:
    """Find out what is left of a picture, without an answer.

    Args:
        served: the model.
        request: of `read_request`.
        before: what was on the screen; answers to the same question stay, as those of another choice.
    """
    screen, prompt = _begin(served, request)
    old = before.request if before else None
    if before and old and (old.question, old.picture.data) == (request.question, request.picture.data):
        answers = {name: getattr(before, name) for name in ("pruned", "dense", "words", "answered")}
        screen = dataclasses.replace(screen, **answers)
    return _with_kept(served, screen, prompt)


def run(served: ServedModel, request: Request) -> Iterator[Screen]:
    """Answer pruned and dense, token by token, and then find out what is left of the picture.

    Args:
        served: the model.
        request: of `read_request`.

    Yields:
        What is to be seen so far.

    Raises:
        ValueError: the recipe cannot be made, or the processor refuses the prompt.
    """
    screen, prompt = _begin(served, request)
    with contextlib.closing(served.answers(prompt, screen.pruning, request.tokens)) as answers:
        for pruned, dense in answers:
            screen = dataclasses.replace(screen, pruned=pruned, dense=dense, answered=request.choice)
            yield screen
    own, other = marked([words_of(answer.ids, served.decode) for answer in (screen.pruned, screen.dense) if answer])
    yield _with_kept(served, dataclasses.replace(screen, words=(own, other)), prompt)


def attention_of(served: ServedModel, screen: Screen, number: int) -> torch.Tensor:
    """Say what the model looked at when it wrote a word of the pruned answer, [visual tokens].

    Args:
        served: the model.
        screen: with the answer.
        number: of the word, from 0.

    Raises:
        ValueError: there is no such word.
    """
    if not screen.current or screen.pruned is None:
        raise ValueError("the answer is of other choices than those on the page: press Run, and then a word")
    words = screen.words[0]
    if type(number) is not int or not 0 <= number < len(words):
        raise ValueError(f"word={number!r}: the answer has {len(words)} words, counted from 0; press one of them")
    prompt = served.prompt(screen.request.picture, screen.request.question)
    return served.attention_of(prompt, screen.pruning, screen.pruned.ids, words[number].tokens)


def compare(served: ServedModel, request: Request, choices: Sequence[Choice]) -> Iterator[Screen | ValueError]:
    """Answer by several choices, one after another.

    Args:
        served: the model.
        request: whose choice is left out.
        choices: what to compare.

    Yields:
        For each choice its screen, or why there is none.
    """
    for choice in choices:
        try:
            screen, prompt = _begin(served, dataclasses.replace(request, choice=choice))
            for [answer] in served.answers(prompt, screen.pruning, request.tokens, dense=False):
                screen = dataclasses.replace(screen, pruned=answer)
            yield screen
        except ValueError as error:
            yield error


def _begin(served: ServedModel, request: Request) -> tuple[Screen, Prompt]:
    prompt = served.prompt(request.picture, request.question)
    recipe = served.recipes.make(request.choice, prompt.sizes[0])
    pruning = Pruning(recipe, request.choice.scorer or None)
    return Screen(request, pruning, served.cost(prompt, recipe)), prompt


def _with_kept(served: ServedModel, screen: Screen, prompt: Prompt) -> Screen:
    [kept] = served.kept(prompt, screen.request.picture, screen.pruning)
    return dataclasses.replace(screen, kept=kept)


def facts(served: ServedModel, screen: Screen) -> dict[str, Any]:
    """Say what is on the screen as plain data, for programs."""

    def of(answer: Answer | None) -> dict[str, Any] | None:
        if answer is None:
            return None
        return {
            "text": served.decode(answer.ids).strip(),
            "tokens": len(answer.ids),
            "seconds_to_first_token": answer.first_seconds,
            "tokens_per_second": answer.tokens_per_second,
        }

    cost = dataclasses.asdict(screen.cost)
    return {
        "pruned": of(screen.pruned),
        "dense": of(screen.dense),
        "words_that_differ": [word.text for word in screen.words[0] if word.differs],
        "enter_layer": screen.kept.counts if screen.kept else None,
        "cost": {name: list(value) if isinstance(value, tuple) else value for name, value in cost.items()},
        "recipe": json.loads(screen.pruning.recipe.to_json()),
    }
