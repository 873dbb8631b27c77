"""The page of the app, and what each control does. All of it goes through `screen`; here is only what Gradio needs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from fitprune._support.messages import line, short
from fitprune._support.page import Html, escape
from fitprune._support.text_tables import plural
from fitprune.app import fragments, screen
from fitprune.app.python_lines import Source, python_lines
from fitprune.app.recipes import FITTED, MOST_PERCENT, Choice
from fitprune.app.screen import Screen
from fitprune.app.served import ServedModel
from fitprune.baselines.table import BASELINES
from fitprune.calibration.samples import load_samples
from fitprune.pictures.example import Example
from fitprune.pictures.player import Heat, play, player
from fitprune.scoring.scorers import SCORERS, get_scorer

MEASURED = "digit-scenes/calibration"  # what is measured where the operator names no data
REFUSED = "That does not work"
BUDGETS = (0, 40, 60, 80, 90)  # that the page compares
_PLAY = f"""{play()}
let state = {{}};
const start = () => {{
  const figure = element.querySelector('figure.kept');
  if (!figure) return;
  if (state.stop) state.stop();  // the elements may be the same ones, with other data
  const heat = figure.querySelector('[type=checkbox]');
  state = play(figure, {{layer: state.layer, box: state.box, heat: state.heat || !!heat && heat.defaultChecked}});
}};
start();
watch('value', start);"""
_PRESS = """element.addEventListener('click', event => {
  const word = event.target.closest('[data-word]');
  if (word) trigger('word', {number: +word.dataset.word});
});"""
_CHOOSE = """element.addEventListener('click', event => {
  const example = event.target.closest('[data-example]');
  if (example) trigger('example', {number: +example.dataset.example});
});"""
_EMPTY = Html("<p class=small>Choose a picture, ask, and press Run: here the tokens that are left are shown.</p>")


def build(
    served: ServedModel,
    source: Source,
    examples: Sequence[tuple[Path, str]],
    title: str,
    first: Screen | None = None,
) -> gr.Blocks:
    """Make the page.

    Args:
        served: the model.
        source: where it comes from, for the Python lines.
        examples: pictures with a question each.
        title: what is served.
        first: what is on the screen when the page opens.
    """
    limits, recipes = served.limits, served.recipes
    with gr.Blocks(title="fitprune", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        state = gr.State(first, time_to_live=3600)
        with gr.Row():
            about = _html(_about(served, title), elem_id="about")
            measure = gr.Button(
                "Measure statistics", visible=recipes.fitter is None, elem_id="measure", min_width=120, scale=0
            )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                picture = _Picture(
                    str(examples[0][0]) if examples else None, type="filepath", image_mode=None, height=220,
                    sources=["upload", "clipboard", "webcam"], label="Picture", elem_id="picture",
                )  # fmt: skip
                chosen = _html(fragments.examples(examples), js_on_load=_CHOOSE, elem_id="examples")
                question = gr.Textbox(
                    examples[0][1] if examples else "", label="Question", max_length=limits.question, lines=1,
                    elem_id="question",
                )  # fmt: skip
                budget = gr.Slider(
                    0, MOST_PERCENT, 60, step=1, label="Budget: percent of the visual FLOPs to save", elem_id="budget"
                )
                method = gr.Dropdown(
                    recipes.methods, value=_default_method(served), label="Method or recipe", elem_id="method"
                )
                with gr.Accordion("More", open=False):
                    scorer = gr.Dropdown(
                        [("the method's own", ""), *_scorers()], value="", label="Scorer", elem_id="scorer"
                    )
                    tokens = gr.Slider(1, limits.answer, limits.usual_answer, step=1, label="Most tokens of an answer")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=120)
            with gr.Column(scale=3, min_width=320):
                pruned, dense = fragments.answers(first, served.decode)
                with gr.Row(equal_height=True):
                    pruned_answer = _html(pruned, js_on_load=_PRESS, elem_id="pruned", min_width=150)
                    dense_answer = _html(dense, elem_id="dense", min_width=150)
                costs = _html(fragments.costs(first), elem_id="costs")
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Layers"):
                        layers = _html(_layers(first), js_on_load=_PLAY, elem_id="layers")
                    with gr.Tab("Budgets"):
                        by_budget = gr.Button(f"Answer at {', '.join(f'{n}%' for n in BUDGETS)}", elem_id="by-budget")
                        budgets = _html("", elem_id="budgets")
                    with gr.Tab("Methods"):
                        by_method = gr.Button("Answer by every method, at this budget", elem_id="by-method")
                        methods = _html("", elem_id="methods")
                    with gr.Tab("Python"):
                        lines = python_lines(first, source, recipes.statistics) if first else ""
                        code = gr.Textbox(
                            lines, label="Copy as Python", lines=12, max_lines=40, buttons=["copy"], interactive=False,
                            elem_id="python",
                        )  # fmt: skip
        asked = [picture, question, budget, method, scorer, tokens]
        seen = [state, pruned_answer, dense_answer, costs, layers, code]
        events = _Events(served, source, examples, title)
        # One pass at a time: all that runs the model waits in one queue, which says how long it is.
        device: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **device}
        loud = {"show_progress": "minimal", "show_progress_on": [costs], **device}
        running = [
            gr.on([run.click, question.submit, budget.release], events.run, asked, seen, **loud),
            by_budget.click(
                events.budgets, asked, budgets, show_progress_on=[budgets], **_but(loud, "show_progress_on")
            ),
            by_method.click(
                events.methods, asked, methods, show_progress_on=[methods], **_but(loud, "show_progress_on")
            ),
        ]
        measure.click(
            events.measure, None, [about, measure, method], show_progress_on=[about], trigger_mode="once", **device
        )
        stop.click(None, cancels=running, api_visibility="private")
        moved = [budget.input, picture.input, method.input, scorer.input]
        gr.on(moved, events.look, [state, *asked], seen, **quiet)
        chosen.example(
            events.example, None, [picture, question],
            show_progress="hidden", api_visibility="private",
        ).then(events.run, asked, seen, **loud)  # fmt: skip
        pruned_answer.word(events.word, state, [state, pruned_answer, layers], **quiet)
        _api(events, asked, device)
    return page


class _Picture(gr.Image):
    """Gradio's picture, whose file is left to `Limits.read_picture` as it was sent."""

    is_template = True  # to the browser it is Gradio's own

    def preprocess(self, payload: Any) -> str | None:
        if payload is not None and payload.path is None:
            raise gr.Error("the picture is no file: upload it", title=REFUSED, print_exception=False)
        return None if payload is None else str(payload.path)


class _Events:
    """What the controls do. Each gives the values of what changes."""

    def __init__(self, served: ServedModel, source: Source, examples: Sequence[tuple[Path, str]], title: str) -> None:
        self.served, self.source, self.title = served, source, title
        self.examples = {number: (str(path), question) for number, (path, question) in enumerate(examples)}
        for name in ("example", "run", "look", "word", "budgets", "methods", "measure", "answer"):
            setattr(self, name, _refusing(getattr(self, name)))

    def example(self, event: gr.EventData) -> tuple[str, str]:
        if event.number not in self.examples:
            raise ValueError(f"example {short(event.number)}: must be from 0 to {len(self.examples) - 1}; press one")
        return self.examples[event.number]

    def run(self, *asked: Any) -> Iterator[tuple[Any, ...]]:
        for now in screen.run(self.served, screen.read_request(self.served, *asked)):
            yield self._seen(now)

    def look(self, before: Screen | None, picture: str | None, *asked: Any) -> tuple[Any, ...]:
        if picture is None or not str(asked[0]).strip():  # before the rest is there, nothing is wrong
            return (gr.skip(),) * 6
        request = screen.read_request(self.served, picture, *asked)
        return self._seen(screen.look(self.served, request, before))

    def word(self, now: Screen | None, event: gr.EventData) -> tuple[Any, ...]:
        if now is None:
            raise ValueError("nothing is on the screen any more: press Run")
        number = None if event.number == now.word else event.number
        attention = None if number is None else screen.attention_of(self.served, now, number)
        now = dataclasses.replace(now, word=number)
        return now, fragments.answers(now, self.served.decode)[0], _layers(now, attention)

    def budgets(self, *asked: Any) -> Iterator[str]:
        request = screen.read_request(self.served, *asked)
        choices = [dataclasses.replace(request.choice, percent=percent) for percent in BUDGETS]
        yield from self._compare("budget", request, {f"{choice.percent:g}%": choice for choice in choices})

    def methods(self, *asked: Any) -> Iterator[str]:
        request = screen.read_request(self.served, *asked)
        choices = {name: Choice(request.choice.percent, name) for name in BASELINES}
        yield from self._compare("method", request, {"dense": Choice(0), **choices})

    def _compare(self, first: str, request: screen.Request, choices: dict[str, Choice]) -> Iterator[str]:
        rows: list[tuple[str, Screen | ValueError]] = []
        for name, answer in zip(choices, screen.compare(self.served, request, list(choices.values())), strict=True):
            rows.append((name, answer))
            yield fragments.comparison(first, rows, self.served.decode)

    def measure(self, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008  # how Gradio passes it
        if self.served.recipes.fitter is None:
            samples = load_samples(MEASURED)
            lines = f"samples = fitprune.load_samples({MEASURED!r})\nstats = fitprune.measure(model, "
            lines += "fitprune.make_batches(samples, processor))"
            self.served.measure(samples, lambda done: progress((done, len(samples)), unit="samples"), lines)
        return _about(self.served, self.title), gr.Button(visible=False), gr.Dropdown(value=FITTED)

    def answer(self, *asked: Any) -> dict[str, Any]:
        *_, last = screen.run(self.served, screen.read_request(self.served, *asked))
        return screen.facts(self.served, last)

    def _seen(self, now: Screen) -> tuple[Any, ...]:
        whole = now.kept is not None
        layers, code = (
            (_layers(now), python_lines(now, self.source, self.served.recipes.statistics))
            if whole
            else (gr.skip(), gr.skip())
        )
        return now, *fragments.answers(now, self.served.decode), fragments.costs(now), layers, code


def _api(events: _Events, asked: Sequence[gr.components.Component], device: dict[str, Any]) -> None:
    """Offer the answer to programs: by components of its own, so that what is out of range is refused in our words."""
    number, text = functools.partial(gr.Number, visible=False), functools.partial(gr.Textbox, visible=False)
    inputs = [
        asked[0], text(label="question"), number(60, label="budget"), text(FITTED, label="method"),
        text("", label="scorer"), number(events.served.limits.usual_answer, label="tokens"),
    ]  # fmt: skip
    ask = gr.Button(visible=False)
    ask.click(
        events.answer, inputs, gr.JSON(visible=False), api_name="answer", **{**device, "api_visibility": "public"},
        api_description="Answer a question about a picture, pruned and dense: texts, times, costs, tokens by layer.",
    )  # fmt: skip


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show what is wrong with what a person sends in a line, and nothing else of an error."""

    def refusal(error: Exception) -> gr.Error:
        return gr.Error(escape(line(error, 400)), title=REFUSED, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def each(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except ValueError as error:
                raise refusal(error) from None

        return each

    @functools.wraps(function)
    def once(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:
            raise refusal(error) from None

    return once


def _layers(now: Screen | None, attention: Any = None) -> Html:
    """Make the player of what is left; with the attention of a word, that is what it colours."""
    if now is None or now.kept is None:
        return _EMPTY
    heat = None
    if attention is not None and now.word is not None:
        values = (attention / attention.max().clamp(min=1e-9)).expand(now.kept.layers, -1).clone()
        for layer in range(now.kept.layers):
            values[layer, ~now.kept.present(layer)] = float("nan")
        word = now.words[0][now.word].text
        name = f"what the model looked at for the word {word}"
        heat = Heat(values, name, "attention, mean over heads and layers: none", "most", on=True)
    return player(Example(now.request.picture.image(), now.kept), heat=heat)


def _about(served: ServedModel, title: str) -> Html:
    """Say what is served, and what its recipes are fitted from."""
    fitter = served.recipes.fitter
    if fitter is not None:
        text = f"{title}, {served.layers} layers; recipes are fitted from {plural(len(fitter.stats), 'sample')}"
    else:
        text = (
            f"{title}, {served.layers} layers, without statistics: FitPrune's recipes need some. Measuring runs the "
            f"bundled {MEASURED}; pictures like yours are better: fitprune app {title} --data ..."
        )
    return Html(f"<h1>fitprune: move the budget, see what leaves</h1><p class=small>{escape(text)}</p>")


def _html(value: str, **options: Any) -> gr.HTML:
    options = {"js_on_load": None, "apply_default_css": False, **options}
    return gr.HTML(value, elem_classes=["fp"], **options)


def _default_method(served: ServedModel) -> str:
    """FitPrune's own where there are statistics, else a recipe of the operator's, else a method that needs none."""
    if served.recipes.fitter is not None:
        return FITTED
    return next((name for name in served.recipes.methods if name not in BASELINES), "uniform")


def _scorers() -> list[tuple[str, str]]:
    """List the scorers that need no parameter."""
    names = []
    for name in SCORERS:
        try:
            get_scorer(name)
        except ValueError:
            continue
        names.append((name, name))
    return names


def _but(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}
