"""The bundled question sets as lmms-eval tasks, read from the package: nothing is downloaded.

A set's task is one YAML file here, with its name, its metadata.jsonl and the folder of its images.
`python -m fitprune.integrations.lmms_eval_tasks` prints this folder.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def folder() -> Path:
    """Give the folder for `lmms-eval --include_path`."""
    return Path(str(importlib.resources.files(__name__)))


def images(doc: Mapping[str, Any], task: Mapping[str, Any]) -> list[Image.Image]:
    """Load a question's image from the set that the task's YAML names."""
    path = importlib.resources.files("fitprune").joinpath("data", task["set"], doc["file_name"])
    with path.open("rb") as file:
        return [Image.open(file).convert("RGB")]


def right(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Score an answer as `fitprune evaluate` does: 1 if it is the accepted one, stripped and in lower case; else 0."""
    return {"accuracy": float(answers[0].strip().lower() == doc["answer"].strip().lower())}
