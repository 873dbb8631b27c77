"""Rectangles of pixels that a vision encoder sees as one (planes), and the visual tokens that lie on each.

A plane is a picture, a tile of it, or a frame. Which input a processor makes tells how it lays them out: flattened
patches come with `image_grid_thw` or `spatial_shapes`, pictures filled up to one size with `image_sizes`; LLaVA-NeXT's
tiles are joined by the model's own packing. On every plane tokens lie row by row, in cells of one size.

Shapes: C channels (for a pair of frames those of both), H and W pixels, P patches, I images.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune._support.host import packed, packs_features, tiles_of_size
from fitprune._support.messages import line
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import PIXELS

Box = tuple[float, float, float, float]  # left, top, right, bottom
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_TILES = "high resolution"  # LLaVA-NeXT's tiles, side by side


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """Pixels that the encoder sees as one.

    Attributes:
        pixels: [C, H, W].
        name: "frame 2", ...; empty for a tile or a picture, whose name depends on the others of the picture.
    """

    pixels: torch.Tensor
    name: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """Tokens of one image on one plane.

    Attributes:
        plane: its number.
        tokens: [rows, columns] int64, numbers of tokens among the image's.
        part: the part of the plane that they cover, in fractions of its width and height.
    """

    plane: int
    tokens: torch.Tensor
    part: Box = WHOLE


def planes_of(adapted: AdaptedModel, inputs: Mapping[str, Any], modality: str) -> list[Plane]:
    """Take the planes out of a processor's inputs, in the order of their tokens.

    Args:
        adapted: the model.
        inputs: what the processor made.
        modality: "image" or "video".

    Raises:
        ValueError: the pixels are not laid out as in any supported family.
    """
    try:
        return _planes_of(adapted, inputs, modality)
    except (AttributeError, RuntimeError, TypeError) as error:  # of a family that has no row
        raise ValueError(_no_grid(adapted, "pixels", line(error, 200))) from error


def _planes_of(adapted: AdaptedModel, inputs: Mapping[str, Any], modality: str) -> list[Plane]:
    pixels = next((inputs[name] for name in PIXELS[modality] if inputs.get(name) is not None), None)
    if pixels is None:
        return []
    pixels = pixels.detach().float().cpu()
    vision = adapted.model.config.vision_config
    if (grid := inputs.get(f"{modality}_grid_thw")) is not None:
        return _from_patches(pixels, grid.tolist(), vision, modality)
    if modality == "video":
        return [Plane(one, f"frame {number}") for video in pixels for number, one in enumerate(video, 1)]
    if (shapes := inputs.get("spatial_shapes")) is not None:
        return [
            _from_rows(part, rows, columns, vision.patch_size)
            for part, (rows, columns) in zip(pixels, shapes.tolist(), strict=True)
        ]
    sizes = inputs.get("image_sizes")
    if sizes is not None and packs_features(adapted.model.base_model):
        numbers = inputs.get("batch_num_images")  # several images of a sample have no tiles
        alone = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers.tolist() for _ in range(n)]
        parts = zip(pixels, sizes, alone, strict=True)
        return [plane for part, size, tiled in parts for plane in _base_and_tiles(adapted, part, size, tiled)]
    if sizes is not None:  # pictures of several sizes, filled up with zeros
        return [Plane(part[:, : int(h), : int(w)]) for part, (h, w) in zip(pixels, sizes, strict=True)]
    if pixels.ndim == 5:  # samples of several tiles, filled up with tiles of zeros
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    return [Plane(one) for one in pixels]


def _from_patches(pixels: torch.Tensor, grid: Sequence[Sequence[int]], vision: Any, modality: str) -> list[Plane]:
    """Put flattened patches [P, C * side * side] back in their places; squares of them become one token."""
    merge, side, planes = vision.spatial_merge_size, vision.patch_size, []
    parts = torch.tensor_split(pixels, list(itertools.accumulate(map(math.prod, grid)))[:-1])
    for part, (frames, rows, columns) in zip(parts, grid, strict=True):
        part = part.view(frames, rows // merge, columns // merge, merge, merge, -1, side, side)
        part = part.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, -1, rows * side, columns * side)
        planes += [Plane(one, f"frame {number}" if modality == "video" else "") for number, one in enumerate(part, 1)]
    return planes


def _from_rows(pixels: torch.Tensor, rows: int, columns: int, side: int) -> Plane:
    """Put flattened patches [P, side * side * C], row by row and filled up with zeros, back in their places."""
    part = pixels[: rows * columns].view(rows, columns, side, side, -1)
    return Plane(part.permute(4, 0, 2, 1, 3).reshape(-1, rows * side, columns * side))


def _base_and_tiles(adapted: AdaptedModel, tiles: torch.Tensor, size: torch.Tensor, tiled: bool) -> list[Plane]:
    """Take LLaVA-NeXT's small picture, and if it is tiled its tiles [tiles, C, H, W] side by side."""
    base = Plane(tiles[0], "whole picture")
    if not tiled:
        return [base]
    config = adapted.model.config
    rows, columns = tiles_of_size(size, config.image_grid_pinpoints, config.vision_config.image_size)
    _, channels, height, width = tiles.shape
    parts = tiles[1 : 1 + rows * columns].view(rows, columns, channels, height, width)
    parts = parts.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return [base, Plane(parts, _TILES)]


def tokens_on_planes(
    adapted: AdaptedModel, inputs: Mapping[str, Any], planes: Sequence[Plane], counts: Sequence[int]
) -> list[list[Cells]]:
    """Say which tokens of each image lie where.

    Args:
        adapted: the model.
        inputs: what the processor made.
        planes: those of one modality, as `planes_of` takes them.
        counts: visual tokens of each image or frame of that modality, in the order of the batch.

    Raises:
        ValueError: the tokens do not fill the planes row by row.
    """
    packs = packs_features(adapted.model.base_model)
    if packs and not all(plane.name.startswith("frame") for plane in planes):
        starts = [number for number, plane in enumerate(planes) if plane.name != _TILES]
        images = zip(starts, inputs["image_sizes"], counts, strict=True)
        return [_packed_cells(adapted, planes, start, size, count) for start, size, count in images]
    # A token has as many pixels on every plane.
    areas, total = [plane.pixels[0].numel() for plane in planes], sum(counts)
    shares = list(counts) if len(counts) == len(planes) else [area * total // sum(areas) for area in areas]
    dealt: list[list[Cells]] = []
    number = 0
    for count in counts:
        cells, first = [], 0
        while first < count and number < len(planes):
            cells.append(Cells(number, first + _rows_and_columns(adapted, planes[number], shares[number], packs)))
            first += shares[number]
            number += 1
        if first != count:
            raise ValueError(_no_grid(adapted, f"{count} visual tokens", f"one of its tiles begins with token {first}"))
        dealt.append(cells)
    return dealt


def _rows_and_columns(adapted: AdaptedModel, plane: Plane, count: int, newline_last: bool) -> torch.Tensor:
    """Lay tokens in rows and columns of square cells; one token beside them is a newline, or else [CLS]."""
    _, height, width = plane.pixels.shape
    for beside in (0, 1):
        cells = count - beside
        rows, columns = round(math.sqrt(cells * height / width)), round(math.sqrt(cells * width / height))
        if cells and rows * columns == cells:
            first = 0 if newline_last else beside
            return torch.arange(first, first + cells).view(rows, columns)
    raise ValueError(
        _no_grid(adapted, f"{count} visual tokens", f"{width} x {height} pixels have no such grid of squares")
    )


def _packed_cells(
    adapted: AdaptedModel, planes: Sequence[Plane], start: int, size: torch.Tensor, count: int
) -> list[Cells]:
    """Lay the tokens of a small picture, and of tiles that the model joins: it packs each patch's place, not features.

    Args:
        adapted: the model.
        planes: of all images.
        start: the number of the image's small picture.
        size: [2], height and width as the processor says them.
        count: the image's tokens.
    """
    vision = adapted.model.config.vision_config
    side = vision.image_size // vision.patch_size
    base = Cells(start, torch.arange(side * side).view(side, side))
    if start + 1 == len(planes) or planes[start + 1].name != _TILES:
        return [base]
    rows, columns = (length // vision.image_size for length in planes[start + 1].pixels.shape[1:])
    y, x = ((torch.arange(tiles * side) + 0.5) / (tiles * side) for tiles in (rows, columns))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(rows, side, columns, side, 2)
    places = places.transpose(1, 2).reshape(rows * columns, side * side, 2)
    features, newline = torch.cat([torch.zeros(1, side * side, 2), places]), torch.full((2,), torch.nan)
    places = packed(adapted.model.base_model, [features], size[None].cpu(), newline)[0]
    if len(places) != count:
        raise ValueError(_no_grid(adapted, f"{count} visual tokens", f"the model packs {len(places)}"))
    places = places[side * side :]
    width = places[:, 0].isnan().tolist().index(True)  # the first newline ends the first row
    if not width:  # a picture so thin that only newlines are left
        return [base]
    tokens = torch.arange(side * side, count).view(-1, width + 1)[:, :-1]
    (left, top), (right, bottom) = places[0].tolist(), places[-2].tolist()
    across = (right - left) / (width - 1) / 2 if width > 1 else 0.5 / (columns * side)
    down = (bottom - top) / (len(tokens) - 1) / 2 if len(tokens) > 1 else 0.5 / (rows * side)
    return [base, Cells(start + 1, tokens, (left - across, top - down, right + across, bottom + down))]


def _no_grid(adapted: AdaptedModel, what: str, why: str) -> str:
    return (
        f"the places of {what} of this {adapted.model.config.model_type} are not known ({why}): nothing can be drawn "
        "on its pictures; pruning does not need them"
    )
