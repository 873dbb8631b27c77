"""Picture files of every kind that people have, and what each shows.

A case gives a file's bytes; `expected` is `transformers.image_utils.load_image`, or the rule of
`fitprune.calibration.pictures` written down a second time, where that says another.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms
from transformers.image_utils import load_image

SIZE = (9, 6)
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RNG.choice(np.array([0, 255, 100], dtype=np.uint8), (6, 9))
DEEP = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
RGB, GREY = Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0])
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))


def file(image, kind, orientation=None, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(values):
    """A PNG of 16 bits whose value at the top left is transparent, which Pillow reads and does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, *colours = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if colours else 0, 0, 0, 0))
        + chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_of_12_bits(values):
    """A TIFF of 12-bit grey, two values in three bytes, as microscopes write it."""
    height, width = values.shape
    even, odd = np.moveaxis(np.pad(values >> 4, ((0, 0), (0, width % 2))).reshape(height, -1, 2), 2, 0)
    whole = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], 2).reshape(height, -1)
    data = whole[:, : -(-width * 3 // 2)].astype(np.uint8).tobytes()  # a row ends with a byte
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def lab():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(RGB, to_lab)


def of_clear_colour(image):
    """The image in RGB, with its colour at the top left, which a chunk names as transparent, in white."""
    values = np.asarray(image.convert("RGB")).copy()
    values[(np.asarray(image).reshape(6, 9, -1) == np.asarray(image).reshape(6, 9, -1)[0, 0]).all(-1)] = 255
    return values


def on_white(values, alpha):
    """Values of a colour over white, by hand; rounding may differ by one."""
    alpha = alpha[..., None] / 255
    return np.rint(values * alpha + 255 * (1 - alpha)).astype(np.uint8)


PALETTE = RGB.quantize(16)
TWO_LEVELS = GREY.convert("1", dither=Image.Dither.NONE)
EIGHTH = (DEEP >> 8).astype(np.uint8)
SHARES = np.linspace(0, 1, 54, dtype=np.float32).reshape(6, 9)
LA = Image.merge("LA", (GREY, Image.fromarray(ALPHA)))
SHOWN_ON_WHITE = on_white(COLOURS, ALPHA)

# Name -> (the file, what is shown: an array, or None for what `load_image` gives).
CASES = {
    "jpeg": (file(RGB, "JPEG", quality=95), None),
    **{f"jpeg turned {n}": (file(RGB, "JPEG", n, quality=95), None) for n in range(2, 9)},
    "png turned": (file(RGB, "PNG", 6), None),
    "webp turned": (file(RGB, "WEBP", 8, lossless=True), None),
    "tiff turned": (file(RGB, "TIFF", 6), None),
    "transparent and turned": (file(RGBA, "PNG", 6), np.rot90(SHOWN_ON_WHITE, -1)),
    "grey": (file(GREY, "PNG"), None),
    "one bit": (file(TWO_LEVELS, "PNG"), None),
    "one bit, one clear": (file(TWO_LEVELS, "PNG", transparency=0), np.full((6, 9, 3), 255, np.uint8)),
    "palette": (file(PALETTE, "PNG"), None),
    "palette, one clear": (
        file(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))),
        of_clear_colour(PALETTE),
    ),
    "gif, one clear": (file(PALETTE, "GIF", transparency=PALETTE.getpixel((0, 0))), of_clear_colour(PALETTE)),
    "palette with shares": (
        file(PALETTE, "PNG", transparency=bytes([100] * 256)),
        on_white(np.asarray(PALETTE.convert("RGB")), np.full((6, 9), 100)),
    ),
    "grey, one clear": (file(GREY, "PNG", transparency=GREY.getpixel((0, 0))), of_clear_colour(GREY)),
    "colour, one clear": (file(RGB, "PNG", transparency=RGB.getpixel((0, 0))), of_clear_colour(RGB)),
    "alpha": (file(RGBA, "PNG"), SHOWN_ON_WHITE),
    "alpha, webp": (file(RGBA, "WEBP", lossless=True, exact=True), SHOWN_ON_WHITE),
    "grey alpha": (file(LA, "PNG"), on_white(np.repeat(COLOURS[..., :1], 3, 2), ALPHA)),
    "16 bits": (file(Image.fromarray(DEEP), "PNG"), EIGHTH),
    "16 bits, one clear": (png_of_16_bits(DEEP), np.where(DEEP[0, 0] == DEEP, 255, EIGHTH)),
    "colours of 16 bits, one clear": (png_of_16_bits(COLOURS.astype(np.uint16) * 257), of_clear_colour(RGB)),
    "16 bits, tiff": (file(Image.fromarray(DEEP), "TIFF"), EIGHTH),
    "16 bits, big-endian": (file(Image.frombytes("I;16B", SIZE, DEEP.astype(">u2").tobytes()), "TIFF"), EIGHTH),
    "16 bits, turned": (file(Image.fromarray(DEEP), "TIFF", 3), EIGHTH[::-1, ::-1]),
    "12 bits": (tiff_of_12_bits(DEEP), EIGHTH),
    "16 bits, pgm": (file(Image.fromarray(DEEP.astype(np.int32)), "PPM"), EIGHTH),
    "integers to 60,000": (
        file(Image.fromarray((DEEP // 65535 * 60000 + DEEP // 2).astype(np.int32)), "TIFF"),
        ((DEEP // 65535 * 60000 + DEEP // 2).clip(0, 65535) // 256).astype(np.uint8),
    ),
    "integers to 255": (file(Image.fromarray(COLOURS[..., 0].astype(np.int32)), "TIFF"), COLOURS[..., 0]),
    "floats to 1": (file(Image.fromarray(SHARES), "TIFF"), np.rint(SHARES * 255).astype(np.uint8)),
    "floats to 255": (file(Image.fromarray(SHARES * 200), "TIFF"), np.rint(SHARES * 200).astype(np.uint8)),
    "floats to 65,535": (file(Image.fromarray(SHARES * 60000), "TIFF"), (SHARES * 60000 // 256).astype(np.uint8)),
    "cmyk": (file(RGB.convert("CMYK"), "TIFF"), None),
    "cmyk of Adobe": (file(RGB.convert("CMYK"), "JPEG"), None),
    "YCbCr": (file(RGB.convert("YCbCr"), "TIFF"), None),
    "lab": (file(lab(), "TIFF"), None),
    "bmp": (file(RGB, "BMP"), None),
    "two views of a phone": (file(RGB, "MPO", save_all=True, append_images=[GREY.convert("RGB")]), None),
}


def expected(name):
    """What the case shows, as an array [height, width, 3], and by how much rounding may differ."""
    data, values = CASES[name]
    if values is None:
        return np.asarray(load_image(Image.open(io.BytesIO(data)))), 0
    rounded = 1 if "alpha" in name or "shares" in name or "transparent" in name else 0
    return (values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)), rounded


def require_shown(image, name):
    """Fail unless the image is what the case shows."""
    values, rounded = expected(name)
    assert image.mode == "RGB"
    assert image.size == values.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - values).max() <= rounded
