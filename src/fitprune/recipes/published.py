"""The recipes that the FitPrune authors published, as plain data."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from fitprune._support.messages import short
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.recipes import rounding

# Llama-7B decoders with CLIP ViT-L/14; in LLaVA-HR without its class token and with a ConvNeXt-L.
_LLAMA_7B = (32, 32, 128, 32064)  # heads, kv_heads, head_dim, vocab
_CLIP_L_336 = VisionSizes(layers=24, hidden=1024, intermediate=4096, image_size=336, patch_size=14)
_HIGH_RESOLUTION = dataclasses.replace(_CLIP_L_336, image_size=448, class_tokens=0, beside_macs=736_194_201_088)
_TYPES: dict[str, tuple[str, VisionSizes]] = {
    "llava-1.5-7b": ("llava", _CLIP_L_336),
    "llava-next-7b": ("llava_next", _CLIP_L_336),
    "llava-hr-7b": ("llava_hr", _HIGH_RESOLUTION),
}


@functools.cache
def _table() -> dict[str, Any]:
    text = importlib.resources.files("fitprune").joinpath("data/published_recipes.json").read_text()
    return {name.split(" (")[0]: entry for name, entry in json.loads(text)["models"].items()}


def names() -> dict[str, list[int]]:
    """List the published recipes: model name -> nominal percents."""
    return {name: [int(percent) for percent in entry["removals"]] for name, entry in _table().items()}


def split_name(name: str) -> tuple[str, Any] | None:
    """Read "llava-1.5-7b:60" as model and percent; None where the model is not in the table."""
    model, *percent = name.split(":")
    if name in names():
        raise ValueError(f"{name}: say which of its recipes, such as {name}:60; {names()[name]}")
    if model not in names() or len(percent) != 1:
        return None
    # What is no number stays text, for `fields` to name it in its error.
    whole = percent[0].isdecimal() and len(percent[0]) < 4
    return model, int(percent[0]) if whole else percent[0]


def fields(name: str, percent: int) -> dict[str, Any]:
    """Give the fields of a published recipe, as `PruningRecipe` takes them; see `PruningRecipe.published`."""
    table = _table()
    if name not in table:
        raise ValueError(f"name={short(name)}: no published recipe; must be one of {sorted(table)}")
    entry = table[name]
    if str(percent) not in entry["removals"]:
        raise ValueError(
            f"percent={short(percent)}: no published recipe of {name}; must be one of {sorted(names()[name])}"
        )
    model_type, vision = _TYPES[name]
    decoder = DecoderSizes(entry["layers"], entry["hidden"], entry["intermediate"], *_LLAMA_7B)
    return {
        "keep": rounding.keep_fractions(entry["removals"][str(percent)], entry["visual_tokens"]),
        "model": ModelFingerprint(model_type, decoder, vision),
        "visual_tokens": entry["visual_tokens"],
        "provenance": {
            "source": "arXiv:2409.10197, recipe published by the authors",
            "name": name,
            "nominal_percent": int(percent),
        },
    }
