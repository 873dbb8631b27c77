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


def draw_glyph(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale, turn and shear one 8 x 8 scan into an ink mask [GLYPH, GLYPH] between 0 and 1."""
    side = rng.uniform(20, 27)
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    stretch = rng.uniform(0.9, 1.1)
    zoom = 8 / side
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.array([[cos * stretch, (sin + shear * zoom)], [-sin, cos / stretch]])
    offset = np.array([4.0, 4.0]) - matrix @ np.array([GLYPH / 2, GLYPH / 2])
    image = Image.fromarray((scan * 255).astype(np.uint8))
    affine = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    drawn = image.transform((GLYPH, GLYPH), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32) / 255 * 1.25, 0, 1)


class GlyphBank:
    """Ink masks drawn beforehand, so that composing a scene is only pasting."""

    def __init__(self, scans: dict[int, np.ndarray], *, variants: int, rng: np.random.Generator) -> None:
        self.masks = {
            digit: np.stack([draw_glyph(scan, rng) for scan in of_digit for _ in range(variants)])
            for digit, of_digit in scans.items()
        }

    def draw(self, digit: int, rng: np.random.Generator) -> np.ndarray:
        """Pick one ink mask [GLYPH, GLYPH] of `digit`."""
        masks = self.masks[digit]
        return masks[rng.integers(len(masks))]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One composed image and what stands where.

    Attributes:
        pixels: [SIZE, SIZE, 3] uint8.
        digits: [GRID, GRID] digit in each cell, -1 where empty.
        colours: [GRID, GRID] index into COLOUR_NAMES, -1 where empty.
        ink: [SIZE, SIZE] index of the cell (row * GRID + column) whose digit covers the pixel, -1 elsewhere.
    """

    pixels: np.ndarray
    digits: np.ndarray
    colours: np.ndarray
    ink: np.ndarray


def compose(bank: GlyphBank, rng: np.random.Generator, *, fewest: int = 3, most: int = 6) -> Scene:
    """Draw `fewest` to `most` digits, all different and of different colours, into cells of the grid."""
    count = int(rng.integers(fewest, most + 1))
    cells = rng.permutation(GRID * GRID)[:count]
    chosen = rng.permutation(10)[:count]
    hues = rng.permutation(len(COLOURS))[:count]

    base = rng.uniform(10, 60, 3) + rng.uniform(-12, 12)
    slope = rng.uniform(-0.25, 0.25, 2)
    ramp = slope[0] * np.arange(SIZE)[:, None] + slope[1] * np.arange(SIZE)[None]
    pixels = (base + ramp[..., None]).astype(np.float32)
    digits = np.full((GRID, GRID), -1)
    colours = np.full((GRID, GRID), -1)
    ink = np.full((SIZE, SIZE), -1)
    for cell, digit, hue in zip(cells, chosen, hues, strict=True):
        row, column = divmod(int(cell), GRID)
        top = row * CELL + int(rng.integers(0, CELL - GLYPH + 1))
        left = column * CELL + int(rng.integers(0, CELL - GLYPH + 1))
        mask = bank.draw(int(digit), rng)
        window = (slice(top, top + GLYPH), slice(left, left + GLYPH))
        shade = np.clip(_RGB[hue] * rng.uniform(0.85, 1.0) + rng.uniform(-8, 8, 3), 0, 255)
        pixels[window] += (shade - pixels[window]) * mask[..., None]
        ink[window][mask > 0.3] = cell
        digits[row, column], colours[row, column] = digit, hue
    pixels += rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE, 1))
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), digits, colours, ink)


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


def patch_labels(scene: Scene, patch: int) -> dict[str, np.ndarray]:
    """Label each patch with the digit that covers most of it, for the vision tower's pretraining.

    Returns:
        Arrays [(SIZE / patch) ** 2]: "digit" and "colour" (-1 where no ink), "left" (digit in the cell to the
        left, 10 for none, -1 where no ink) and "cell" (the grid cell of the patch's ink, -1 where none).
    """
    side = SIZE // patch
    blocks = scene.ink.reshape(side, patch, side, patch).transpose(0, 2, 1, 3).reshape(side * side, patch * patch)
    votes = np.stack([(blocks == cell).sum(1) for cell in range(GRID * GRID)], 1)
    cell = np.where(votes.max(1) >= 3, votes.argmax(1), -1)
    none = cell < 0
    shifted = np.concatenate([np.full((GRID, 1), -1), scene.digits[:, :-1]], 1).reshape(-1)
    left = np.where(shifted < 0, 10, shifted)

    def at(values: np.ndarray) -> np.ndarray:
        return np.where(none, -1, values.reshape(-1)[cell])

    return {"digit": at(scene.digits), "colour": at(scene.colours), "left": at(left), "cell": cell}
