"""Words in pictures, and sheets that hold them."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from fitprune import Grid, KeptImage
from fitprune.pictures import sheets
from fitprune.pictures.example import Example
from fitprune.pictures.words import BOX, drawable, font, lacks, width_of, wrapped


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("What\u2019s this \u2014 a 6\u2026", "What\u2019s this - a 6..."),
        ("¿Qué \t es?", "?Que es?"),
        ("九 is 9 \U0001f642", f"{BOX} is 9 {BOX}"),
        ("ما هذا؟", f"{BOX * 2} {BOX * 4}"),
        ("a\x00b\u200d", "a b"),
    ],
)
def test_no_text_is_left_out_for_a_letter(text, drawn):
    assert drawable(text) == drawn
    assert lacks(text) == (BOX in drawn or "é" in text or "\u200d" in text)


@pytest.mark.parametrize("measure", [font(20).getlength, functools.partial(width_of, size=20)])
@pytest.mark.parametrize("text", ["word " * 400, "W" * 2000, "a " + "什" * 300, f"see {'x' * 90} and go"])
def test_lines_fit_and_a_text_that_is_cut_says_so(measure, text):
    lines = wrapped(text.strip(), 300, measure, 6)
    assert max(map(measure, lines)) <= 300
    assert len(lines) <= 6
    whole = "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert whole != lines[-1].endswith("...")


def example_of(size, tokens=144, **texts):
    grid = Grid(torch.arange(tokens).view(1, -1), (0.0, 0.0, 1.0, 1.0), "whole picture")
    kept = KeptImage((grid,), torch.arange(tokens) % 4 + 1, 4)
    return Example(Image.new("RGB", size, "grey"), kept, **texts)


def test_captions_of_tall_pictures_stand_apart():
    strip = np.asarray(sheets.strip(example_of((100, 800), 1152)).convert("L"))
    row = strip[16 + 400 + 4 : 16 + 400 + 44]
    dark = np.flatnonzero((row < 128).any(0))
    assert np.diff(dark).max() >= 16  # between the two


def test_a_long_word_stays_on_the_sheet():
    for draw in (sheets.strip, functools.partial(sheets.frame, layer=0)):
        drawn = np.asarray(draw(example_of((100, 100), question="x" * 300, answers={"dense": "y" * 300})).convert("L"))
        assert (drawn[:, -12:] > 200).all()
