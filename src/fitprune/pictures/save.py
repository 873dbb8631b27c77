"""Write what stays of a picture as a file, by the ending of its name: an animation, a strip of layers, or a page."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from fitprune._support import files
from fitprune._support.page import page
from fitprune.pictures import player
from fitprune.pictures.draw import OUTLINE
from fitprune.pictures.example import Example
from fitprune.pictures.sheets import frame, strip
from fitprune.pictures.svg_strip import svg_strip
from fitprune.pictures.words import lacks

logger = logging.getLogger(__name__)

LAYER, LAST = 400, 2500  # milliseconds that an animation stays at a layer, and at the last
_RATE = 10  # frames a second of a video


def save_example(example: Example, path: str | os.PathLike[str]) -> None:
    """Write an example, whole or not at all: .gif and .mp4 go through all layers, .png and .svg show a few, .html all.

    Args:
        example: what to draw.
        path: the file.

    Raises:
        ValueError: its name ends otherwise, or it is not known where the tokens lie.
        ImportError: an mp4 needs the package `av`.
        OSError: the file cannot be written.
    """
    write = writer(path)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        write(example, file)
    if Path(path).suffix.lower() not in (".svg", ".html") and any(
        map(lacks, [example.question, *example.texts().values()])
    ):
        logger.warning("%s: its font lacks letters of the question or an answer; .svg and .html show all", path)


def writer(path: str | os.PathLike[str]) -> Callable[[Example, IO[bytes]], None]:
    """Choose by the ending of a file's name what writes it; refuse others, before long work.

    Args:
        path: the file.

    Raises:
        ValueError: its name ends otherwise.
        ImportError: an mp4 needs the package `av`.
    """
    ending = Path(path).suffix.lower()
    if ending not in _WRITERS:
        raise ValueError(f"{path}: must end in {', '.join(_WRITERS)}")
    if ending == ".mp4":
        _require_av()
    return _WRITERS[ending]


def example_page(example: Example) -> str:
    """Make the page of one example, which loads nothing."""
    title = "What stays of the picture, layer by layer"
    return page(title, player.player(example), style=player.STYLE, script=player.script(), maker=files.PICTURE_MARK)


def _frames(example: Example) -> list[Image.Image]:
    return [frame(example, layer) for layer in range(example.kept.layers)]


def _write_gif(example: Example, file: IO[bytes]) -> None:
    frames = _frames(example)
    both = Image.new("RGB", (frames[0].width, 2 * frames[0].height))  # they have all colours but the line's
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, frames[0].height))
    palette = both.quantize(254, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).getpalette() or []
    colours = Image.new("P", (1, 1))
    colours.putpalette([*palette, *OUTLINE])
    first, *others = (each.quantize(palette=colours, dither=Image.Dither.NONE) for each in frames)
    durations = [LAYER] * (len(frames) - 1) + [LAST]
    facts = {"duration": durations, "loop": 0, "comment": files.PICTURE_MARK.encode()}
    first.save(file, format="gif", save_all=True, append_images=others, **facts)


def _write_mp4(example: Example, file: IO[bytes]) -> None:
    import av

    frames = _frames(example)
    with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as video:
        video.metadata["comment"] = files.PICTURE_MARK
        stream = video.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=Fraction(_RATE))
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for number, each in enumerate(frames):
            sheet = Image.new("RGB", (stream.width, stream.height), "white")
            sheet.paste(each, (0, 0))
            drawn = av.VideoFrame.from_ndarray(np.asarray(sheet), format="rgb24")
            for _ in range((LAST if number == len(frames) - 1 else LAYER) * _RATE // 1000):
                drawn.pts = None
                video.mux(stream.encode(drawn))
        video.mux(stream.encode())


def _require_av() -> None:
    try:
        import av  # noqa: F401  # only whether it is there
    except ImportError as error:
        why = "" if error.name == "av" else f", which cannot be imported ({error})"
        raise ImportError(f"a video needs PyAV{why}: pip install av, or write a .gif") from None


def _write_png(example: Example, file: IO[bytes]) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", files.PICTURE_MARK)
    strip(example).save(file, format="png", optimize=True, pnginfo=facts)


def _write_svg(example: Example, file: IO[bytes]) -> None:
    file.write(svg_strip(example).encode())


def _write_html(example: Example, file: IO[bytes]) -> None:
    file.write(example_page(example).encode())


_WRITERS: dict[str, Callable[[Example, IO[bytes]], None]] = {
    ".gif": _write_gif,
    ".mp4": _write_mp4,
    ".png": _write_png,
    ".svg": _write_svg,
    ".html": _write_html,
}
