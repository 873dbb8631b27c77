"""Draw which tokens stay on an image, and how many after each layer. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fitprune._support.plots import canvas, save_figure
from fitprune.recipes.recipe import PruningRecipe


def draw_keep_curves(recipes: Mapping[str, PruningRecipe], path: str | os.PathLike[str]) -> None:
    """Draw the fraction of visual tokens present after each layer, one line for each recipe.

    Args:
        recipes: name -> recipe.
        path: picture to write.

    Raises:
        OSError: `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    figure, axes = canvas(7, 4)
    for name, recipe in recipes.items():
        axes.step(range(len(recipe.keep)), recipe.keep, where="mid", marker="o", markersize=3, label=name)
    axes.set(
        xlabel="after decoder layer (the first is 0)", ylabel="visual tokens present (fraction)", ylim=(-0.02, 1.02)
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(title="recipe", frameon=False)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_kept_tokens(
    examples: Sequence[tuple[Image.Image, str, Sequence[torch.Tensor]]],
    layers: Sequence[int],
    path: str | os.PathLike[str],
) -> None:
    """Draw images with the visual tokens that still enter chosen layers; what has left is dark.

    Args:
        examples: image, caption, and for each layer a bool tensor [visual tokens], True where the token is present.
            The tokens form a square grid, row by row.
        layers: layers to show, one column each; the original image comes first.
        path: PNG file to write.

    Raises:
        ValueError: the tokens of an example form no square grid.
        OSError: `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    figure, grid = canvas(2.1 * (len(layers) + 1), 2.4 * len(examples), len(examples), len(layers) + 1)
    for row, (image, caption, present) in zip(np.atleast_2d(grid), examples, strict=True):
        row[0].imshow(image)
        row[0].set_title(textwrap.fill(caption, 26), fontsize=8)
        for axes, layer in zip(row[1:], layers, strict=True):
            kept = present[layer]
            axes.imshow(_shade(image, kept))
            axes.set_title(f"enter layer {layer}: {int(kept.sum())}", fontsize=8)
        for axes in row:
            axes.axis("off")
    save_figure(figure, path)


def _shade(image: Image.Image, kept: torch.Tensor) -> np.ndarray[Any, Any]:
    side = math.isqrt(len(kept))
    if side * side != len(kept):
        raise ValueError(f"{len(kept)} visual tokens: must form a square grid to be drawn on the image")
    mask = Image.fromarray(kept.view(side, side).numpy().astype(np.uint8) * 255)
    alpha = np.asarray(mask.resize(image.size, Image.Resampling.NEAREST), dtype=np.float32)[..., None] / 255
    pixels = np.asarray(image, dtype=np.float32)
    dimmed: np.ndarray[Any, Any] = (pixels * (0.15 + 0.85 * alpha) + 70 * (1 - alpha)).astype(np.uint8)
    return dimmed
