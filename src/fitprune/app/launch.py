"""Serve the page: warm the model up, and listen where the operator says."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from fitprune.app import screen, style
from fitprune.app.events import Events
from fitprune.app.layout import EXAMPLES, build
from fitprune.app.python_lines import Source
from fitprune.app.recipes import FITTED
from fitprune.app.served import ServedModel

MOST_WAITING = 200  # requests in the queue; the next one is refused
MOST_SESSIONS = 100  # people whose screen is kept; the one who was away longest goes first


def page_of(
    served: ServedModel, source: Source, examples: Sequence[tuple[Path, str]], title: str, folder: Path
) -> gr.Blocks:
    """Make the page, with the first example answered: so the first visitor meets a warm model.

    Args:
        served: the model.
        source: where it comes from.
        examples: pictures with a question each.
        title: what is served.
        folder: of this server alone, for uploads and copies of the examples; the only one whose files are served.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    examples = [(_copied(path, folder / EXAMPLES / str(number)), text) for number, (path, text) in enumerate(examples)]
    gr.set_static_paths([folder / EXAMPLES])
    # A player's data lie in a script element that is not to run.
    warnings.filterwarnings("ignore", "A `<script>` tag was found", UserWarning)
    first, limits = None, served.limits
    if examples and served.recipes.fitter is not None:
        request = screen.read_request(served, str(examples[0][0]), examples[0][1], 60, FITTED, "", limits.usual_answer)
        first = min((list(screen.run(served, request))[-1] for _ in range(3)), key=_seconds)
    return build(Events(served, source, examples, title, first))


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
        OSError: as for `check_address`.
    """
    # Gradio would sum up the times of all its events after each of them.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
    page.queue(max_size=MOST_WAITING, api_open=False)  # nobody passes by the queue
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
    except OSError:
        check_address(host, port)
        raise
    return str(public or url)


def check_address(host: str, port: int) -> None:
    """Find out whether one can listen at an address, before a model is loaded for it.

    Args:
        host: a name or an address of this machine.
        port: its port.

    Raises:
        OSError: one cannot; the message says why.
    """
    try:
        family, *_, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        message = f"--host {host or repr(host)}: must be a name or an address of this machine, without a port"
        raise OSError(error.errno, message) from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                message = f"--host {host}: is no address of this machine; 0.0.0.0 stands for all of them"
            else:
                message = f"port {port} of {host}: is in use, or not allowed; pass another --port"
            raise OSError(error.errno, message) from None


def _copied(path: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return Path(shutil.copy(path, folder))
