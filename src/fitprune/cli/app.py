"""`fitprune app`: a web page on which one moves a budget and sees what leaves, beside the dense model."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import assets, files
from fitprune.cli import options, parser
from fitprune.cli.recipe import BUNDLED_DATA

if TYPE_CHECKING:
    from fitprune.calibration.samples import Sample

SAMPLES = 64  # that are measured by default
BATCH = 8


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "app", run, "open a web page: a picture, a question, a budget, and what leaves layer by layer",
        "fitprune app",
    )  # fmt: skip
    options.add_model(command, nargs="?", default=assets.MODEL)
    command.add_argument(
        "--stats", type=parser.path, help="statistics of MODEL, made by 'fitprune measure'; if there is no such file, "
        "they are measured and written there",
    )  # fmt: skip
    options.add_data(command, required=False, default=f" (default for the bundled model: {BUNDLED_DATA})")
    command.add_argument("--recipes", type=parser.path, help="folder whose recipes are offered by their names")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=parser.whole(0, 65_535), default=7860, help="default: 7860")
    command.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    return command


def run(args: options.Args) -> None:
    """Load the model, measure it where that is needed, and serve the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the app needs Gradio: pip install 'fitprune[app]', or '.[app]' in a clone")
    from fitprune.app.launch import launch
