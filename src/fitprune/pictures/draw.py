"""Draw a picture with the visual tokens that enter a layer, in pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fitprune._support.checked import whole
from fitprune.families.coordinates import frames_in
from fitprune.families.planes import Box
from fitprune.pictures.kept import KeptImage
from fitprune.pictures.views import View, ranks, views_of

Pixels = np.ndarray[Any, Any]

OUTLINE = (255, 224, 102)  # around what is left: to be seen on dark pictures and on bright ones
PAPER = (236, 238, 240)  # where a processor pads
# Of scores, from the lowest rank to the highest: matplotlib's cividis, which colour-blind readers can read.
HEAT = ("#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#a69d75", "#d3c164", "#fee838")
_LARGEST = 16_384  # pixels of a side
GAP = 12  # pixels between views
_OUTSIDE, _PRESENT, _LEFT = 0, 1, 2


def draw_kept(
    picture: Image.Image | Pixels, kept: KeptImage, layer: int, *, scores: bool = False, size: int = 480
) -> Image.Image:
    """Draw a picture with the visual tokens that enter a layer: what has left is dark, what no token sees is pale.

    Where an image has several grids that cover each other, as tiles and a thumbnail, each is drawn on a picture of its
    own, side by side.

    Args:
        picture: as the processor got it: a PIL image or uint8 [height, width, 3].
        kept: what it keeps, from `fitprune.kept_tokens` with processor and pictures.
        layer: number of the decoder layer, from 0.
        scores: colour the tokens by the rank of their score at this layer, from blue (lowest) to yellow.
        size: longest side of the drawn picture, in pixels.

    Raises:
        ValueError: there is no such layer, no score, or it is not known where the tokens lie; or an argument is of
            another kind.
    """
    if not isinstance(kept, KeptImage):
        raise ValueError(f"kept is a {type(kept).__name__}: must be one KeptImage, such as kept_tokens(...)[0][0]")
    whole("size", size, 1, _LARGEST)
    (picture, *others), _ = frames_in(picture, "picture")
    if others:
        raise ValueError("picture is several: must be one, the frame or image that `kept` is of")
    if scores and kept.scores is None:
        raise ValueError("scores=True: there are none; pass scores=True to kept_tokens too")
    picture = ImageOps.exif_transpose(picture)
    scale = size / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    present = kept.present(layer)
    values = ranks(kept.scores[layer]) if scores and kept.scores is not None else None
    drawn = [_view(picture, view, present, values) for view in views_of(kept, width, height)]
    sheet = Image.new("RGB", (sum(v.width + GAP for v in drawn) - GAP, max(v.height for v in drawn)), (255, 255, 255))
    left = 0
    for view in drawn:
        sheet.paste(view, (left, 0))
        left += view.width + GAP
    return sheet


def _view(picture: Image.Image, view: View, present: torch.Tensor, values: torch.Tensor | None) -> Image.Image:
    left, top, right, bottom = (round(side) for side in view.extent)
    sheet = Image.new("RGB", (right - left, bottom - top), PAPER)
    sheet.paste(picture, (-left, -top))
    pixels = np.asarray(sheet, dtype=np.float32)
    state = np.full(pixels.shape[:2], _OUTSIDE, dtype=np.int8)
    grey = pixels.mean(2, keepdims=True)
    for grid, box in view.grids:
        _fill(state, np.where(present[grid.tokens].numpy(), _PRESENT, _LEFT), box, (left, top))
    if values is not None:
        heat = np.full_like(pixels, np.nan)
        for grid, box in view.grids:
            ranked = values[grid.tokens]
            known = ~ranked.isnan().numpy()[..., None]
            _fill(heat, np.where(known, heat_colours(ranked), np.nan), box, (left, top))
        pixels = np.where(np.isnan(heat), pixels, 0.35 * grey + 0.65 * heat)
    state = state[..., None]
    shaded = np.where(state == _LEFT, 0.2 * grey, pixels)
    shaded = np.where(state == _OUTSIDE, 0.3 * pixels + 0.7 * np.asarray(PAPER, dtype=np.float32), shaded)
    line = max(1, round(max(sheet.size) / 320))
    shaded = np.where(_outline(state[..., 0], line)[..., None], np.asarray(OUTLINE, dtype=np.float32), shaded)
    return Image.fromarray(shaded.round().clip(0, 255).astype(np.uint8))


def _fill(pixels: Pixels, cells: Pixels, box: Box, corner: tuple[int, int]) -> None:
    """Fill a box of pixels with cells [rows, columns, ...], as far as it lies inside."""
    height, width = pixels.shape[:2]
    across = _edges(box[0], box[2], cells.shape[1], corner[0], width)
    down = _edges(box[1], box[3], cells.shape[0], corner[1], height)
    wide = np.repeat(np.repeat(cells, np.diff(down), 0), np.diff(across), 1)
    pixels[down[0] : down[-1], across[0] : across[-1]] = wide


def _edges(start: float, end: float, count: int, origin: int, size: int) -> Pixels:
    return np.linspace(start - origin, end - origin, count + 1).round().clip(0, size).astype(int)


def _outline(state: Pixels, line: int) -> Pixels:
    """Mark the pixels of what has left that are at most `line` from what is present."""
    present = state == _PRESENT
    near = present.copy()
    for axis in (0, 1):
        grown = near.copy()
        for step in range(1, line + 1):
            ahead, back = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], back[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= near[tuple(back)]
            grown[tuple(back)] |= near[tuple(ahead)]
        near = grown
    marked: Pixels = near & (state == _LEFT)
    return marked


def heat_colours(values: torch.Tensor) -> Pixels:
    """Colour ranks from 0 to 1: [...] -> [..., 3], from 0 to 255."""
    stops = np.asarray([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in HEAT], dtype=np.float32)
    place = values.nan_to_num(0).numpy()
    return np.stack([np.interp(place, np.linspace(0, 1, len(HEAT)), stops[:, i]) for i in range(3)], -1)
