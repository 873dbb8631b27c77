"""The page of the bundled model, served here, and Debian's Chromium."""

import dataclasses
import shutil
import threading
import time
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import sync_playwright

import fitprune
from fitprune.app.launch import launch, page_of
from fitprune.app.limits import Limits
from fitprune.app.python_lines import Source
from fitprune.app.recipes import Recipes
from fitprune.app.served import ServedModel
from fitprune.cli.app import _bundled_examples
from fitprune.families.adapter import adapt
from helpers.served import free_port

MEASURING = (
    'samples = fitprune.load_samples("digit-scenes/calibration", samples=16)\n'
    "stats = fitprune.measure(model, fitprune.make_batches(samples, processor, batch_size=8))"
)


@dataclasses.dataclass
class App:
    """The app at work."""

    served: ServedModel
    page: gr.Blocks
    url: str
    folder: Path


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    model, processor = fitprune.load_model("digit-scenes")
    (folder / "recipes").mkdir()
    samples = fitprune.load_samples("digit-scenes/calibration", samples=16)
    stats = fitprune.measure(model, fitprune.make_batches(samples, processor, batch_size=8))
    fitprune.fit(stats, flops_reduction=0.8).save(folder / "recipes" / "mine.json")
    (folder / "secret.json").write_text((folder / "recipes" / "mine.json").read_text())
    recipes = Recipes(adapt(model).fingerprint, folder / "recipes")
    recipes.use(fitprune.Fitter(stats), MEASURING)
    served = ServedModel(model, processor, recipes, Limits(megabytes=2, megapixels=4, answer=32))
    examples, pictures = _bundled_examples()
    page = page_of(served, Source('"digit-scenes"', pictures=pictures), examples, "digit-scenes", folder)
    yield App(served, page, launch(page, served, "127.0.0.1", free_port()).rstrip("/"), folder)
    page.close(verbose=False)


@pytest.fixture(scope="session")
def chromium():
    executable = shutil.which("chromium")
    assert executable, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, app):
    """Open the page as a new visitor; nothing may be loaded from elsewhere, and no script may fail."""
    contexts, faults = [], []

    def open_page(width=1280, height=1000, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "js_on_load" in message.text else None)
        page.on("request", lambda request: faults.append(request.url) if _is_elsewhere(request.url) else None)
        page.goto(app.url)
        page.wait_for_selector("#layers figure.kept .controls:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def slow(app, monkeypatch):
    """Make each answer take 30 tokens of 0.2 seconds; gives an event that is set when the first one is there."""
    own, begun = app.served.model.generate, threading.Event()

    def generate(*args, streamer, **kwargs):
        put = streamer.put

        def put_slowly(value):
            put(value)
            begun.set()
            time.sleep(0.2)

        streamer.put = put_slowly
        return own(*args, streamer=streamer, **{**kwargs, "min_new_tokens": 30, "max_new_tokens": 30})

    monkeypatch.setattr(app.served.model, "generate", generate, raising=False)
    return begun


def _is_elsewhere(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))
