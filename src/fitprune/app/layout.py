"""The page of the app: its controls, and which of them does what."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from fitprune.app import fragments
from fitprune.app.events import BUDGETS, REFUSED, Events
from fitprune.app.python_lines import python_lines
from fitprune.app.recipes import FITTED, MOST_PERCENT
from fitprune.pictures.player import play
from fitprune.scoring.scorers import SCORERS, get_scorer

EXAMPLES = "examples"  # the folder beside that of the uploads
_PLAY = f"""{play()}
let state = {{}}, picture = null;
const start = () => {{
  const figure = element.querySelector('figure.kept');
  if (!figure) return;
  if (state.stop) state.stop();  // the elements may be the same ones, with other data
  const heat = figure.querySelector('[type=checkbox]'), own = figure.querySelector('image').getAttribute('href');
  const box = own === picture ? state.box : null;  // of another picture it would mean nothing
  picture = own;
  state = play(figure, {{layer: state.layer, box, heat: state.heat || !!heat && heat.defaultChecked}});
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


def build(events: Events) -> gr.Blocks:
    """Make the page.

    Args:
        events: what its controls do.
    """
    served, source, first, examples = events.served, events.source, events.first, events.examples
    limits, recipes = served.limits, served.recipes
    with gr.Blocks(title="fitprune", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        state = gr.State(None, time_to_live=3600)
        with gr.Row():
            about = _html(fragments.about(served, events.title), elem_id="about")
            measure = gr.Button(
                "Measure statistics", visible=recipes.fitter is None, elem_id="measure", min_width=120, scale=0
            )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    str(examples[0][0]) if examples else None, type="filepath", image_mode=None, height=220,
                    sources=["upload", "clipboard", "webcam"], label="Picture", elem_id="picture",
                )  # fmt: skip
                _only_uploads(picture)
                chosen = _html(fragments.examples(examples), js_on_load=_CHOOSE, elem_id="examples")
                question = gr.Textbox(
                    examples[0][1] if examples else "", label="Question", max_length=limits.question, lines=1,
                    elem_id="question",
                )  # fmt: skip
                budget = gr.Slider(
                    0, MOST_PERCENT, 60, step=1, label="Budget: percent of the visual FLOPs to save", elem_id="budget"
                )
                method = gr.Dropdown(
                    recipes.methods, value=events.usual_method, label="Method or recipe", elem_id="method"
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
                        layers = _html(fragments.layers(first), js_on_load=_PLAY, elem_id="layers")
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
        inputs = [picture, question, budget, method, scorer, tokens]
        outputs = [state, pruned_answer, dense_answer, costs, layers, code]
        # One pass at a time: all that runs the model waits in one queue, which says how long it is.
        device: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **device}
        loud = {"show_progress": "minimal", "trigger_mode": "always_last", **device}
        chooses = chosen.example(
            events.example, None, [picture, question], show_progress="hidden", api_visibility="private"
        )
        answering = [
            trigger(events.run, inputs, outputs, show_progress_on=[costs], **loud)
            for trigger in (run.click, question.submit, budget.release, chooses.then)
        ]
        running = [
            *answering,
            by_budget.click(events.budgets, inputs, budgets, **loud),
            by_method.click(events.methods, inputs, methods, **loud),
        ]
        stop.click(events.stopped, state, [pruned_answer, dense_answer], cancels=running, api_visibility="private")
        begun = [about, measure, method]
        page.load(events.opened, None, [state, *begun], show_progress="hidden", api_visibility="private")
        measured = measure.click(
            events.measure, None, begun, show_progress_on=[about], trigger_mode="once", **device
        )  # fmt: skip
        measured.success(events.look, [state, *inputs], outputs, **quiet)
        moved = gr.on(
            [budget.input, picture.input, method.input, scorer.input], events.look, [state, *inputs], outputs, **quiet
        )
        # What runs may have been sent before the last letter, and Gradio sends a picture that is just being removed.
        for trigger in (question.input, picture.change, *(ran.then for ran in (*answering, moved))):
            trigger(
                events.changed, [state, picture, question], [state, pruned_answer, dense_answer],
                show_progress="hidden", trigger_mode="always_last", api_visibility="private",
            )  # fmt: skip
        pruned_answer.word(events.word, state, [state, pruned_answer, layers], **quiet)
        _api(events, picture, device)
    return page


def _only_uploads(picture: gr.Image) -> None:
    """Take uploads and examples as they are, for `Limits.read_picture`, and no other file or address.

    A class of its own would do, but Gradio writes a file beside the module of each. Its own checks leave out what a
    program sends without a mark, and it would put what is clear on black.
    """
    uploads, download = Path(picture.GRADIO_CACHE).resolve(), picture.async_move_resource_to_block_cache

    def refusal(message: str) -> gr.Error:
        return gr.Error(message, title=REFUSED, print_exception=False)

    def preprocess(payload: Any) -> str | None:
        if payload is None:
            return None
        path = Path(payload.path or "/").resolve()
        if not (path.is_file() and {uploads, uploads.parent / EXAMPLES} & {*path.parents}):
            raise refusal("the picture is no upload, or no longer here: upload it again")
        return str(path)

    async def move(source: Any) -> Any:
        if str(source).startswith(("http:", "https:")):
            raise refusal("the picture is an address, and this server downloads none: upload the file")
        return await download(source)

    picture.preprocess, picture.async_move_resource_to_block_cache = preprocess, move


def _as_sent(box: gr.components.Component) -> gr.components.Component:
    """Leave a value to our own checks; Gradio would make text of anything."""
    box.preprocess = lambda payload: payload
    return box


def _api(events: Events, picture: gr.Image, device: dict[str, Any]) -> None:
    """Offer the answer to programs: by components of its own, so that what is out of range is refused in our words."""
    number, text = functools.partial(gr.Number, visible=False), functools.partial(gr.Textbox, visible=False)
    inputs = [
        picture, _as_sent(text(label="question")), number(60, label="budget"), text(FITTED, label="method"),
        text("", label="scorer"), number(events.served.limits.usual_answer, label="tokens"),
    ]  # fmt: skip
    ask = gr.Button(visible=False)
    ask.click(
        events.answer, inputs, gr.JSON(visible=False), api_name="answer", **{**device, "api_visibility": "public"},
        api_description="Answer a question about a picture, pruned and dense: texts, times, costs, tokens by layer.",
    )  # fmt: skip


def _html(value: str, **options: Any) -> gr.HTML:
    options = {"js_on_load": None, "apply_default_css": False, **options}
    return gr.HTML(value, elem_classes=["fp"], **options)


def _scorers() -> list[tuple[str, str]]:
    """List the scorers that need no parameter, and work wherever tokens leave."""
    names = []
    for name in SCORERS:
        try:
            scorer = get_scorer(name)
        except ValueError:
            continue
        if not scorer.reads_previous:
            names.append((name, name))
    return names
