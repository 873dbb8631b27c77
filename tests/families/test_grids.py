"""Tokens are where they are said to be: a mark drawn into a picture lights up the cell that covers it.

End to end: the mark is drawn where a cell is said to lie, the picture goes through the family's processor and its
model's own encoder, and the token whose features change most must be that cell's. The tiny towers' attention puts out
zeros, so that each token shows its own pixels.
"""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from fitprune.families.adapter import adapt
from fitprune.families.grids import token_grids
from fitprune.families.images import read_images
from helpers import families

ROWS = {row.name: row for row in families.ROWS}
IMAGES = [name for name, row in ROWS.items() if not name.startswith("llava-") and "video" not in name]
SIZES = [(64, 64), (90, 60), (50, 120), (200, 77), (33, 31), (20, 16)]  # width, height
MIXES = ("out_proj", "proj", "o_proj", "projection_layer")  # what attention in a tower puts out


@functools.cache
def parts(name):
    """A row's model, its tower without attention, and its processor as a function of one picture."""
    row = ROWS[name]
    model = row.make_model()
    with torch.no_grad():
        for path, module in model.named_modules():
            if "language_model" not in path and "attn" in path.lower() and path.rsplit(".", 1)[-1] in MIXES:
                for weight in module.parameters():
                    weight.zero_()
    return model, row.processor


def shades(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8))


def marked(picture, box):
    """A white and black mark over a box in fractions of the picture, of one pixel at least."""
    values, (height, width) = np.array(picture), (picture.height, picture.width)
    (left, right), (top, bottom) = (
        (min(round(a * n), n - 1), max(round(b * n), round(a * n) + 1))
        for a, b, n in ((box[0], box[2], width), (box[1], box[3], height))
    )
    values[max(top, 0) : bottom, max(left, 0) : right] = 255
    return Image.fromarray(values)


def cell_box(grid, row, column):
    """The middle of a cell: a mark there does not smear into its neighbours."""
    left, top, right, bottom = grid.box
    rows, columns = grid.tokens.shape
    across, down = (right - left) / columns, (bottom - top) / rows
    return left + (column + 0.2) * across, top + (row + 0.2) * down, left + (column + 0.8) * across, top + (row + 0.8) * down


def features(model, inputs):
    with torch.no_grad():
        return torch.cat(list(read_images(adapt(model), inputs).features))


def inputs_of(name, picture):
    row = ROWS[name]
    processor = row.processor() if row.processor else None
    return families.process(processor, [(f"see {row.image} what?", [picture], [])])[0]


def check(model, encode, picture, grids, samples=6, seed=0):
    """Draw marks at random cells that lie inside the picture, and see which token changes most."""
    plain = features(model, encode(picture))
    cells = [
        (grid, first, row, column)
        for first, own in grids for grid in own
        for row in range(grid.tokens.shape[0]) for column in range(grid.tokens.shape[1])
    ]  # fmt: skip
    inside = []
    for grid, first, row, column in cells:
        left, top, right, bottom = cell_box(grid, row, column)
        if left > -0.01 and top > -0.01 and right < 1.01 and bottom < 1.01:
            inside.append((grid, first, row, column))
    assert inside
    rng = np.random.default_rng(seed)
    for index in rng.choice(len(inside), min(samples, len(inside)), replace=False):
        grid, first, row, column = inside[index]
        change = (features(model, encode(marked(picture, cell_box(grid, row, column)))) - plain).norm(dim=-1)
        brightest = int(change[grid.tokens + first].argmax())
        assert divmod(brightest, grid.tokens.shape[1]) == (row, column), (grid.name, grid.box, grid.tokens.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IMAGES)
def test_a_mark_lights_up_its_cell(name, size):
    model, _ = parts(name)
    picture = shades(size)
    encode = functools.partial(inputs_of, name)
    ((*grids,),) = token_grids(model, encode(picture), encode, [picture])
    firsts = np.cumsum([0, *(max(int(grid.tokens.max()) for grid in own) + 1 for own in grids)])
    check(model, encode, picture, list(zip(firsts.tolist(), grids, strict=False)))
