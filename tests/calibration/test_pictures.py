"""Pictures of every kind, by every way in, are what a viewer shows and what the model's own loader reads."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fitprune import load_samples
from fitprune.calibration.entry import BadSample
from fitprune.calibration.pictures import BadPicture, load_picture
from fitprune.calibration.samples import Sample
from helpers.picture_cases import CASES, COLOURS, DEEP, GREY, RGB, RGBA, SHARES, SIZE, file, on_white, require_shown


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All cases as files, as rows of JSONL in each way, and in the columns of datasets."""
    import datasets

    folder = tmp_path_factory.mktemp("pictures")
    datasets.disable_progress_bars()
    files = []
    for number, (data, _) in enumerate(CASES.values()):
        files.append(folder / f"{number}.picture")
        files[-1].write_bytes(data)
    bytes_of = [data for data, _ in CASES.values()]
    encoded = [base64.b64encode(data).decode() for data in bytes_of]
    ways = {
        "file": [path.name for path in files],
        "base64": encoded,
        "base64 in lines": [base64.encodebytes(data).decode() for data in bytes_of],
        "base64 for URLs": [base64.urlsafe_b64encode(data).decode().rstrip("=") for data in bytes_of],
        "data URL": [f"data:image/png;base64,{text}" for text in encoded],
        "dict of a path": [{"bytes": None, "path": path.name} for path in files],
        "list of one": [[path.name] for path in files],
    }
    for way, values in ways.items():
        lines = [json.dumps({"image": value, "text": "?"}) for value in values]
        (folder / f"{way}.jsonl").write_text("\n".join(lines))
    texts = ["?"] * len(files)
    kinds = {
        "column of files": ([str(path) for path in files], datasets.Image()),
        "column of images": ([{"bytes": data, "path": None} for data in bytes_of], datasets.Image()),
        "column, not decoded": ([{"bytes": data, "path": "x.png"} for data in bytes_of], datasets.Image(decode=False)),
        "column of bytes": (bytes_of, datasets.Value("binary")),
        "column of base64": (encoded, datasets.Value("string")),
        "column of lists": ([[{"bytes": data, "path": None}] for data in bytes_of], datasets.List(datasets.Image())),
    }
    for way, (values, feature) in kinds.items():
        features = datasets.Features({"image": feature, "text": datasets.Value("string")})
        made = datasets.Dataset.from_dict({"image": values, "text": texts}, features=features)
        made.save_to_disk(folder / way)
    read = {way: load_samples(folder / f"{way}.jsonl") for way in ways}
    return read | {way: load_samples(folder / way) for way in kinds}, files


def object_of(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


DIRECT = {
    "path": lambda path, data: path,
    "name": lambda path, data: str(path),
    "bytes": lambda path, data: data,
    "bytearray": lambda path, data: bytearray(data),
    "open file": lambda path, data: io.BytesIO(data),
    "image object": lambda path, data: Image.open(io.BytesIO(data)),
    "image object, loaded": lambda path, data: object_of(data),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_what_is_shown_by_every_way_in(saved, name):
    read, files = saved
    number = list(CASES).index(name)
    assert len(read) == 13
    for way, samples in read.items():
        require_shown(samples[number].load_image(), name), way
    for way, source in DIRECT.items():
        require_shown(load_picture(source(files[number], CASES[name][0])), name), way


@pytest.mark.parametrize("name", CASES)
def test_an_image_object_is_left_as_it_is_and_gives_the_same_twice(name):
    image = object_of(CASES[name][0])
    before = image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())
    first = load_picture(image)
    require_shown(load_picture(image), name)
    assert (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())) == before
    again = load_picture(first)  # what is turned, or on white, is not so twice
    assert again.tobytes() == first.tobytes()
    assert again is not first


def in_mode(mode):
    if mode == "La":
        return RGBA.convert("LA").convert("La")
    if mode.startswith("I;16"):
        return Image.frombytes(mode, SIZE, DEEP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    return (RGBA if mode in ("RGBa", "PA", "LA") else RGB).convert(mode)


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "PA", "RGBX", "HSV", "I;16", "I;16L", "I;16B", "I;16N"])
def test_modes_that_no_file_has_are_shown_by_the_same_rules(mode):
    found = np.asarray(load_picture(in_mode(mode))).astype(int)
    if mode.startswith("I;16"):
        assert (found == (DEEP >> 8)[..., None]).all()
    elif mode in ("RGBX", "HSV"):
        assert (found == np.asarray(in_mode(mode).convert("RGB"))).all()
    else:
        colours = np.repeat(np.asarray(RGBA.convert("LA"))[..., :1], 3, 2) if mode in ("La", "LA") else COLOURS
        alpha = np.asarray(RGBA)[..., 3]
        assert np.abs(found - on_white(colours, alpha)).max() <= (2 if mode in ("La", "RGBa") else 1) + 60 * (
            mode == "PA"  # its palette has fewer colours
        )
        assert (found[alpha == 0] == 255).all()


def test_a_palette_with_an_alpha_of_its_own_is_laid_on_white():
    image = Image.new("P", SIZE)
    image.putpalette([10, 20, 30, 0], "RGBA")
    assert load_picture(image).getcolors() == [(54, (255, 255, 255))]


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (COLOURS, COLOURS),
        (COLOURS[..., 0], COLOURS[..., 0]),
        (COLOURS[..., :1], COLOURS[..., 0]),
        (DEEP, (DEEP >> 8)),
        (DEEP > 30000, (DEEP > 30000) * 255),
        (COLOURS.astype(np.int64), COLOURS),
        (COLOURS / 255, COLOURS),
        (SHARES.astype(np.float16), np.rint(SHARES.astype(np.float16) * 255)),
        (np.dstack([COLOURS, COLOURS[..., :1] * 0]), COLOURS * 0 + 255),
        (COLOURS[:, ::-1], COLOURS[:, ::-1]),
        (SHARES * 1.05 - 1e-4, np.rint(np.clip(SHARES * 1.05 - 1e-4, 0, 1) * 255)),
        (np.full((8, 8), 1.0000001), np.full((8, 8), 255)),
        (np.full((8, 8), 258.5), np.full((8, 8), 255)),  # floats: as resizing leaves them
        (np.full((8, 8), 65_540.0), np.full((8, 8), 255)),
        (np.full((8, 8), 258), np.full((8, 8), 1)),
    ],
)
def test_arrays_are_pictures_too(array, values):
    values = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
    assert (np.asarray(load_picture(array)) == values).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), "is an array 3x8x8 of uint8, must be numbers"),
        (np.zeros((8, 8), complex), "of complex128"),
        (np.full((8, 8), np.nan), "has values from nan to nan"),
        (np.full((8, 8), np.inf), "has values from inf to inf"),
        (np.full((8, 8), -0.5), "has values from -0.5 to -0.5"),
        (np.linspace(-1, 1, 64).reshape(8, 8), "has values from -1 to 1"),
        (np.full((8, 8), 70_000.0), "has values from 70000 to"),
        (np.full((8, 8), 2**31), "has values from 2.14748e.09 to"),
        (Image.fromarray(np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)), "from -1000 to 3000, must be"),
        (Image.fromarray(np.linspace(-1000, 3000, 64).astype(np.int32).reshape(8, 8)), "from -1000 to 3000, must be"),
        (np.zeros((0, 8), np.float32), "too small|must be|cannot"),
        (None, "is of type NoneType, must be"),
        (7, "is of type int, must be"),
        ([RGB, RGB], "is 2 pictures, must be"),
        ({"path": None}, "is of type NoneType, must be"),
        (b"", "is not an image file"),
        (b"text", "is not an image file"),
        ("data:image/png;base64,@@@@", "is not sound base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "is not an image file"),
        ("QUJD" * 100, "does not exist, and as base64 it is not an image file"),
        ("train2017/" + "0" * 43, "does not exist, and is not sound base64"),
        (base64.b64encode(file(RGB, "PNG")).decode()[:-30], "cannot be decoded|is not sound base64"),
        ("none.png", "image none.png does not exist"),
        ("a" * 5000 + ".png", "cannot be read .File name too long."),
        ("a\0b.png", "cannot be read .embedded null"),
        ("half \ud800.png", r"image half \\ud800.png cannot be read"),
        ("/dev/null", "is a device or a pipe"),
        ("/dev/null/a.png", "does not exist"),
        ("/", "is a folder, must be an image file"),
        ("https://example.org/cat.jpg?" + "x" * 5000, r"https://example.org/cat.*is a URL, and nothing is downloaded"),
        ("s3://bucket/cat.jpg", "is a URL"),
        ("FILE:///cat.jpg", "is a URL"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_short_line(source, message):
    with pytest.raises(BadPicture, match=message) as caught:
        load_picture(source)
    assert len(str(caught.value)) < 280
    assert str(caught.value).isprintable()


def grey_png(bits, pixels, clear):
    """A PNG of one row of grey pixels of so few bits, one colour of which is clear."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = int("".join(f"{pixel:0{bits}b}" for pixel in pixels), 2).to_bytes(len(pixels) * bits // 8, "big")
    head = struct.pack(">IIBBBBB", len(pixels), 2, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress((b"\0" + row) * 2))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part(*each) for each in [*parts, (b"IEND", b"")])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_clear_colour_of_a_grey_png_of_few_bits_is_laid_on_white(bits):
    most = 2**bits - 1
    pixels = [0, most, 1, most - 1, most // 2, 0, most, 1]
    for clear in {0, 1, most // 2, most}:
        found = np.asarray(load_picture(grey_png(bits, pixels, clear)))
        assert found[0, :, 0].tolist() == [255 if pixel == clear else pixel * 255 // most for pixel in pixels]


@pytest.mark.parametrize("floats", [False, True])
def test_a_deep_tiff_whose_white_is_zero_is_no_negative(floats):
    values = SHARES if floats else DEEP
    data = file(Image.fromarray(values), "TIFF")
    tag = struct.pack("<HHIH", 262, 3, 1, 1)
    assert data.count(tag) == 1
    found = np.asarray(load_picture(data.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0))))
    assert (found == 255 - np.asarray(load_picture(data))).all()


def test_links_in_a_loop_and_a_closed_image_are_refused(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(BadPicture, match=r"cannot be read|does not exist"):
        load_picture(tmp_path / "a.png")
    (tmp_path / "c.png").write_bytes(file(RGB, "PNG"))
    with Image.open(tmp_path / "c.png") as image:
        pass
    with pytest.raises(BadPicture, match="cannot be decoded"):
        load_picture(image)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_an_image_whose_file_is_closed_after_it_was_decoded_is_read(tmp_path, kind):
    (tmp_path / "a").write_bytes(file(GREY, kind))
    with Image.open(tmp_path / "a") as image:
        image.load()
    assert load_picture(image).size == SIZE


def test_broken_exif_leaves_the_picture_as_it_lies():
    whole = file(RGB, "JPEG", 6)
    at = whole.index(b"Exif\0\0") + 6
    broken = whole[:at] + b"XX" + whole[at + 2 :]
    assert load_picture(whole).size == SIZE[::-1]
    assert load_picture(broken).size == SIZE


def test_a_tag_that_cannot_be_written_again_does_not_keep_a_picture_from_being_turned():
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x014A, 2, 1, 0x41)  # a place that is text
    image = Image.open(io.BytesIO(file(RGB, "JPEG")))
    image.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + b"\0\0\0\0"
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert load_picture(image).size == SIZE[::-1]


WAYS_TO_BE_BAD = {
    "a URL": "https://example.org/cat.jpg",
    "too long a name": "a." * 3000,
    "NUL in a name": "a\0.png",
    "a surrogate in a name": "\ud800.png",
    "a folder": ".",
    "broken base64": "iVBORw0KGgo" + "A" * 100,
    "a broken data URL": "data:image/png;base64,A",
    "a missing path": {"bytes": None, "path": "none.png"},
    "neither bytes nor path": {"bytes": None, "path": None},
    "a number": 3,
    "values without black and white": "deep.tif",
}


@pytest.mark.parametrize("kind", WAYS_TO_BE_BAD)
def test_every_bad_picture_is_named_with_its_line_and_skipped(tmp_path, kind, caplog):
    (tmp_path / "a.png").write_bytes(file(RGB, "PNG"))
    (tmp_path / "deep.tif").write_bytes(file(Image.fromarray(DEEP.astype(np.int32) - 5), "TIFF"))
    rows = [{"image": image, "text": "?"} for image in ("a.png", WAYS_TO_BE_BAD[kind])]
    data = tmp_path / "q.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadSample, match=r"q\.jsonl:2: ") as caught:
        [sample.load_image() for sample in load_samples(data)]
    assert len(str(caught.value)) < 400
    assert len(load_samples(data, skip_bad=True)) == 1
    assert "q.jsonl:2: " in caplog.text


def test_an_image_of_the_command_line_is_not_looked_for_in_an_image_folder(tmp_path):
    for path, message in [
        (tmp_path / "none.png", r"--image: image .*none\.png does not exist$"),
        (tmp_path, "--image: .* is a folder, must be an image file$"),
    ]:
        with pytest.raises(BadSample, match=message):
            Sample("0", "?", path, where="--image").load_image()
    with pytest.raises(BadSample, match=r"^image none\.png does not exist$"):
        Sample("0", "?", "none.png").load_image()
