"""The model and the data that ship with the package: digit scenes, and digit details to test what pruning breaks."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
from pathlib import Path

MODEL = "digit-scenes"
FAMILIES = ("digit-scenes", "digit-details")
DATA = tuple(f"{name}/{part}" for name in FAMILIES for part in ("calibration", "test"))


def resolve(name: str) -> str:
    """Turn the name of the bundled model or of bundled data (`MODEL`, `DATA`) into a folder; other names stay.

    Args:
        name: of a model or of data.

    Raises:
        FileNotFoundError: the name is nearly a bundled one, and nothing of that name is there.
    """
    if os.path.exists(name):
        return name
    known = name.rstrip("/")
    family, _, part = known.partition("/")
    if known == MODEL or known in DATA:
        return str(folder(part or "model", family))
    if difflib.get_close_matches(re.split("[/:]", name)[0].lower(), FAMILIES, cutoff=0.8):
        near = difflib.get_close_matches(name.lower(), (MODEL, *DATA), n=1, cutoff=0)
        raise FileNotFoundError(
            f"{name}: no such file or folder; did you mean {near[0]}? Bundled are the model {MODEL} and the data "
            f"{', '.join(DATA)}"
        )
    return name


def folder(part: str, family: str = MODEL) -> Path:
    """Give the folder of "model", "calibration" or "test"."""
    return Path(str(importlib.resources.files("fitprune").joinpath("data", family.replace("-", "_"), part)))
