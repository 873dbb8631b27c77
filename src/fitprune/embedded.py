"""The model and the data that ship with the package: digit scenes, and digit details to test what pruning breaks."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

MODEL = "digit-scenes"
DATA = tuple(f"{name}/{part}" for name in ("digit-scenes", "digit-details") for part in ("calibration", "test"))


def resolve(name: str) -> str:
    """Turn the name of the embedded model or of embedded data (`MODEL`, `DATA`) into a folder; other names stay."""
    if (name != MODEL and name not in DATA) or Path(name).exists():
        return name
    family, _, part = name.partition("/")
    return str(folder(part or "model", family))


def folder(part: str, family: str = MODEL) -> Path:
    """Give the folder of "model", "calibration" or "test"."""
    return Path(str(importlib.resources.files("fitprune").joinpath("data", family.replace("-", "_"), part)))
