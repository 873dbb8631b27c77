"""Serve the page: warm the model up, and listen where the operator says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from fitprune.app import screen, style
from fitprune.app.layout import build
from fitprune.app.python_lines import Source
from fitprune.app.recipes import FITTED
from fitprune.app.served import ServedModel

MOST_WAITING = 200  # requests in the queue; the next one is refused
MOST_SESSIONS = 100  # people whose screen is kept; the one who was away longest goes first


def page_of(served: ServedModel, source: Source, examples: Sequence[tuple[Path, str]], title: str) -> gr.Blocks:
    """Make the page, with the first example answered: so the first visitor meets a warm model.

    Args:
        served: the model.
        source: where it comes from.
        examples: pictures with a question each.
        title: what is served.
    """
    # A player's data lie in a script element that is not to run.
    warnings.filterwarnings("ignore", "A `<script>` tag was found", UserWarning)
    first, limits = None, served.limits
    if examples and served.recipes.fitter is not None:
        request = screen.read_request(served, str(examples[0][0]), examples[0][1], 60, FITTED, "", limits.usual_answer)
        first = min((list(screen.run(served, request))[-1] for _ in range(3)), key=_seconds)
    return build(served, source, examples, title, first)


def _seconds(answered: screen.Screen) -> float:
    """Of both prefills: the first run is slow, and its times are not to be shown."""
    return sum(answer.seconds[0] for answer in (answered.pruned, answered.dense) if answer)


def launch(page: gr.Blocks, served: ServedModel, host: str, port: int, *, share: bool = False) -> str:
    """Serve the page, in threads of its own.

    Args:
        page: of `page_of`.
        served: the model.
        host: address to listen at.
        port: likewise.
        share: open a public link through Gradio's servers.

    Returns:
        The address.

    Raises:
        OSError: the port is taken.
    """
    # Gradio would sum up the times of all its events after each of them.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
    page.queue(max_size=MOST_WAITING)
    try:
        _, url, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=served.limits.megabytes << 20,
            allowed_paths=[],
            state_session_capacity=MOST_SESSIONS,
            theme=style.theme(),
            head=style.HEAD,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(error.errno, f"port {port} of {host}: is in use, or not allowed; pass another --port") from error
    return str(public or url)
