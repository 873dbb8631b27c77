"""The model and the data that ship with the package: digit scenes."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

NAME = "digit-scenes"


def resolve(name: str) -> str:
    """Turn "digit-scenes", "digit-scenes/calibration" or "digit-scenes/test" into a folder; other names stay.

    The first is the embedded model, the others are the embedded question sets.
    """
    parts = {NAME: "model", f"{NAME}/calibration": "calibration", f"{NAME}/test": "test"}
    return str(folder(parts[name])) if name in parts and not Path(name).exists() else name


def folder(part: str) -> Path:
    """Give the folder of "model", "calibration" or "test"."""
    return Path(str(importlib.resources.files("fitprune").joinpath("data", "digit_scenes", part)))
