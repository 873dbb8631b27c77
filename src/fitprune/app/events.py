"""What each control of the page does. All of it goes through `screen`; here is only what Gradio needs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from fitprune._support.messages import line, short
from fitprune._support.page import escape
from fitprune.app import fragments, screen
from fitprune.app.python_lines import Source, python_lines
from fitprune.app.recipes import FITTED, Choice
from fitprune.app.screen import Screen
from fitprune.app.served import ServedModel
from fitprune.baselines.table import BASELINES
from fitprune.calibration.samples import load_samples

BUDGETS = (0, 40, 60, 80, 90)  # that are compared
MEASURED = "digit-scenes/calibration"  # where the operator names no data
REFUSED = "That does not work"


def refusing(*, html: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a control say in one line what is wrong with what a person sends, and nothing else of an error.

    Args:
        html: whether the line is shown in the page, where it is HTML.
    """

    def refusal(error: Exception) -> gr.Error:
        text = line(error, 400)
        return gr.Error(escape(text) if html else text, title=REFUSED, print_exception=False)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def each(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except ValueError as error:
                raise refusal(error) from None

        @functools.wraps(function)
        def once(*args: Any) -> Any:
            try:
                return function(*args)
            except ValueError as error:
                raise refusal(error) from None

        return each if inspect.isgeneratorfunction(function) else once

    return wrap


def _number(event: gr.EventData) -> Any:
    """Read the number that a press in the page sends; None where a program sends none."""
    return getattr(event, "number", None)


class Events:
    """What the controls do. Each gives the values of what changes.

    Args:
        served: the model.
        source: where it comes from, for the Python lines.
        examples: pictures with a question each.
        title: what is served.
        first: what is on the screen when the page opens.
    """

    def __init__(
        self,
        served: ServedModel,
        source: Source,
        examples: Sequence[tuple[Path, str]],
        title: str,
        first: Screen | None = None,
    ) -> None:
        self.served, self.source, self.title, self.first = served, source, title, first
        self.examples = list(examples)

    @refusing()
    def example(self, event: gr.EventData) -> tuple[str, str]:
        """Put an example's picture and question into their places."""
        number = _number(event)
        if type(number) is not int or not 0 <= number < len(self.examples):
            raise ValueError(f"example {short(number)}: must be from 0 to {len(self.examples) - 1}; press one")
        path, question = self.examples[number]
        return str(path), question

    def opened(self) -> tuple[Any, ...]:
        """Give a new visitor the first screen, and say what there is by now."""
        return self.first, *self._about()

    @refusing()
    def run(self, *inputs: Any) -> Iterator[tuple[Any, ...]]:
        """Answer, token by token, and then show what is left."""
        for now in screen.run(self.served, screen.read_request(self.served, *inputs)):
            yield self._outputs(now)

    @refusing()
    def look(self, before: Screen | None, picture: str | None, *inputs: Any) -> tuple[Any, ...]:
        """Show what is left by another choice; an answer that is there stays, as that of the choice before."""
        if picture is None or not str(inputs[0]).strip():  # before the rest is there, nothing is wrong
            return (gr.skip(),) * 6
        request = screen.read_request(self.served, picture, *inputs)
        return self._outputs(screen.look(self.served, request, before))

    def changed(self, now: Screen | None, picture: str | None, question: str) -> tuple[Any, ...]:
        """Say that the answers are to another question or picture, while nothing new was run."""
        if now is None or now.answered is None:
            return gr.skip(), gr.skip(), gr.skip()
        fresh = (picture and Path(picture).name, question.strip()) == (now.request.picture.name, now.request.question)
        if fresh == now.fresh:
            return gr.skip(), gr.skip(), gr.skip()
        now = dataclasses.replace(now, fresh=fresh)
        return now, *fragments.answers(now, self.served.decode)

    def stopped(self, now: Screen | None) -> tuple[str, str]:
        """Show the answers as they are, after the run that made them was cancelled."""
        self.served.wait()  # what it had to say lies before this
        return fragments.answers(now, self.served.decode)

    @refusing()
    def word(self, now: Screen | None, event: gr.EventData) -> tuple[Any, ...]:
        """Show what the model looked at when it wrote a word; pressed again, the scores."""
        if now is None:
            raise ValueError("nothing is on the screen any more: press Run")
        number = None if _number(event) == now.word else _number(event)
        attention = None if number is None else screen.attention_of(self.served, now, number)
        now = dataclasses.replace(now, word=number)
        return now, fragments.answers(now, self.served.decode)[0], fragments.layers(now, attention)

    @refusing()
    def budgets(self, *inputs: Any) -> Iterator[str]:
        """Answer at several budgets."""
        request = screen.read_request(self.served, *inputs)
        if request.choice.recipe is not None:
            raise ValueError(f"{request.choice.method}: has one budget of its own; choose a method, to compare budgets")
        choices = [dataclasses.replace(request.choice, percent=percent) for percent in BUDGETS]
        yield from self._compare("budget", request, {f"{choice.percent:g}%": choice for choice in choices})

    @refusing()
    def methods(self, *inputs: Any) -> Iterator[str]:
        """Answer by every method."""
        request = screen.read_request(self.served, *inputs)
        choices = {name: Choice(request.choice.percent, name) for name in BASELINES}
        yield from self._compare("method", request, {"dense": Choice(0), **choices})

    def _compare(self, first: str, request: screen.Request, choices: dict[str, Choice]) -> Iterator[str]:
        rows: list[tuple[str, Screen | ValueError]] = []
        for name, answer in zip(choices, screen.compare(self.served, request, list(choices.values())), strict=True):
            rows.append((name, answer))
            yield fragments.comparison(first, request, rows, self.served.decode)

    @refusing()
    def measure(self, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008  # how Gradio passes it
        """Measure statistics, unless somebody has done so."""
        if self.served.recipes.fitter is None:
            samples = load_samples(MEASURED)
            lines = f"samples = fitprune.load_samples({MEASURED!r})\nstats = fitprune.measure(model, "
            lines += "fitprune.make_batches(samples, processor))"
            self.served.measure(samples, lambda done: progress((done, len(samples)), unit="samples"), lines)
        return self._about()

    @property
    def usual_method(self) -> str:
        """FitPrune's own where there are statistics, else a recipe of the operator's, else one that needs none."""
        if self.served.recipes.fitter is not None:
            return FITTED
        return next((name for name in self.served.recipes.methods if name not in BASELINES), "uniform")

    def _about(self) -> tuple[Any, ...]:
        about, needed = fragments.about(self.served, self.title), self.served.recipes.fitter is None
        return about, gr.Button(visible=needed), gr.Dropdown(value=self.usual_method)

    @refusing(html=False)
    def answer(
        self, picture: str | None, question: str, budget: float, method: str, scorer: str, tokens: float
    ) -> dict[str, Any]:
        """Answer a program, as plain data."""
        request = screen.read_request(self.served, picture, question, budget, method, scorer, tokens)
        *_, last = screen.run(self.served, request)
        return screen.facts(self.served, last)

    def _outputs(self, now: Screen) -> tuple[Any, ...]:
        running = now.kept is None
        always = now, *fragments.answers(now, self.served.decode, running=running), fragments.costs(now)
        if running:
            return *always, gr.skip(), gr.skip()
        return *always, fragments.layers(now), python_lines(now, self.source, self.served.recipes.statistics)
