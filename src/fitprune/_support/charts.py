"""Charts as SVG text: lines, steps and bars, which differ by marker, dash and fill as well as by colour. Pure Python.

Each is drawn twice, for a wide window and for one of 390 px, and the page shows the one that fits, at its real size.
Colours are the page's (`fitprune._support.page`), so that a chart is dark or light with it. In a file of its own, where
there is no page, a chart is light.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from fitprune._support import svg
from fitprune._support.page import Html

WIDE, NARROW = 720, 358  # pixels; the second is what a window of 390 leaves
_ROOM = 16  # pixels of a plot's width for each marker of a line; of many points only some get one
_MOST_NAMED = 200  # points of a line that say what they are under the pointer
_TOO_LARGE = 1e18


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, or one bar of each group.

    Attributes:
        name: in the legend.
        points: (x, y) of each; what is not finite is left out.
        look: number of its colour, marker and dash; 0 is drawn strongest.
        spread: low and high end of each point's interval, or none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: int = 1
    spread: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: what it shows, with its unit.
        low: its end; by the data where it is None.
        high: its other end, likewise.
        unit: after each figure that the pointer shows, such as "%".
        whole: whether it counts things, so that there is no half of one.
        marks: where figures stand below; round ones by default.
    """

    name: str
    low: float | None = None
    high: float | None = None
    unit: str = ""
    whole: bool = False
    marks: Sequence[float] = ()


def chart(
    kind: str,
    series: Sequence[Series],
    title: str,
    x: Axis,
    y: Axis,
    *,
    level: tuple[str, float] | None = None,
    wide: int = WIDE,
    narrow: int = NARROW,
    height: int = 300,
    legend: bool = True,
    file: bool = False,
) -> Html:
    """Draw a chart; `lines`, `steps` and `bars` are its three kinds.

    Args:
        kind: "lines" with a marker at each point, "steps" centred on the points, or "bars" from 0.
        series: what to draw.
        title: what the chart shows.
        x: the axis below.
        y: the axis beside, whose name is written above.
        level: name and height of a dotted line across.
        wide: width for a wide window, pixels.
        narrow: width for a narrow one; as `wide` for one drawing that serves both.
        height: of the plot without title and legend, pixels.
        legend: whether the names of the series stand under the plot.
        file: one SVG of width `wide` alone, as a file holds it.

    Returns:
        A `figure` for a page of `fitprune._support.page`, or the SVG of a file.
    """
    whole = _Chart(kind, [_finite(each) for each in series], title, x, y, level, height, legend)
    return (
        svg.file(whole.draw(wide)) if file else _figure([whole.draw(width) for width in dict.fromkeys((wide, narrow))])
    )


lines = functools.partial(chart, "lines")
steps = functools.partial(chart, "steps")
bars = functools.partial(chart, "bars")


def legend_of(series: Sequence[Series], *, wide: int = WIDE) -> Html:
    """Draw the legend of charts that have none of their own."""

    def draw(width: int) -> str:
        inner, height = svg.legend([(each.name, each.look) for each in series], width)
        return svg.picture(width, height, "legend", ", ".join(each.name for each in series), inner)

    return _figure([draw(width) for width in dict.fromkeys((wide, NARROW))])


def _figure(drawn: Sequence[str]) -> Html:
    """Put the wide and the narrow drawing side by side; the page's style shows one."""
    if len(drawn) > 1:
        names = ("wide", "narrow")
        drawn = [text.replace("<svg ", f"<svg class={name} ", 1) for name, text in zip(names, drawn, strict=True)]
    return Html(f"<figure class=chart>{''.join(drawn)}</figure>")


def _finite(series: Series) -> Series:
    """Leave out points that cannot be drawn."""
    ends = series.spread or [(y, y) for _, y in series.points]
    both = [
        (point, end)
        for point, end in zip(series.points, ends, strict=True)
        if all(math.isfinite(value) and abs(value) < _TOO_LARGE for value in (*point, *end))
    ]
    spread = [end for _, end in both] if series.spread else ()
    return dataclasses.replace(series, points=[point for point, _ in both], spread=spread)


@dataclasses.dataclass(frozen=True)
class _Plot:
    """Where the plot lies in the picture, and what it spans."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + self.width * (value - low) / (high - low)

    def down(self, value: float) -> float:
        low, high = self.y
        return self.top + self.height * (1 - (min(max(value, low), high) - low) / (high - low))


@dataclasses.dataclass(frozen=True)
class _Chart:
    kind: str
    series: Sequence[Series]
    title: str
    x: Axis
    y: Axis
    level: tuple[str, float] | None
    height: int
    legend: bool

    def draw(self, width: int) -> str:
        """Draw title, plot and legend at one width."""
        parts, top = svg.paragraph(self.title, 4, 16, width - 8, 14, "font-weight='600' fill='currentColor'")
        names, top = svg.paragraph(self.y.name, 4, top + 2, width - 8)
        spans, marks = self._spans()
        room = max(svg.width_of(svg.number(mark)) for mark in marks) + 12
        below_marks = self.x.marks or svg.ticks(*spans[0], 5, self.x.whole)
        beside = max(14.0, *(svg.width_of(svg.number(mark)) / 2 + 2 for mark in below_marks))
        plot = _Plot(room, top - 4, width - room - beside, self.height, *spans)
        parts += names + self._axes(plot, marks)
        order = sorted(range(len(self.series)), key=lambda at: self.series[at].look > 0)  # the broad line below others
        drawing = {"lines": self._line, "steps": self._stairs, "bars": self._bars}[self.kind]
        parts += [svg.painted(self.series[at].look, drawing(plot, at)) for at in order]
        below, bottom = svg.paragraph(
            self.x.name, plot.left + plot.width / 2, plot.top + self.height + 34, plot.width, anchor="middle"
        )
        parts += below
        if self.legend and (len(self.series) > 1 or self.level is not None):
            names_and_looks = [(each.name, each.look) for each in self.series]
            level = self.level[0] if self.level else None
            inner, tall = svg.legend(names_and_looks, width, level, filled=self.kind == "bars")
            parts.append(f"<g transform='translate(0 {bottom - 8:g})'>{inner}</g>")
            bottom += tall
        return svg.picture(width, bottom - 8, self.title, self._in_words(), "".join(parts))

    def _in_words(self) -> str:
        """Say what the chart shows, for who cannot see it."""
        texts = [
            f"{each.name}: {self._values(each, 0)} to {self._values(each, -1)}" for each in self.series if each.points
        ]
        return f"{self.y.name} against {self.x.name}. {'; '.join(texts[:20])}."

    def _values(self, series: Series, at: int) -> str:
        x, y = series.points[at]
        spread = f" ({' to '.join(map(svg.number, series.spread[at]))})" if series.spread else ""
        return f"{svg.number(y)}{self.y.unit}{spread} at {svg.number(x)}{self.x.unit}"

    def _tip(self, series: Series, at: int) -> str:
        """Say what a point is, under the pointer, unless there are many."""
        return f"{series.name}: {self._values(series, at)}" if len(series.points) <= _MOST_NAMED else ""

    def _spans(self) -> tuple[tuple[tuple[float, float], tuple[float, float]], list[float]]:
        """Find what both axes span, and the figures beside the plot."""
        across = [*self.x.marks, *(x for each in self.series for x, _ in each.points)]
        up = [y for each in self.series for _, y in each.points]
        up += [end for each in self.series for ends in each.spread for end in ends]
        up += [self.level[1]] if self.level is not None else []
        up += [0.0] if self.kind == "bars" else []
        marks = svg.ticks(*_ends(up, self.y), max(4, self.height // 50), self.y.whole)
        low = marks[0] if self.y.low is None else self.y.low
        high = marks[-1] if self.y.high is None else self.y.high
        left, right = _ends(across, self.x)
        space = 0.5 if self.x.whole else 0.04 * (right - left)
        span = (left - (space if self.x.low is None else 0), right + (space if self.x.high is None else 0))
        return (span, (low, high)), [mark for mark in marks if low <= mark <= high]

    def _axes(self, plot: _Plot, marks: Sequence[float]) -> list[str]:
        parts, right, bottom = [], plot.left + plot.width, plot.top + plot.height
        for mark in marks:
            y = plot.down(mark)
            parts.append(svg.line(plot.left, y, right, y, f"stroke='{svg.LINE}'"))
            parts.append(svg.text(plot.left - 6, y + 4, svg.number(mark), "end"))
        fewest, free = 3 if svg.width_of(svg.number(plot.x[1])) < 30 else 2, 0.0
        for mark in self.x.marks or svg.ticks(*plot.x, max(fewest, int(plot.width // 60)), self.x.whole):
            if plot.x[0] <= mark <= plot.x[1]:
                x, half = plot.across(mark), svg.width_of(svg.number(mark)) / 2
                parts.append(svg.line(x, bottom, x, bottom + 4))
                if x - half >= free:  # the figure before leaves room
                    parts.append(svg.text(x, bottom + 17, svg.number(mark), "middle"))
                    free = x + half + 3
        parts.append(svg.line(plot.left, bottom, right, bottom))
        if self.level is not None:
            y = plot.down(self.level[1])
            parts.append(svg.line(plot.left, y, right, y, svg.DOTTED))
        if not any(each.points for each in self.series):
            parts.append(svg.text(plot.left + plot.width / 2, plot.top + plot.height / 2, "no values", "middle"))
        return parts

    def _line(self, plot: _Plot, number: int) -> str:
        series, count = self.series[number], len(self.series)
        # Series at the same places stand a little aside, so that their intervals do not cover each other.
        aside = min(4.0, 30 / count) * (number - (count - 1) / 2) if any(each.spread for each in self.series) else 0
        where = [(plot.across(x) + aside, plot.down(y)) for x, y in series.points]
        parts = [svg.polyline(where, series.look)]
        for (x, _), (low, high) in zip(where, series.spread, strict=False):
            parts.append(svg.interval(x, plot.down(high), plot.down(low)))
        return "".join([*parts, *self._markers(plot, series, where)])

    def _stairs(self, plot: _Plot, number: int) -> str:
        series = self.series[number]
        xs = [x for x, _ in series.points]
        between = [(a + b) / 2 for a, b in itertools.pairwise(xs)]
        ends = [max(xs[0] - 0.5, plot.x[0]), *between, min(xs[-1] + 0.5, plot.x[1])] if xs else []
        stairs = [
            (plot.across(end), plot.down(y))
            for (_, y), both in zip(series.points, itertools.pairwise(ends), strict=True)
            for end in both
        ]
        where = [(plot.across(x), plot.down(y)) for x, y in series.points]
        return "".join([svg.polyline(stairs, series.look), *self._markers(plot, series, where)])

    def _markers(self, plot: _Plot, series: Series, where: Sequence[tuple[float, float]]) -> list[str]:
        every = math.ceil(len(where) * _ROOM / plot.width) or 1
        return [
            svg.marker(series.look, x, y, self._tip(series, at)) for at, (x, y) in enumerate(where) if at % every == 0
        ]

    def _bars(self, plot: _Plot, number: int) -> str:
        series = self.series[number]
        places = sorted({x for each in self.series for x, _ in each.points})
        least = min((b - a for a, b in itertools.pairwise(places)), default=1.0)
        width = 0.8 * plot.width * least / (plot.x[1] - plot.x[0]) / len(self.series)
        start, zero = width * (number - len(self.series) / 2), plot.down(0)
        return "".join(
            svg.bar(plot.across(x) + start, plot.down(y), zero, width, series.look, self._tip(series, at))
            for at, (x, y) in enumerate(series.points)
        )


def _ends(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """Find the ends of an axis, which differ."""
    low = min(values, default=0.0) if axis.low is None else axis.low
    high = max(values, default=1.0) if axis.high is None else axis.high
    if low < high:
        return low, high
    pad = abs(low) * 0.01 or 1.0
    return (low if axis.low is not None else low - pad), max(low, high) + pad
