"""Tokens are where they are said to be: a mark drawn into a picture lights up the cell that covers it.

End to end: the mark is drawn where a cell is said to lie, the picture goes through the family's processor and its
model's own encoder, and the token whose features change most must be that cell's. Attention in the tiny towers puts
out zeros here, and convolutions look at one place, so that each token shows its own pixels.
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fitprune.families.adapter import adapt
from fitprune.families.grids import token_grids
from fitprune.families.images import read_images, tokens_of
from fitprune.families.planes import planes_of
from helpers import families

# Some processors turn tensors to numpy as numpy 2 dislikes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS = {row.name: row for row in families.ROWS}
IMAGES = [name for name in ROWS if not name.startswith(("llava-", "llava_next-")) and not name.endswith("-video")]
SIZES = [(64, 64), (90, 60), (50, 120), (200, 77), (33, 31), (20, 16)]  # width, height
PUTS_OUT = ("out_proj", "proj", "o_proj", "projection_layer")  # of attention in a tower
CALLS = {"got_ocr2": {"nested": False, "num_image_tokens": 16, "crop_to_patches": True, "max_patches": 2}}
PAD = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEOS = {
    **dict.fromkeys(["llava_next_video", "llava_onevision-video", "video_llava", "internvl-video"], "<video>"),
    **dict.fromkeys(["qwen2_vl-video", "qwen2_5_vl-video", "qwen3_vl-video"], PAD),
    "glm4v-video": "<|begin_of_video|><|video|><|end_of_video|>",
}


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


STRETCHED = ["gemma3", "paligemma", "qwen2_vl", "glm4v", "mistral3"]  # the whole picture, whatever its shape


@seed(0)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(width=st.integers(2, 240), height=st.integers(2, 240), x=st.floats(0, 1), y=st.floats(0, 1))
@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("paligemma2", "qwen3_vl", "qwen3_vl_moe")])
def test_boxes_are_right_to_a_tenth_of_a_cell(name, width, height, x, y):
    """Where a mark lies in the pixels is where the box says; a picture that is stretched fills its box to the edges."""
    model, processor = parts(name)
    encode = functools.partial(encoded, name)
    plain, box = Image.new("RGB", (width, height), (90, 90, 90)), (0.8 * x, 0.8 * y, 0.8 * x + 0.2, 0.8 * y + 0.2)
    box = tuple(round(side * size) / size for side, size in zip(box, (width, height) * 2, strict=True))
    if box[0] == box[2] or box[1] == box[3] or max(width / height, height / width) > 50:
        return  # no pixel; and no processor takes such a strip
    inputs = encode(plain)
    images = token_grids(model, inputs, encode if name in ("got_ocr2", "mistral3") else processor, [plain])[0]
    before, after = (planes_of(adapt(model), some, "image") for some in (inputs, encode(marked(plain, box))))
    grids = [grid for grids in images for grid in grids]
    if len(grids) < len(before):
        return  # packed tiles of so thin a picture that none of their tokens is left
    for grid, one, other in zip(grids, before, after, strict=True):
        change = (other.pixels - one.pixels).sum(0).double()
        if grid.name == "high resolution":
            continue  # its box is a part of the plane; the marks of the other tests find it
        for axis, side in ((0, 1), (1, 0)):
            near, far = grid.box[side], grid.box[side + 2]
            tenth = 0.1 * abs(far - near) / grid.tokens.shape[axis]
            if name in STRETCHED:
                assert max(abs(near), abs(far - 1)) < tenth
            inside = near + 1e-3 < box[side] and box[side + 2] < far - 1e-3
            inside &= grid.box[1 - side] < box[1 - side] + 1e-3 and box[3 - side] < grid.box[3 - side] + 1e-3
            if inside and float(change.abs().sum()):
                along = change.sum(1 - axis)
                place = float((along * (torch.arange(len(along)) + 0.5)).sum() / along.sum() / len(along))
                assert abs(near + (far - near) * place - (box[side] + box[side + 2]) / 2) < tenth


def frame(number):
    return np.random.default_rng(number).integers(96, 160, (48, 64, 3), dtype=np.uint8)


def encoded_clip(name, frames):
    processor = parts(name)[1]
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


def grids_of(name, picture, encode=None):
    model, processor = parts(name)
    encode = encode or functools.partial(encoded, name)
    (images,) = token_grids(model, encode(picture), processor, [picture])
    return model, encode, images


@pytest.mark.parametrize("size", [(230, 60), (70, 200), (64, 64), (150, 140)])
@pytest.mark.parametrize("name", ["internvl", "aya_vision", "cohere2_vision", "idefics3", "smolvlm"])
def test_a_mark_lights_up_its_cell_in_many_tiles(name, size, monkeypatch):
    images = parts(name)[1].image_processor
    if hasattr(images, "max_patches"):
        monkeypatch.setattr(images, "max_patches", 6)
    else:
        monkeypatch.setattr(images, "size", type(images.size)(longest_edge=128))
    model, encode, own = grids_of(name, shades(size))
    assert [grid.name for grid in own[0]][-1] == "whole picture"
    assert len(own[0]) > 3 or size == (64, 64)
    check(model, encode, shades(size), own)


@pytest.mark.parametrize("size", [(230, 60), (70, 200), (64, 64), (150, 140), (300, 40), (9, 190)])
@pytest.mark.parametrize(("name", "most"), [("llava_next", 0), ("llava_onevision", 9), ("llava_onevision", 2)])
def test_a_mark_lights_up_its_cell_in_tiles_that_the_model_packs(name, most, size, monkeypatch):
    """Without the padding of the tiles, with a newline after each row, and pooled where they are too many."""
    model, processor = parts(name)
    sides = [[32 * rows, 32 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    monkeypatch.setattr(model.config, "image_grid_pinpoints", sides)
    monkeypatch.setattr(processor.image_processor, "image_grid_pinpoints", sides)
    if most:
        monkeypatch.setattr(model.config, "vision_aspect_ratio", f"anyres_max_{most}")
        monkeypatch.setattr(processor, "vision_aspect_ratio", f"anyres_max_{most}")
    model, encode, own = grids_of(name, shades(size))
    assert [grid.name for grid in own[0]] == ["whole picture", "high resolution"]
    check(model, encode, shades(size), own, samples=10)


@pytest.mark.parametrize("size", [(150, 60), (50, 120), (64, 60)])
def test_a_mark_lights_up_its_cell_in_pan_and_scan(size):
    """Gemma's crops are images of their own; the processor got arguments, so a function of a picture stands for it."""
    row, processor = ROWS["gemma3"], parts("gemma3")[1]
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}

    def encode(picture):
        return families.process(processor, [(f"see {row.image} what?", [picture], [])], **options)[0]

    (images,) = token_grids(parts("gemma3")[0], encode(shades(size)), encode, [shades(size)])
    names = [grid.name for grids in images for grid in grids]
    assert names == ["whole picture"] + [f"tile {n} of {len(names) - 1}" for n in range(1, len(names))]
    assert len(names) > 1 or size == (64, 60)
    check(parts("gemma3")[0], encode, shades(size), images)
    if len(names) > 1:
        with pytest.raises(ValueError, match=r"\d image parts, and the pictures make 1: .* a function of a picture"):
            token_grids(parts("gemma3")[0], encode(shades(size)), processor, [shades(size)])


def upright(picture):
    return ImageOps.exif_transpose(picture)


def from_camera(picture, orientation):
    """As a camera writes it that is held that way: `upright` gives the picture back."""
    for lying in [None, *Image.Transpose]:
        turned = picture.copy() if lying is None else picture.transpose(lying)
        turned.getexif()[ExifTags.Base.Orientation] = orientation
        if upright(turned).size == picture.size and np.array_equal(upright(turned), picture):
            return turned
    raise AssertionError(orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "internvl", "llava_hr"])
@pytest.mark.parametrize("turns", [False, True])
def test_a_phone_photo_is_mapped_as_viewers_show_it(name, orientation, turns):
    """Whether the picture is turned before the processor gets it, as chat templates do, or the model sees it lie."""
    model, processor = parts(name)
    photo = from_camera(shades((70, 110)), orientation)

    def encode(shown):
        photo = from_camera(shown, orientation)
        return encoded(name, upright(photo) if turns else photo)

    (images,) = token_grids(model, encode(shades((70, 110))), processor, [photo])
    check(model, encode, shades((70, 110)), images, samples=4)
    rows, columns = images[0][-1].tokens.shape
    assert rows > columns or name in ("llava", "internvl", "llava_hr")


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3",
                                  "gemma3", "cohere2_vision", "lfm2_vl", "mistral3"])  # fmt: skip
def test_a_batch_has_the_grids_of_each_sample_alone(name):
    model, processor = parts(name)
    own = [[shades((90, 60)), shades((33, 80), 1)], [shades((64, 50), 2)], [shades((40, 120), 3)]]
    processor = functools.partial(encoded, name) if name == "mistral3" else processor
    alone = [encoded(name, *pictures) for pictures in own]
    together = ROWS[name].collate(alone)
    pictures = [picture for some in own for picture in some]
    grids = token_grids(model, together, processor, pictures)
    assert [len(images) for images in grids] == [2, 1, 1]
    assert [grid.picture for images in grids for grids in images for grid in grids[:1]] == [0, 1, 2, 3]
    for images, inputs, mine in zip(grids, alone, own, strict=True):
        (expected,) = token_grids(model, inputs, processor, mine)
        for some, others in zip(images, expected, strict=True):
            for one, other in zip(some, others, strict=True):
                assert torch.equal(one.tokens, other.tokens)
                assert (one.box, one.name) == (other.box, other.name)
    unmeasured = token_grids(model, together)
    assert [[[(g.tokens.tolist(), g.name) for g in image] for image in images] for images in unmeasured] == [
        [[(g.tokens.tolist(), g.name.replace("part of the", "whole")) for g in image] for image in images]
        for images in grids
    ]
    assert {g.box for images in unmeasured for image in images for g in image} == {None}
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in alone[0].items()}
    ((first, *_), *_) = token_grids(model.to(torch.bfloat16), half, processor, own[0])
    model.float()
    assert first[-1].box == grids[0][0][-1].box


def test_images_that_are_encoded_already_are_not_encoded_again():
    model = ROWS["llava"].make_model()
    inputs = encoded("llava", shades((64, 50)))
    images = read_images(adapt(model), inputs)
    model.model.vision_tower = None
    (((grid,),),) = token_grids(model, {**inputs, "mm_encoder_outputs": images.changed["mm_encoder_outputs"]})
    assert grid.tokens.tolist() == torch.arange(16).view(4, 4).tolist()
    with pytest.raises(ValueError, match="the inputs have no pixels: pass what the processor returned"):
        token_grids(model, {"input_ids": inputs["input_ids"], **images.changed})


def test_other_pictures_are_refused():
    model, processor = parts("qwen2_vl")
    inputs = encoded("qwen2_vl", shades((64, 50)), shades((90, 60)))
    for pictures, fault in [
        ([shades((64, 50)), shades((50, 90))], r"pictures\[1\], 50 x 90: the processor makes other pixels of it"),
        ([shades((90, 60)), shades((64, 50))], r"pictures\[0\], 90 x 60: "),
        ([shades((64, 50), 7), shades((90, 60))], r"pictures\[0\], 64 x 50: "),
        ([shades((64, 50))], "2 image parts, and the pictures make 1: must be as many"),
        ([shades((64, 50)), shades((90, 60)), shades((90, 60))], r"pictures\[2\]"),
        (["photo.jpg"], r"pictures\[0\] is a str of <U9 and shape \[\]: must be a PIL image"),
        ([[]], r"pictures\[0\] is empty"),
    ]:
        with pytest.raises(ValueError, match=fault):
            token_grids(model, inputs, processor, pictures)
    model, processor = parts("llava")
    with pytest.raises(
        ValueError, match=r"pictures\[0\] is a list, .* LlavaProcessor takes no video: pass pictures one"
    ):
        token_grids(model, encoded("llava", shades((64, 50))), processor, [[shades((64, 50))]])


def test_tokens_without_rows_are_refused():
    """Of a resampler's queries none has a place."""
    model, _ = parts("llava")
    inputs = encoded("llava", shades((64, 50)))
    inputs["pixel_values"] = inputs["pixel_values"][..., :8].repeat(1, 1, 1, 4)[..., :24]
    features = torch.zeros(1, 11, 64)
    outputs = {"image": BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)}
    ids = torch.cat([inputs["input_ids"][:, :2], torch.full((1, 11), 4), inputs["input_ids"][:, -3:]], 1)
    with pytest.raises(ValueError, match="the places of 11 visual tokens of this llava are not known"):
        token_grids(model, {**inputs, "input_ids": ids, "mm_encoder_outputs": outputs})


def test_pixels_in_an_unknown_layout_are_refused():
    model, _ = parts("qwen2_vl")
    inputs = encoded("qwen2_vl", shades((64, 50)))
    with pytest.raises(ValueError, match=r"the places of pixels of this qwen2_vl are not known \(.*\): nothing can be"):
        token_grids(model, {**inputs, "pixel_values": list(inputs["pixel_values"])})

    def shuffled(picture):
        made = encoded("qwen2_vl", picture)
        return {**made, "pixel_values": made["pixel_values"].roll(5, 0)}

    with pytest.raises(ValueError, match="the places of a picture's pixels in the inputs are not known"):
        token_grids(model, shuffled(shades((64, 50))), shuffled, [shades((64, 50))])
