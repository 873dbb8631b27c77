"""Pictures with words in pixels: a frame of an animation, and a strip of layers. Read at a width of 390 pixels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from fitprune.pictures.draw import draw_kept
from fitprune.pictures.example import Example
from fitprune.pictures.notes import notes
from fitprune.pictures.views import chosen_layers
from fitprune.pictures.words import drawable, font, wrapped

INK, MUTED, NOW, BAR = "#1a1d21", "#565d66", "#d55e00", "#9aa3ad"
_MARGIN = 16
_BARS = 72  # height of the bars, pixels
STRIP = 4  # layers of a strip
_LINES = 6  # of the question and of each answer


def frame(example: Example, layer: int) -> Image.Image:
    """Draw one layer: question, picture, tokens, bars and answers; every layer's is of one size.

    Args:
        example: what to draw.
        layer: number of the decoder layer, from 0.

    Raises:
        ValueError: as for `draw_kept`.
    """
    kept = example.kept
    picture = draw_kept(example.picture, kept, layer, size=400)
    width = max(picture.width, 360)
    above = _wrapped(example.question, 20, width)
    below = [line for text in _answers(example) for line in _wrapped(text, 17, width)]
    small = [line for text in notes(example) for line in _wrapped(text, 13, width)]
    height = 26 * len(above) + picture.height + 34 + _BARS + 22 + 22 * len(below) + 17 * len(small) + 2 * _MARGIN
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw, y = ImageDraw.Draw(sheet), _MARGIN
    for line in above:
        draw.text((_MARGIN, y), line, INK, font(20))
        y += 26
    sheet.paste(picture, (_MARGIN + (width - picture.width) // 2, y))
    y += picture.height + 8
    draw.text((_MARGIN, y), f"layer {layer}", INK, font(18))
    right = f"{kept.counts[layer]} of {len(kept.entered)} visual tokens"
    draw.text((_MARGIN + width, y), right, INK, font(18), anchor="ra")
    y += 26
    _bars(draw, kept.counts, len(kept.entered), layer, (_MARGIN, y, width))
    y += _BARS + 4
    draw.text((_MARGIN, y), "tokens that enter each layer", MUTED, font(13))
    y += 18
    for line in below:
        draw.text((_MARGIN, y), line, INK, font(17))
        y += 22
    for line in small:
        draw.text((_MARGIN, y), line, MUTED, font(13))
        y += 17
    return sheet


def strip(example: Example) -> Image.Image:
    """Draw a few layers, two in a row, with the question above and the answers below.

    Args:
        example: what to draw.

    Raises:
        ValueError: as for `draw_kept`.
    """
    kept = example.kept
    layers = chosen_layers(kept, STRIP)
    tiles = [draw_kept(example.picture, kept, layer, size=400) for layer in layers]
    width, height = tiles[0].size
    captions = [caption(layer, kept.counts[layer], len(kept.entered)) for layer in layers]
    pitch = _MARGIN + max(width, *(round(font(28).getlength(text)) for text in captions))
    columns = 1 if width > 1.6 * 400 else 2  # several views of a picture take a row
    whole = max(columns * pitch - _MARGIN, 720)
    above = _wrapped(example.question, 32, whole)
    below = [line for text in _answers(example) for line in _wrapped(text, 28, whole)]
    small = [line for text in notes(example) for line in _wrapped(text, 24, whole)]
    rows = -(-len(tiles) // columns)
    lines = 42 * len(above) + 36 * len(below) + 31 * len(small)
    size = whole + 2 * _MARGIN, lines + rows * (height + 48) + 2 * _MARGIN
    sheet = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(sheet), _MARGIN
    for line in above:
        draw.text((_MARGIN, y), line, INK, font(32))
        y += 42
    for place, (text, tile) in enumerate(zip(captions, tiles, strict=True)):
        row, column = divmod(place, columns)
        corner = _MARGIN + column * pitch, y + row * (height + 48)
        sheet.paste(tile, corner)
        draw.text((corner[0], corner[1] + height + 4), text, INK, font(28))
    y += rows * (height + 48)
    for line in below:
        draw.text((_MARGIN, y), line, INK, font(28))
        y += 36
    for line in small:
        draw.text((_MARGIN, y), line, MUTED, font(24))
        y += 31
    return sheet


def caption(layer: int, tokens: int, total: int) -> str:
    """Say what enters a layer."""
    return f"layer {layer}: {tokens} of {total}" if tokens < total else f"layer {layer}: all {total}"


def _answers(example: Example) -> list[str]:
    return [f"{name}: {answer}" for name, answer in example.texts().items()]


def _bars(draw: ImageDraw.ImageDraw, counts: Sequence[int], most: int, layer: int, place: tuple[int, int, int]) -> None:
    left, top, width = place
    step = width / len(counts)
    for number, count in enumerate(counts):
        x, height = left + number * step, max(1, round(_BARS * count / most))
        box = (round(x), top + _BARS - height, max(round(x), round(x + step) - 2), top + _BARS)
        draw.rectangle(box, NOW if number == layer else BAR)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    return wrapped(drawable(text), width, font(size).getlength, _LINES)
