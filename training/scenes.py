"""Compose digit scenes: images of real handwritten digits and questions about them.

Knows the UCI scans (scikit-learn's `load_digits`), how a scene is drawn and what may be asked of it.
Knows no model. Every random choice comes from the generator that the caller passes in.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 96  # pixels per side
GRID = 3  # cells per side
CELL = SIZE // GRID
GLYPH = 28  # side of a drawn digit's box, pixels
FINE_GRID = 6  # cells per side where digits are small
FINE_GLYPH = 16
COLOURS = {
    "red": (230, 40, 40),
    "orange": (255, 145, 20),
    "yellow": (245, 235, 60),
    "green": (40, 190, 60),
    "cyan": (60, 220, 230),
    "blue": (60, 90, 245),
    "purple": (175, 60, 220),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)
ROWS = ("top", "middle", "bottom")
KINDS = ("digit_of_colour", "colour_of_digit", "count", "exists", "smallest", "largest", "left_of", "read_row")
# Two thirds of the training questions bind a colour to a digit: with an even mix a small model learns only to count.
TRAINING_SHARES = (0.32, 0.26, 0.05, 0.07, 0.05, 0.05, 0.09, 0.11)
# What pruning is known to break: reading in order, counting, small objects, grounding.
DETAIL_KINDS = ("read_number", "count", "count_colour", "small_digit", "small_colour", "where")
# One mix for each round of training: where things stand and what is written come last.
DETAIL_SHARES = ((0.22, 0.08, 0.12, 0.24, 0.14, 0.20), (0.34, 0.04, 0.08, 0.12, 0.08, 0.34))


def split_scans(seed: int = 0) -> dict[str, dict[int, np.ndarray]]:
    """Split the 1,797 scans into disjoint sets, each digit in the same proportion.

    Returns:
        For "train", "calibration" and "test": digit -> scans [count, 8, 8], ink between 0 and 1.
    """
    data = load_digits()
    rng = np.random.default_rng(seed)
    split: dict[str, dict[int, np.ndarray]] = {"train": {}, "calibration": {}, "test": {}}
    for digit in range(10):
        index = rng.permutation(np.flatnonzero(data.target == digit))
        scans = (data.images[index] / 16).astype(np.float32)
        split["calibration"][digit] = scans[:12]
        split["test"][digit] = scans[12:52]
        split["train"][digit] = scans[52:]
    return split


def draw_glyph(
    scan: np.ndarray, rng: np.random.Generator, box: int = GLYPH, sides: tuple[float, float] = (20, 27)
) -> np.ndarray:
    """Scale, turn and shear one 8 x 8 scan into an ink mask [box, box] between 0 and 1, the digit within `sides`."""
    side = rng.uniform(*sides)
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    stretch = rng.uniform(0.9, 1.1)
    zoom = 8 / side
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.array([[cos * stretch, (sin + shear * zoom)], [-sin, cos / stretch]])
    offset = np.array([4.0, 4.0]) - matrix @ np.array([box / 2, box / 2])
    image = Image.fromarray((scan * 255).astype(np.uint8))
    affine = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    drawn = image.transform((box, box), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32) / 255 * 1.25, 0, 1)


class GlyphBank:
    """Ink masks drawn beforehand, so that composing a scene is only pasting."""

    def __init__(
        self, scans: dict[int, np.ndarray], *, variants: int, rng: np.random.Generator, small: bool = False
    ) -> None:
        shape = (FINE_GLYPH, (11.0, 15.0)) if small else (GLYPH, (20.0, 27.0))
        self.masks = {
            digit: np.stack([draw_glyph(scan, rng, *shape) for scan in of_digit for _ in range(variants)])
            for digit, of_digit in scans.items()
        }

    def draw(self, digit: int, rng: np.random.Generator) -> np.ndarray:
        """Pick one ink mask of `digit`."""
        masks = self.masks[digit]
        return masks[rng.integers(len(masks))]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One composed image and what stands where.

    Attributes:
        pixels: [SIZE, SIZE, 3] uint8.
        digits: [grid, grid] digit in each cell, -1 where empty; grid is GRID or FINE_GRID.
        colours: [grid, grid] index into COLOUR_NAMES, -1 where empty.
        ink: [SIZE, SIZE] index of the cell (row * grid + column) whose digit covers the pixel, -1 elsewhere.
        number: where the number is written, (row, first column, digits); None in a scene without one.
    """

    pixels: np.ndarray
    digits: np.ndarray
    colours: np.ndarray
    ink: np.ndarray
    number: tuple[int, int, int] | None = None


def compose(bank: GlyphBank, rng: np.random.Generator, *, fewest: int = 3, most: int = 6) -> Scene:
    """Draw `fewest` to `most` digits, all different and of different colours, into cells of the grid."""
    count = int(rng.integers(fewest, most + 1))
    cells = rng.permutation(GRID * GRID)[:count]
    chosen = rng.permutation(10)[:count]
    hues = rng.permutation(len(COLOURS))[:count]

    digits = np.full((GRID, GRID), -1)
    colours = np.full((GRID, GRID), -1)
    digits.flat[cells], colours.flat[cells] = chosen, hues
    return _draw(bank, rng, digits, colours, cells)


def compose_details(bank: GlyphBank, rng: np.random.Generator) -> Scene:
    """Draw a number of two to four small digits of one colour, and two to four lone small digits, each of its own.

    The lone digits are all different and none is in the number; no digit stands beside the number.
    """
    length, lone = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    row, first = int(rng.integers(FINE_GRID)), int(rng.integers(FINE_GRID - length + 1))
    order, hues = rng.permutation(10), rng.permutation(len(COLOURS))
    digits = np.full((FINE_GRID, FINE_GRID), -1)
    colours = np.full((FINE_GRID, FINE_GRID), -1)
    digits[row, first : first + length] = rng.choice(order[lone:], length)
    colours[row, first : first + length] = hues[lone]
    free = digits < 0
    free[row, max(first - 1, 0) : first + length + 1] = False
    cells = rng.permutation(np.flatnonzero(free))[:lone]
    digits.flat[cells], colours.flat[cells] = order[:lone], hues[:lone]
    scene = _draw(bank, rng, digits, colours, np.flatnonzero(digits >= 0))
    return dataclasses.replace(scene, number=(row, first, length))


def _draw(
    bank: GlyphBank, rng: np.random.Generator, digits: np.ndarray, colours: np.ndarray, cells: np.ndarray
) -> Scene:
    """Paint the digits of these cells, in this order, on a shaded, noisy ground."""
    grid = len(digits)
    side, glyph = SIZE // grid, len(bank.masks[0][0])
    base = rng.uniform(10, 60, 3) + rng.uniform(-12, 12)
    slope = rng.uniform(-0.25, 0.25, 2)
    ramp = slope[0] * np.arange(SIZE)[:, None] + slope[1] * np.arange(SIZE)[None]
    pixels = (base + ramp[..., None]).astype(np.float32)
    ink = np.full((SIZE, SIZE), -1)
    for cell in cells:
        row, column = divmod(int(cell), grid)
        top = row * side + int(rng.integers(0, side - glyph + 1))
        left = column * side + int(rng.integers(0, side - glyph + 1))
        mask = bank.draw(int(digits[row, column]), rng)
        window = (slice(top, top + glyph), slice(left, left + glyph))
        shade = np.clip(_RGB[colours[row, column]] * rng.uniform(0.85, 1.0) + rng.uniform(-8, 8, 3), 0, 255)
        pixels[window] += (shade - pixels[window]) * mask[..., None]
        ink[window][mask > 0.3] = cell
    pixels += rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE, 1))
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), digits, colours, ink)


def ask_detail(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Make one question of a detail kind with its answer.

    Raises:
        ValueError: `kind` is not one of DETAIL_KINDS.
    """
    assert scene.number is not None
    row, first, length = scene.number
    written = np.zeros_like(scene.digits, dtype=bool)
    written[row, first : first + length] = True
    rows, columns = np.nonzero((scene.digits >= 0) & ~written)
    pick = int(rng.integers(len(rows)))
    at = (int(rows[pick]), int(columns[pick]))
    digit, colour = int(scene.digits[at]), COLOUR_NAMES[scene.colours[at]]

    def say(*phrasings: str) -> str:
        return phrasings[int(rng.integers(len(phrasings)))]

    if kind == "read_number":
        answer = " ".join(str(d) for d in scene.digits[row, first : first + length])
        return say("Read the number.", "What is the number?"), answer
    if kind == "count":
        return say("How many digits are there?", "What is the number of digits?"), str((scene.digits >= 0).sum())
    if kind == "count_colour":  # the number's colour, a lone digit's, or one that is not there
        hue = int(rng.choice([scene.colours[row, first], scene.colours[at], *rng.integers(0, len(COLOURS), 1)]))
        counted = int((scene.colours == hue).sum())
        return say(f"How many {COLOUR_NAMES[hue]} digits are there?", f"How many are {COLOUR_NAMES[hue]}?"), str(
            counted
        )
    if kind == "small_digit":
        return say(f"Which digit is {colour}?", f"What is the {colour} digit?"), str(digit)
    if kind == "small_colour":
        return say(f"What colour is the {digit}?", f"Which colour does the {digit} have?"), colour
    if kind == "where":
        cell = " ".join(str(index * GRID // FINE_GRID + 1) for index in at)  # row and column, from 1
        return say(f"Where is the {digit}?", f"Where does the {digit} appear?"), cell
    raise ValueError(f"kind={kind!r}: must be one of {DETAIL_KINDS}")


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Make one question of `kind` with its answer.

    Raises:
        ValueError: `kind` is not one of KINDS.
    """
    rows, columns = np.nonzero(scene.digits >= 0)
    pick = int(rng.integers(len(rows)))
    row, column = int(rows[pick]), int(columns[pick])
    digit, colour = int(scene.digits[row, column]), COLOUR_NAMES[scene.colours[row, column]]
    present = scene.digits[scene.digits >= 0]

    def say(*phrasings: str) -> str:
        return phrasings[int(rng.integers(len(phrasings)))]

    if kind == "digit_of_colour":
        return say(f"Which digit is {colour}?", f"What is the {colour} digit?"), str(digit)
    if kind == "colour_of_digit":
        return say(f"What colour is the {digit}?", f"Which colour does the {digit} have?"), colour
    if kind == "count":
        return say("How many digits are there?", "What is the number of digits?"), str(len(present))
    if kind == "exists":
        asked = int(rng.permutation(np.setdiff1d(np.arange(10), present))[0]) if rng.random() < 0.5 else digit
        return say(f"Is there a {asked}?", f"Does a {asked} appear?"), "yes" if asked in present else "no"
    if kind == "smallest":
        return say("Which digit is the smallest?", "What is the smallest digit?"), str(present.min())
    if kind == "largest":
        return say("Which digit is the largest?", "What is the largest digit?"), str(present.max())
    if kind == "left_of":
        to_left = scene.digits[row, column - 1] if column else -1
        answer = str(to_left) if to_left >= 0 else "nothing"
        return say(f"What stands left of the {digit}?", f"Which digit is left of the {digit}?"), answer
    if kind == "read_row":
        in_row = [str(d) for d in scene.digits[row] if d >= 0]
        return say(f"Read the {ROWS[row]} row.", f"Which digits are in the {ROWS[row]} row?"), " ".join(in_row)
    raise ValueError(f"kind={kind!r}: must be one of {KINDS}")


def patch_labels(scene: Scene, patch: int, size: int = SIZE) -> dict[str, np.ndarray]:
    """Label each patch with the digit that covers most of it, for the vision tower's pretraining.

    Args:
        scene: the scene.
        patch: side of a patch, pixels.
        size: side of the image that the model sees, pixels; the scene is scaled to it.

    Returns:
        Arrays [(size / patch) ** 2]: "digit" and "colour" (-1 where no ink), "left" (digit in the cell to the
        left, 10 for none, -1 where no ink) and "cell" (which of GRID x GRID the patch's ink is in, -1 where none).
    """
    side, grid = size // patch, len(scene.digits)
    nearest = np.arange(size) * SIZE // size
    ink = scene.ink[nearest[:, None], nearest[None]]
    blocks = ink.reshape(side, patch, side, patch).transpose(0, 2, 1, 3).reshape(side * side, patch * patch)
    votes = np.stack([(blocks == cell).sum(1) for cell in range(grid * grid)], 1)
    cell = np.where(votes.max(1) >= 3, votes.argmax(1), -1)
    none = cell < 0
    shifted = np.concatenate([np.full((grid, 1), -1), scene.digits[:, :-1]], 1).reshape(-1)
    left = np.where(shifted < 0, 10, shifted)

    def at(values: np.ndarray) -> np.ndarray:
        return np.where(none, -1, values.reshape(-1)[cell])

    place = np.arange(grid) * GRID // grid
    cells = at(place[:, None] * GRID + place[None])
    return {"digit": at(scene.digits), "colour": at(scene.colours), "left": at(left), "cell": cells}
