"""A strip of layers as SVG: for papers, where it scales."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from fitprune._support.files import PICTURE_MARK
from fitprune._support.page import escape
from fitprune.families.planes import Box
from fitprune.pictures import player
from fitprune.pictures.draw import OUTLINE, PAPER
from fitprune.pictures.example import Example
from fitprune.pictures.notes import notes
from fitprune.pictures.sheets import STRIP, caption
from fitprune.pictures.views import chosen_layers, views_of
from fitprune.pictures.words import plain, width_of, wrapped

_WIDTH, _GAP = 360, 12  # units of the whole strip, and between pictures
_LINES = 200  # of the question and of each answer
_SIZE, _CAPTION = 15, 13  # of text, and of what stands below a picture

_STYLE = f""".kept-strip text{{font:{_SIZE}px system-ui,sans-serif;fill:#1a1d21}}
.kept-strip .caption{{font-size:{_CAPTION}px}}.kept-strip .paper{{fill:rgb{PAPER}}}
.kept-strip .left{{fill:#0b0d0f;fill-opacity:.82}}.kept-strip .outside{{fill:rgb{PAPER};fill-opacity:.7}}
.kept-strip .edge{{fill:none;stroke:rgb{OUTLINE};stroke-width:6}}"""


def svg_strip(example: Example) -> str:
    """Draw a few layers, two in a row; where tokens cover each other, as tiles and thumbnails, each view has its rows.

    Args:
        example: what to draw.

    Raises:
        ValueError: it is not known where in the picture the tokens lie.
    """
    kept, picture = example.kept, example.picture
    scale = player.SIDE / max(picture.size)
    width, height = (scale * side for side in picture.size)
    views = views_of(kept, width, height)
    columns = 2 if len(views) == 1 else len(views)  # either layers or views stand side by side
    tile = (_WIDTH - _GAP * (columns - 1)) / columns
    ratios = [(view.extent[3] - view.extent[1]) / (view.extent[2] - view.extent[0]) for view in views]
    url = player.data_url(picture, 640)
    name = f"picture-{hashlib.sha256(url.encode()).hexdigest()[:12]}"  # several strips may be in one page
    drawn, y = _lines([example.question], 4)
    for place, layer in enumerate(layers := chosen_layers(kept, STRIP)):
        x = place % 2 * (tile + _GAP) if len(views) == 1 else 0.0
        for number, (view, ratio) in enumerate(zip(views, ratios, strict=True)):
            left, edge = player.veil(view, kept.present(layer))
            drawn.append(
                f'<svg x="{x + number * (tile + _GAP):.2f}" y="{y:.2f}" width="{tile:.2f}" height="{tile * ratio:.2f}" '
                f'viewBox="{_box(view.extent)}"><rect class="paper" x="-{player.SIDE}" y="-{player.SIDE}" '
                f'width="{3 * player.SIDE}" height="{3 * player.SIDE}"/><use xlink:href="#{name}"/>'
                f'<path class="outside" fill-rule="evenodd" d="{player.outside(view)}"/><path class="left" d="{left}"/>'
                f'<path class="edge" d="{edge}"/></svg>'
            )
        text = caption(layer, kept.counts[layer], len(kept.entered))
        drawn.append(f'<text class="caption" x="{x:.2f}" y="{y + tile * max(ratios) + 16:.2f}">{escape(text)}</text>')
        if place % columns == columns - 1 or len(views) > 1 or place == len(layers) - 1:
            y += tile * max(ratios) + 28
    answers, y = _lines([f"{model}: {answer}" for model, answer in example.texts().items()], y)
    small, y = _lines(notes(example), y, _CAPTION)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="kept-strip" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{-_GAP} 0 {_WIDTH + 2 * _GAP} {y:.0f}" width="{2 * _WIDTH}" '
        'style="max-width:100%;height:auto;background:#fff" role="img"><title>Visual tokens that enter '
        f"layers {', '.join(map(str, layers))}</title><metadata>{PICTURE_MARK}</metadata><style>{_STYLE}</style>"
        f'<defs><image id="{name}" width="{width:.2f}" height="{height:.2f}" preserveAspectRatio="none" '
        f'xlink:href="{url}"/></defs>{"".join([*drawn, *answers, *small])}</svg>\n'
    )


def _lines(texts: Sequence[str], y: float, size: int = _SIZE) -> tuple[list[str], float]:
    """Write texts below each other, and say where the next thing begins."""
    drawn, measure = [], functools.partial(width_of, size=size)
    for line in (line for text in texts for line in wrapped(plain(text), _WIDTH, measure, _LINES)):
        kind = "" if size == _SIZE else ' class="caption"'
        drawn.append(f'<text{kind} x="0" y="{y + 14:.2f}">{escape(line)}</text>')
        y += size + 5
    return drawn, y + 6


def _box(box: Box) -> str:
    left, top, right, bottom = box
    return " ".join(f"{value:.2f}" for value in (left, top, right - left, bottom - top))
