"""Put pictures and what stays of them into a page: a player of layers, which shows the last one where no script runs.

The page is a person's own: nothing is loaded, and what a model or a stranger wrote is text.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from fitprune._support.page import Html, escape, facts
from fitprune.families.grids import Grid
from fitprune.families.planes import Box
from fitprune.pictures.draw import HEAT, OUTLINE, PAPER
from fitprune.pictures.example import Example
from fitprune.pictures.kept import KeptImage
from fitprune.pictures.notes import notes
from fitprune.pictures.views import View, ranks, views_of

SIDE = 1000  # units of the longest side of a picture
_PIXELS = 1024  # most pixels of a side that go into a page
_HINT = (
    "Draw a box on a picture to see what share of it is left; or go there with Tab and use the arrow keys, with Shift "
    "to resize and Escape to remove it."
)
_TOUCH = "Tap two opposite corners of a box on a picture to see what share of it is left."

STYLE = f"""
.kept{{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:var(--gap);align-items:start;
margin:var(--gap) 0 2rem}}
.kept .views{{display:flex;flex-wrap:wrap;gap:.5rem}}.kept .view{{flex:1 1 40%;min-width:9rem}}
.kept .view svg{{width:100%;height:auto;max-height:30rem;touch-action:pan-y pinch-zoom;
cursor:crosshair;user-select:none}}
.kept .paper{{fill:rgb{PAPER}}}.kept .left{{fill:#0b0d0f;fill-opacity:.82}}
.kept .outside{{fill:rgb{PAPER};fill-opacity:.7;fill-rule:evenodd}}
.kept .edge{{fill:none;stroke:rgb{OUTLINE};stroke-width:4}}.kept .heat path{{fill-opacity:.7}}
.kept .frame{{fill:none;stroke:#fff;stroke-width:2;stroke-dasharray:6 4;vector-effect:non-scaling-stroke;
filter:drop-shadow(0 0 2px #000)}}
.kept .bars{{width:100%;height:6rem;cursor:pointer;background:var(--panel)}}
.kept .bars rect{{fill:var(--c7)}}.kept .bars rect.now{{fill:var(--c2)}}
.kept .bars polyline{{fill:none;stroke:var(--c1);stroke-width:3;vector-effect:non-scaling-stroke}}
.kept .ends{{display:flex;justify-content:space-between;margin:0;max-width:none}}
.kept .controls{{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;margin:.5rem 0}}
.kept .controls label{{display:flex;gap:.5rem;align-items:center}}.kept .layer{{flex:1 1 12rem}}
.kept .controls [hidden],.kept .controls[hidden]{{display:none}}
.kept [type=range]{{flex:1;min-width:6rem;padding:0;accent-color:var(--accent)}}.kept .play{{min-width:5rem}}
.kept [type=checkbox]{{min-height:1.3rem;width:1.3rem;accent-color:var(--accent)}}
.kept .count{{font-weight:700;margin:.2rem 0;font-variant-numeric:tabular-nums}}
.kept .question{{font-weight:700;margin:0;grid-column:1/-1}}
.kept .legend i{{display:inline-block;width:7rem;height:.8rem;margin:0 .4rem;vertical-align:middle;
background:linear-gradient(90deg,{",".join(HEAT)})}}
@media (max-width:799px){{.kept{{grid-template-columns:minmax(0,1fr)}}}}
"""


def script() -> str:
    """Give the JavaScript that runs all players of a page."""
    return f"'use strict';\n{play()}for (const figure of document.querySelectorAll('figure.kept')) play(figure);\n"


def play() -> str:
    """Give the JavaScript function that runs one player."""
    return importlib.resources.files("fitprune.pictures").joinpath("player.js").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class Heat:
    """What colours the tokens of a picture.

    Attributes:
        values: [layers, tokens], from 0 to 1; NaN for no colour.
        name: of the switch.
        low: what the lowest value means, after what the values are.
        high: what the highest means.
        on: whether it is to be seen at once.
    """

    values: torch.Tensor
    name: str
    low: str
    high: str
    on: bool = False

    @classmethod
    def of_scores(cls, scores: torch.Tensor) -> Heat:
        """Colour by the rank of each layer's scores."""
        low = "rank of a token's score in this layer: lowest, leaves first"
        return cls(torch.stack([ranks(row) for row in scores]), "scores", low, "highest")


def player(example: Example, number: int = 0, *, heat: Heat | None = None) -> Html:
    """Make the player of one picture, for a page with `STYLE` and `script`.

    Args:
        example: what to show.
        number: of the player in its page.
        heat: what colours the tokens; by default the scores, if there are any.

    Raises:
        ValueError: it is not known where in the picture the tokens lie.
    """
    kept, picture = example.kept, example.picture
    scale = SIDE / max(picture.size)
    width, height = (scale * side for side in picture.size)
    if heat is None and kept.scores is not None:
        heat = Heat.of_scores(kept.scores)
    views = views_of(kept, width, height)
    question = f"<p class=question>{escape(example.question)}</p>" if example.question else ""
    name = f"picture-{number}"
    drawn = []
    for place, view in enumerate(views):
        if not place:
            image = (
                f"<image id={name} width={_short(width)} height={_short(height)} preserveAspectRatio=none "
                f'href="{data_url(picture)}" />'
            )
        else:
            image = f"<use href=#{name} />"
        caption = f"<p class=small>{escape(view.name)}</p>" if len(views) > 1 else ""
        drawn.append(f"<div class=view>{_svg(view, image, kept)}{caption}</div>")
    data = {
        "layers": kept.layers,
        "entered": kept.entered.tolist(),
        "size": [round(width, 2), round(height, 2)],
        "views": [[_grid(grid, box) for grid, box in view.grids] for view in views],
        "ranks": None if heat is None else _bytes(heat.values),
        "colours": HEAT,
        "names": [view.name for view in views],
        "hint": "" if number else _HINT,  # said once in a page
        "touch": "" if number else _TOUCH,
    }
    return Html(
        f"<figure class=kept>{question}<div class=views>{''.join(drawn)}</div><div>"
        f"{_controls(kept.layers, heat)}{_bars(kept.counts, len(kept.entered))}"
        f"<p class='share small' aria-live=polite></p>{_facts(example)}</div>"
        f"<script type=application/json>{_json(data)}</script></figure>"
    )


def _json(data: Any) -> str:
    """Write data so that no text in it ends the script."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _facts(example: Example) -> str:
    answers = facts(example.texts().items()) if example.answers else ""
    return f"{answers}<p class='small'>{'<br>'.join(map(escape, notes(example, views_named=True)))}</p>"


def _controls(layers: int, heat: Heat | None) -> str:
    switch = legend = ""
    if heat is not None:
        switch = f"<label><input type=checkbox{' checked' if heat.on else ''}>{escape(heat.name)}</label>"
        legend = f"<p class='legend small' hidden>{escape(heat.low)}<i></i>{escape(heat.high)}</p>"
    return (
        f"<div class=controls hidden><button class=play type=button>Play</button><label class=layer>layer"
        f"<input type=range min=0 max={layers - 1} value={layers - 1}></label>{switch}</div>{legend}"
    )


def _bars(counts: Sequence[int], most: int) -> str:
    """Draw the tokens, of `most`, that enter each layer, the last layer stressed."""
    layers = len(counts)
    bars = "".join(
        f"<rect{' class=now' if layer == layers - 1 else ''} x={10 * layer + 1} width=8 "
        f"y={_short(100 - 100 * n / most)} height={_short(100 * n / most)}><title>layer {layer}: {n}</title></rect>"
        for layer, n in enumerate(counts)
    )
    return (
        f"<p class=count>Layer {layers - 1}: {counts[-1]} of {most} visual tokens</p>"
        f"<svg class=bars viewBox='0 0 {10 * layers} 100' preserveAspectRatio=none role=img "
        f"aria-label='visual tokens that enter each layer, from {counts[0]} to {counts[-1]}'>{bars}"
        f"<polyline points='' /></svg><p class='ends small'><span>layer 0</span>"
        f"<span>visual tokens that enter each layer</span><span>{layers - 1}</span></p>"
    )


def _svg(view: View, image: str, kept: KeptImage) -> str:
    """Draw a view at the last layer."""
    present = kept.present(kept.layers - 1)
    left, edge = veil(view, present)
    x, y, right, bottom = view.extent
    tokens = {token for grid, _ in view.grids for token in grid.tokens.flatten().tolist()}
    entering = sum(present[list(tokens)].tolist())
    what = f"{view.name}: {entering} of {len(tokens)} visual tokens enter layer {kept.layers - 1}"
    box = [_short(value) for value in (x, y, right - x, bottom - y)]
    place = " ".join(f"{name}={value}" for name, value in zip(("x", "y", "width", "height"), box, strict=True))
    return (
        f"<svg viewBox='{' '.join(box)}' preserveAspectRatio=xMinYMin role=application tabindex=0 "
        f'aria-label="{escape(what)}; the arrow keys draw a box">'
        f"<rect class=paper {place} />{image}"
        f"<path class=outside d='{outside(view)}' /><g class=heat></g><path class=left d='{left}' />"
        f"<path class=edge d='{edge}' /><rect class=frame /></svg>"
    )


def veil(view: View, present: torch.Tensor) -> tuple[str, str]:
    """Give the paths, in SVG's words, of the cells whose token has left, and of the line between them and the others.

    Args:
        view: with the grids, in units of the picture.
        present: [tokens] bool.
    """
    left, edge = [], []
    for grid, (x, y, right, bottom) in view.grids:
        rows, columns = grid.tokens.shape
        width, height = (right - x) / columns, (bottom - y) / rows
        stays = present[grid.tokens]
        for row, column in (~stays).nonzero().tolist():
            left.append(
                f"M{_short(x + column * width)} {_short(y + row * height)}h{_short(width)}v{_short(height)}"
                f"h{_short(-width)}z"
            )
        across, down = x + width * (torch.arange(columns) + 0.5), y + height * (torch.arange(rows) + 0.5)
        for right_by, down_by in ((0, -1), (0, 1), (-1, 0), (1, 0)):  # also into a neighbouring grid
            beside = view.at(present, across + right_by * width, down + down_by * height)
            line = f"v{_short(height)}" if right_by else f"h{_short(width)}"
            for row, column in (beside & ~stays).nonzero().tolist():
                place = x + (column + (right_by > 0)) * width, y + (row + (down_by > 0)) * height
                edge.append(f"M{_short(place[0])} {_short(place[1])}{line}")
    return "".join(left), "".join(edge)


def outside(view: View) -> str:
    """Give the path of what no token of a view sees, to be filled by the rule evenodd."""
    if view.is_covered:
        return ""
    boxes = [view.extent, *(box for _, box in view.grids)]
    return "".join(
        f"M{_short(x)} {_short(y)}H{_short(right)}V{_short(bottom)}H{_short(x)}z" for x, y, right, bottom in boxes
    )


def _grid(grid: Grid, box: Box) -> dict[str, Any]:
    rows, columns = grid.tokens.shape
    numbers = grid.tokens.flatten().tolist()
    usual = numbers == list(range(rows * columns))
    return {
        "rows": rows, "columns": columns, "box": [round(side, 2) for side in box], "tokens": None if usual else numbers
    }  # fmt: skip


def _bytes(values: torch.Tensor) -> str:
    """Write values from 0 to 1 as bytes, 255 for none."""
    whole = (values * 254).round().nan_to_num(255).to(torch.uint8)
    return base64.b64encode(whole.numpy().tobytes()).decode()


def data_url(picture: Image.Image, most: int = _PIXELS) -> str:
    """Write a picture into a `data:` URL, with sides of at most `most` pixels, in the shorter of JPEG and PNG."""
    picture = picture.convert("RGB")
    picture.thumbnail((most, most))
    formats: list[tuple[str, dict[str, Any]]] = [("jpeg", {"quality": 88})]
    if picture.width * picture.height <= 2**16 or picture.getcolors(4096):  # of a large photo it takes a second
        formats.append(("png", {"optimize": True}))
    kinds = []
    for kind, options in formats:
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        kinds.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(kinds)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
