"""Charts: drawn for two widths, within their picture, told apart without colour, whatever the data."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitprune._support import charts, svg
from fitprune._support.charts import Axis, Series, bars, legend_of, lines, steps

SVG = "{http://www.w3.org/2000/svg}"
X, Y = Axis("removed, %", unit="%"), Axis("accuracy, %", unit="%")


def parsed(figure):
    """The SVGs of a figure."""
    return [
        ET.fromstring(text)
        for text in re.findall(r"<svg.*?</svg>", re.sub(r"class=(\w+)", r"class='\1'", figure), re.S)
    ]


def texts(picture):
    """(left, right, text) of each, by the estimated width, and how high it stands."""
    for element in picture.iter(f"{SVG}text"):
        size = float(element.get("font-size", 12))
        width = svg.width_of(element.text or "", size)
        x = float(element.get("x"))
        start = {"start": x, "middle": x - width / 2, "end": x - width}[element.get("text-anchor")]
        yield start, start + width, element.text


@pytest.mark.parametrize("draw", [lines, steps, bars])
def test_a_chart_is_drawn_for_a_wide_and_a_narrow_window(draw):
    figure = draw([Series("one", [(1, 2), (2, 3)]), Series("two", [(1, 1), (2, 5)], 2)], "a title", X, Y)
    wide, narrow = parsed(figure)
    assert (wide.get("width"), narrow.get("width")) == ("720", "358")
    assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    for picture in (wide, narrow):
        assert picture.find(f"{SVG}title").text == "a title"
        assert "one: 2% at 1% to 3% at 2%" in picture.find(f"{SVG}desc").text
    assert len(parsed(draw([Series("one", [(1, 2)])], "t", X, Y, wide=358))) == 1
    assert draw([Series("one", [(1, 2)])], "t", X, Y) == draw([Series("one", [(1, 2)])], "t", X, Y)


def test_looks_differ_without_colour():
    looks = [svg.marker(look, 0, 0) + svg.polyline([(0, 0), (1, 1)], look) for look in range(15)]
    assert len(set(looks)) == 15
    fills = {svg.bar(0, 1, 0, 1, look) for look in (1, 2, 3)}
    assert len(fills) == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=70),
            st.lists(st.tuples(*[st.floats(width=32) | st.integers(-(10**6), 10**6)] * 2), max_size=12),
        ),
        max_size=9,
    ),
    st.sampled_from([lines, steps, bars]),
    st.text(max_size=120),
)
def test_any_data_is_drawn_within_the_picture(data, draw, title):
    data = [
        (re.sub(r"[^ -\U0010ffff]|[\ud800-\udfff\ufffe\uffff\x7f-\x9f]", "", name), points) for name, points in data
    ]
    title = re.sub(r"[^ -\U0010ffff]|[\ud800-\udfff\ufffe\uffff\x7f-\x9f]", "", title)
    for picture in parsed(draw([Series(name, pts, at) for at, (name, pts) in enumerate(data)], title, X, Y)):
        width, height = float(picture.get("width")), float(picture.get("height"))
        for start, end, text in texts(picture):
            assert start >= -1, text
            assert end <= width + 1 or len(text) < 9, text
        for element in picture.iter():
            assert not any("nan" in value or "inf" in value for name, value in element.items() if name != "class")
            if "y" in element.attrib:
                assert -6 <= float(element.get("y")) <= height  # a sample of a bar begins above its line


def test_the_legend_stands_below_the_plot():
    series = [Series(f"method {at}", [(1, at), (2, at)], at) for at in range(15)]
    for picture in parsed(lines(series, "t", X, Y)):
        plot = max(float(line.get("y2")) for line in picture.iter(f"{SVG}line") if line.get("stroke") == "currentColor")
        group = next(
            each for each in picture if each.tag == f"{SVG}g" and each.get("transform", "").startswith("translate(0 ")
        )
        assert float(group.get("transform").split()[1].rstrip(")")) > plot
        assert len(list(group.iter(f"{SVG}text"))) == 15


def test_text_of_strangers_is_escaped():
    figure = lines([Series("<script>x</script>", [(1, 2), (2, 2)])], "</title><b>", X, Axis("<i>"), level=("'\"<u>", 1))
    assert not set(re.findall(r"<(script|b|i|u)\b", figure))
    assert "&lt;script&gt;" in figure


def test_what_is_not_finite_is_left_out():
    (wide, _) = parsed(
        lines([Series("a", [(1, math.nan), (2, 3), (math.inf, 1), (3, 1e300)], 1, [(0, 1)] * 4)], "t", X, Y)
    )
    assert len(list(wide.iter(f"{SVG}path"))) == 2  # one marker and its interval
    (empty, _) = parsed(lines([], "t", X, Y))
    assert "no values" in [element.text for element in empty.iter(f"{SVG}text")]


def test_a_file_needs_no_page():
    text = bars([Series("a", [(1, 2)])], "t", X, Y, file=True)
    assert text.startswith("<svg ")
    assert "var(" not in text
    assert ET.fromstring(text).get("width") == "720"


def test_many_points_are_drawn_without_a_marker_each():
    figure = steps([Series("a", [(at, at % 7) for at in range(5000)])], "t", Axis("layer", whole=True), Y)
    for picture in parsed(figure):
        assert 0 < len(list(picture.iter(f"{SVG}path"))) < 50
    assert len(figure) < 400_000


@pytest.mark.parametrize(("low", "high"), [*itertools.pairwise([-1e17, -3.2, 0, 1e-12, 1e-3, 7, 144, 1e17])])
def test_round_figures_reach_around_the_data(low, high):
    for whole in (False, True):
        marks = svg.ticks(low, high, 5, whole)
        assert marks[0] <= low + 1e-9 * (high - low)
        assert marks[-1] >= high - 1e-9 * (high - low)
        assert len(marks) <= 20
        assert not whole or all(mark == int(mark) for mark in marks)


def test_a_legend_alone_has_all_names():
    wide, _ = parsed(legend_of([Series("a", (), 0), Series("b", (), 1)]))
    assert [element.text for element in wide.iter(f"{SVG}text")] == ["a", "b"]
    assert charts.NARROW == 358
