"""Measure which part of a picture a processor puts where, without knowing any of its steps.

The processor is called on pictures of the same size that show coordinates: black, white, a ramp from left to right, a
ramp from top to bottom. Where black and white become different values, (ramp - black) / (white - black) is the place
that a value comes from; where they become the same, the processor fills. All pixels of a plane (`families.planes`)
together give that place finer than the 256 steps of a ramp: a straight fit is right for any resize, padding, crop or
cut into tiles.

Shapes: C channels, H and W pixels of a plane.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from fitprune.families.adapter import AdaptedModel
from fitprune.families.planes import Plane, planes_of

# How a picture lies in its file, by the EXIF orientation with which viewers turn it back.
_LYING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def frames_in(picture: Any, where: str) -> tuple[list[Image.Image], str]:
    """Take a picture, or the frames of a video, and say which of these it is: "image" or "video".

    Args:
        picture: a PIL image or uint8 [height, width, 3]; for a video a list of these, or uint8 of four axes.
        where: its place, for messages.

    Raises:
        ValueError: it is none of these.
    """
    is_video = isinstance(picture, (list, tuple)) or getattr(picture, "ndim", 3) == 4
    frames = []
    for frame in picture if is_video else [picture]:
        values = None if isinstance(frame, Image.Image) else np.asarray(frame)
        if values is not None and (values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3):
            raise ValueError(
                f"{where} is a {type(frame).__name__} of {values.dtype} and shape {list(values.shape)}: must be a PIL "
                "image or uint8 [height, width, 3], and for a video a list of them"
            )
        frames.append(frame if values is None else Image.fromarray(values))
    if not frames:
        raise ValueError(f"{where} is empty: must be a picture, or a list with the frames of a video")
    return frames, "video" if is_video else "image"


def sources_of(
    adapted: AdaptedModel,
    processor: Any,
    frames: Sequence[Image.Image],
    kind: str,
    planes: Sequence[Plane],
    where: str,
) -> list[tuple[str, torch.Tensor]]:
    """Measure where the planes of a picture, or of a video's frames, come from.

    Args:
        adapted: the model.
        processor: the model's, or a function that makes inputs of a picture or of a list of frames.
        frames: the picture, or the frames, which have one size.
        kind: "image" or "video".
        planes: of the inputs, the picture's own first.
        where: the picture's place, for messages.

    Returns:
        For each of the picture's planes its name, and a map [2, 3] float64: times (u, v, 1), a place in fractions of
        the plane, it is the place in fractions of the picture as viewers show it.

    Raises:
        ValueError: the processor makes other planes of the picture, or their pixels do not lie as the picture's.
    """
    if kind == "video" and hasattr(processor, "image_processor") and not getattr(processor, "video_processor", None):
        raise ValueError(
            f"{where} is a list, which stands for a video's frames, and a {type(processor).__name__} takes no video: "
            "pass pictures one after another"
        )
    # Loaders turn a picture, processors do not; and among several a picture may have no tiles.
    for turn, copies in itertools.product((False, True), (1, 2)):
        upright = [ImageOps.exif_transpose(frame) for frame in frames] if turn else frames
        own = _planes_from(adapted, processor, upright, kind, copies)
        if 0 < len(own) <= len(planes) and all(map(_alike, own, planes)):
            break
    else:
        raise ValueError(
            f"{where}, {frames[0].width} x {frames[0].height}: the processor makes other pixels of it than the inputs "
            "have; pass what the processor got, and if it got other arguments too, a function of a picture in its place"
        )
    orientation = upright[0].getexif().get(ExifTags.Base.Orientation, 1)
    width, height = upright[0].size if orientation < 5 else upright[0].size[::-1]
    probes = [
        _planes_from(adapted, processor, [probe] * len(upright), kind, copies)
        for probe in _probes(width, height, orientation)
    ]
    places = [_fit([plane.pixels.double() for plane in same], (width, height)) for same in zip(*probes, strict=True)]
    if kind == "video":
        names = [f"frame {number}" for number in range(1, len(own) + 1)]
    else:
        names = names_of(own, [_covers_all(place) for place in places])
    return list(zip(names, places, strict=True))


def _planes_from(
    adapted: AdaptedModel, processor: Any, frames: Sequence[Image.Image], kind: str, copies: int
) -> list[Plane]:
    """Call the processor, on a picture among `copies` of it or on the frames of a video, and take the planes."""
    inputs: Mapping[str, Any]
    if not hasattr(processor, "image_processor"):
        inputs, copies = processor(frames[0] if kind == "image" else list(frames)), 1
    elif kind == "image":
        inputs = processor(text=[processor.image_token * copies], images=[[frames[0]] * copies], return_tensors="pt")
    else:
        video = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
        inputs, copies = processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt"), 1
    planes = planes_of(adapted, inputs, kind) or planes_of(adapted, inputs, "image")
    return planes[: len(planes) // copies]


def _alike(one: Plane, other: Plane) -> bool:
    """Whether two planes show the same, but for half precision."""
    if one.pixels.shape != other.pixels.shape:
        return False
    most = 0.01 * float(other.pixels.abs().max())  # some processors leave pixels at 0 to 255
    return float((one.pixels - other.pixels).abs().mean()) <= most


def names_of(planes: Sequence[Plane], whole: Sequence[bool]) -> list[str]:
    """Name the planes of one picture; `whole` says which of them show all of it."""
    names = []
    if len(planes) == 1 and not whole[0]:
        return ["part of the picture"]
    for number, plane in enumerate(planes):
        tile = f"tile {number + 1 - sum(whole[:number])} of {len(planes) - sum(whole)}"
        names.append(plane.name or ("whole picture" if whole[number] else tile))
    return names


def _covers_all(place: torch.Tensor) -> bool:
    """Whether a plane shows the whole picture, from one corner to the other."""
    corners = place @ torch.tensor([[0, 1], [0, 1], [1, 1]]).double()
    return bool((corners.amin(1) < 0.02).all() and (corners.amax(1) > 0.98).all())


def _probes(width: int, height: int, orientation: int) -> list[Image.Image]:
    """Make a black picture, a white one, and one with a ramp in each direction, as the camera would have them lie."""
    x, y = (np.rint(np.linspace(0, 255, size)).astype(np.uint8) for size in (width, height))
    probes = []
    for values in (np.uint8(0), np.uint8(255), x[None, :, None], y[:, None, None]):
        probe = Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (height, width, 3))))
        if orientation in _LYING:
            probe = probe.transpose(_LYING[orientation])
            probe.getexif()[ExifTags.Base.Orientation] = orientation
        probes.append(probe)
    return probes


def _fit(probes: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Fit the places that a plane's pixels come from.

    Args:
        probes: the plane [C, H, W] of each of `_probes`.
        size: the picture's width and height.

    Returns:
        The map, as `sources_of` says.

    Raises:
        ValueError: the pixels do not lie as the picture's.
    """
    black, white, *ramps = (probe.sum(0).flatten() for probe in probes)
    span, (_, rows, columns) = white - black, probes[0].shape
    visible = torch.nonzero(span.abs() > span.abs().max() / 2)[:, 0]
    visible = visible[:: len(visible) // 200_000 + 1]  # enough of a large plane
    u, v = ((visible % columns).double() + 0.5) / columns, ((visible // columns).double() + 0.5) / rows
    at = torch.stack([u, v, torch.ones_like(u)], -1)
    fits = []
    for axis, (ramp, pixels) in enumerate(zip(ramps, size, strict=True)):
        if pixels == 1:  # no ramp
            fits.append(torch.eye(3).double()[axis])
            continue
        place = ((ramp - black)[visible] / span[visible] * (pixels - 1) + 0.5) / pixels
        fit = _least_squares(at, place)
        # At the picture's edges a resize has no neighbours on one side, and its values bend.
        edge = min(2.5 * max(abs(float(fit[0])) / columns, abs(float(fit[1])) / rows, 1 / pixels), 0.3)
        inner = (place > edge) & (place < 1 - edge)
        if bool(inner.any()) and _range(place[inner]) > _range(place) / 5:
            fit = _least_squares(at[inner], place[inner])
        if float((at @ fit - place).abs().median()) > 0.02 + 1 / pixels:
            raise ValueError(
                "the places of a picture's pixels in the inputs are not known: the processor lays them out in an "
                "order that is not among those of fitprune.families.planes"
            )
        fits.append(fit)
    return torch.stack(fits)


def _least_squares(at: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Solve `at` [pixels, 3] times the fit [3] = `place` [pixels]; what the pixels leave open is 0."""
    inverse: torch.Tensor = torch.linalg.pinv(at.T @ at, hermitian=True)
    return inverse @ (at.T @ place)


def _range(values: torch.Tensor) -> float:
    return float(values.max() - values.min())
