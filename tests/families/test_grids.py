"""Tokens are where they are said to be: a mark drawn into a picture lights up the cell that covers it.

End to end: the mark is drawn where a cell is said to lie, the picture goes through the family's processor and its
model's own encoder, and the token whose features change most must be that cell's. Attention in the tiny towers puts
out zeros here, and convolutions look at one place, so that each token shows its own pixels.
"""

import functools

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import ExifTags, Image

from fitprune.families.adapter import adapt
from fitprune.families.grids import token_grids
from fitprune.families.images import read_images, tokens_of
from helpers import families

# Some processors turn tensors to numpy as numpy 2 dislikes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS = {row.name: row for row in families.ROWS}
IMAGES = [name for name in ROWS if not name.startswith("llava-") and not name.endswith("-video")]
SIZES = [(64, 64), (90, 60), (50, 120), (200, 77), (33, 31), (20, 16)]  # width, height
PUTS_OUT = ("out_proj", "proj", "o_proj", "projection_layer")  # of attention in a tower
CALLS = {"got_ocr2": {"nested": False, "num_image_tokens": 16, "crop_to_patches": True, "max_patches": 2}}
PAD = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEOS = {
    **dict.fromkeys(["llava_next_video", "llava_onevision-video", "video_llava", "internvl-video"], "<video>"),
    **dict.fromkeys(["qwen2_vl-video", "qwen2_5_vl-video", "qwen3_vl-video"], PAD),
    "glm4v-video": "<|begin_of_video|><|video|><|end_of_video|>",
}


def set_on(whole, **changes):
    """Change attributes, named with two underscores for a dot, and give the whole back."""
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, whole), last, value)
    return whole


@functools.cache
def parts(name):
    """A row's model, whose tower sees each place for itself, and its processor."""
    model = ROWS[name].make_model()
    with torch.no_grad():
        for path, module in model.named_modules():
            if "language_model" in path:
                continue
            if "attn" in path.lower() and path.rsplit(".", 1)[-1] in PUTS_OUT:
                for weight in module.parameters():
                    weight.zero_()
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size > module.stride:
                middle = module.weight[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2].clone()
                module.weight.zero_()[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = middle
    if name == "mistral3":
        tokens = families.tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], {})
        return model, families.mistral3_processor(tokens)
    return model, ROWS[name].processor()


def shades(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8))


def marked(picture, box):
    """A white mark over a box in fractions of the picture, of one pixel at least."""
    values = np.array(picture)
    slices = []
    for first, last, size in ((box[1], box[3], picture.height), (box[0], box[2], picture.width)):
        start = min(max(round(first * size), 0), size - 1)
        slices.append(slice(start, max(round(last * size), start + 1)))
    values[tuple(slices)] = 255
    return Image.fromarray(values)


def part_of_cell(grid, row, column, first=0.2, last=0.8):
    """The middle of a cell: a mark there does not smear into its neighbours."""
    left, top, right, bottom = grid.box
    across, down = (right - left) / grid.tokens.shape[1], (bottom - top) / grid.tokens.shape[0]
    start, end = (left + (column + first) * across, top + (row + first) * down), (last - first)
    return (*start, start[0] + end * across, start[1] + end * down)


def features(model, inputs):
    """The features of all visual tokens, and where those of each image begin."""
    with torch.no_grad():
        images = read_images(adapt(model), inputs)
    (counts,) = tokens_of(images.image)
    return torch.cat(list(images.features)), np.cumsum([0, *counts]).tolist()


def encoded(name, *pictures):
    row, processor = ROWS[name], parts(name)[1]
    text = "see " + " and ".join([row.image] * len(pictures)) + " what?"
    return families.process(processor, [(text, list(pictures), [])], **CALLS.get(name, {}))[0]


def check(model, encode, picture, images, *, samples=6, part=(0.2, 0.8)):
    """Draw marks at random cells whose middle is in the picture, and see which token of the grid changes most."""
    plain, begins = features(model, encode(picture))
    cells = []
    for begin, grids in zip(begins, images, strict=False):
        for grid in grids:
            for row, column in np.ndindex(*grid.tokens.shape):
                left, top, right, bottom = part_of_cell(grid, row, column, *part)
                if 0 < left + right < 2 and 0 < top + bottom < 2:
                    cells.append((grid, begin, row, column))
    assert cells
    for index in np.random.default_rng(0).choice(len(cells), min(samples, len(cells)), replace=False):
        grid, begin, row, column = cells[index]
        change = features(model, encode(marked(picture, part_of_cell(grid, row, column, *part))))[0] - plain
        brightest = int(change.norm(dim=-1)[grid.tokens + begin].argmax())
        assert divmod(brightest, grid.tokens.shape[1]) == (row, column), (grid.name, grid.box, grid.tokens.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IMAGES)
def test_a_mark_lights_up_its_cell(name, size):
    model, processor = parts(name)
    picture, encode = shades(size), functools.partial(encoded, name)
    processor = encode if name in ("got_ocr2", "mistral3") else processor
    (images,) = token_grids(model, encode(picture), processor, [picture])
    # A token of this ResNet looks at its cell's first corner.
    check(model, encode, picture, images, part=(0, 0.7) if name == "fast_vlm" else (0.2, 0.8))


def frame(number):
    return np.random.default_rng(number).integers(96, 160, (48, 64, 3), dtype=np.uint8)


def encoded_clip(name, frames):
    row, processor = ROWS[name], parts(name)[1]
    text = f"see {VIDEOS[name]} what?"
    return families.process(processor, [(text, [], [np.stack([np.asarray(frame) for frame in frames])])])[0]


@pytest.mark.parametrize("name", VIDEOS)
def test_a_mark_in_a_frame_lights_up_its_cell(name):
    model, processor = parts(name)
    frames = [Image.fromarray(frame(number)) for number in range(4)]
    inputs = encoded_clip(name, frames)
    (images,) = token_grids(model, inputs, processor, [frames])
    assert [grid.name for grids in images for grid in grids] == [f"frame {n}" for n in range(1, len(images) + 1)]
    together = 4 // len(images)  # frames of one image
    plain, begins = features(model, inputs)
    for number, (grid,) in enumerate(images):
        rows, columns = grid.tokens.shape
        row, column = number % rows, (2 * number + 1) % columns
        changed = list(frames)
        for other in range(number * together, (number + 1) * together):
            changed[other] = marked(frames[other], part_of_cell(grid, row, column))
        change = (features(model, encoded_clip(name, changed))[0] - plain).norm(dim=-1)
        assert int(change.argmax()) == int(grid.tokens[row, column]) + begins[number]
