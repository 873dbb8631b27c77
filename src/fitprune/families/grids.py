"""Where visual tokens lie in their picture: the grids of each image, and what part of the picture each covers.

`families.planes` says which tokens lie on which pixels, and `families.coordinates` where these come from.

Shapes: B batch, N columns of the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.coordinates import frames_in, names_of, sources_of
from fitprune.families.images import modality_of, read_images
from fitprune.families.planes import Box, Cells, Plane, planes_of, tokens_on_planes


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Visual tokens that lie in rows and columns over a part of a picture.

    Attributes:
        tokens: [rows, columns] int64, each cell's number among the visual tokens of its image, in the order of the
            prompt.
        box: left, top, right and bottom of the grid, in fractions of the picture's width and height as viewers show it
            (turned as its EXIF says). It reaches outside 0..1 where the processor fills. None where it is not measured.
        name: "whole picture", "tile 3 of 6", "high resolution", "frame 2".
        picture: which of `pictures` it lies on; None if its box is not measured.
    """

    tokens: torch.Tensor
    box: Box | None
    name: str
    picture: int | None = None


def token_grids(
    model: Any,
    inputs: Mapping[str, Any],
    processor: Any = None,
    pictures: Iterable[Any] | None = None,
    *,
    image: torch.Tensor | None = None,
) -> list[list[tuple[Grid, ...]]]:
    """Say where the visual tokens of each image lie in its picture.

    Tokens without a place (newlines, [CLS]) are in no grid.

    Args:
        model: a supported model.
        inputs: of one call: what the processor returned.
        processor: the model's, to measure boxes; or a function that makes inputs of one picture (of a video, the list
            of its frames), if the processor got arguments that change pixels.
        pictures: what the processor got, one after another in the order of the prompts: PIL images or uint8 arrays
            [height, width, 3], a video as a list of the frames that the model sees. Without them or the processor
            boxes are None.
        image: [B, N] number of each column's image in its sample, -1 for none, as a prefill of the inputs has it
            (`pruner.last.image`). Without, the images are encoded, to count their tokens.

    Returns:
        For each sample, for each of its images or frames, the grids.

    Raises:
        ValueError: there is no image, the tokens lie on no known grid, or the processor makes other pixels of the
            pictures than the inputs have.
    """
    adapted = adapt(model)
    planes = {kind: planes_of(adapted, inputs, kind) for kind in ("image", "video")}
    if not any(planes.values()):
        raise ValueError("the inputs have no pixels: pass what the processor returned, with its pixel_values")
    if image is None:
        with torch.no_grad():
            image = read_images(adapted, inputs).image
    ids, own = inputs.get("input_ids"), []
    for sample, row in enumerate(image):
        for number in range(int(row.max()) + 1):
            kind = "image" if ids is None else modality_of(adapted, ids[sample][row == number])
            if not planes[kind]:  # some models mark a video's frames as images
                kind = next(other for other in planes if other != kind)
            own.append((sample, kind, int((row == number).sum())))
    counts = {kind: [count for _, other, count in own if other == kind] for kind in planes}
    cells = {kind: iter(tokens_on_planes(adapted, inputs, planes[kind], counts[kind])) for kind in planes}
    places = {} if processor is None or pictures is None else _measured(adapted, planes, processor, pictures)
    grids: list[list[tuple[Grid, ...]]] = [[] for _ in image]
    for sample, kind, _ in own:
        mine = next(cells[kind])
        if places:
            grids[sample].append(tuple(_placed(one, *places[kind][one.plane]) for one in mine))
        else:  # most families show the whole picture last
            names = names_of([planes[kind][one.plane] for one in mine], [one is mine[-1] for one in mine])
            grids[sample].append(tuple(Grid(one.tokens, None, name) for one, name in zip(mine, names, strict=True)))
    return grids


def _measured(
    adapted: AdaptedModel, planes: Mapping[str, Sequence[Plane]], processor: Any, pictures: Iterable[Any]
) -> dict[str, list[tuple[int, str, torch.Tensor]]]:
    """Give of each plane the number of its picture, its name, and the map that `sources_of` measures.

    Args:
        adapted: the model.
        planes: of images and of videos.
        processor: as for `token_grids`.
        pictures: as for `token_grids`.

    Raises:
        ValueError: the processor makes other planes of the pictures.
    """
    known: dict[str, list[tuple[int, str, torch.Tensor]]] = {kind: [] for kind in planes}
    for number, picture in enumerate(pictures):
        frames, kind = frames_in(picture, f"pictures[{number}]")
        where = kind if planes[kind] else next(other for other in planes if other != kind)
        mine = planes[where][len(known[where]) :]
        sources = sources_of(adapted, processor, frames, kind, mine, f"pictures[{number}]")
        known[where] += [(number, *source) for source in sources]
    for kind, those in planes.items():
        if len(known[kind]) != len(those):
            raise ValueError(
                f"the inputs have {len(those)} {kind} parts, and the pictures make {len(known[kind])}: must be as "
                "many; pass every picture of the batch, in the order of the prompts, and if the processor got "
                "arguments that change pixels, a function of a picture in its place"
            )
    return known


def _placed(cells: Cells, picture: int, name: str, place: torch.Tensor) -> Grid:
    """Lay a plane's cells as the picture lies; `place` as `sources_of` measures it."""
    tokens, (left, top, right, bottom) = cells.tokens, cells.part
    (left, right), (top, bottom) = (place @ torch.tensor([[left, right], [top, bottom], [1, 1]]).double()).tolist()
    if place[0, 1].abs() > place[0, 0].abs():
        tokens = tokens.T
    if left > right:
        left, right, tokens = right, left, tokens.flip(1)
    if top > bottom:
        top, bottom, tokens = bottom, top, tokens.flip(0)
    return Grid(tokens.contiguous(), (left, top, right, bottom), name, picture)
