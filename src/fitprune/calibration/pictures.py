"""Load pictures of any kind as a viewer shows them, in RGB. Knows no data formats and no models.

The rules, where they differ from `transformers.image_utils.load_image`:

* The orientation that a camera wrote (EXIF) is applied; one that cannot be read is left out.
* What is transparent lies on white, in every mode. `load_image` drops alpha: black letters on nothing turn black.
* Grey of 16 bits is cut to its upper 8, of 12 bits (TIFF) likewise.
* Other integers and floats go by their range: floats up to 1 are shares of white; up to 255 they are as they are; up to
  65,535 they are 16 bits. Floats may lie a little outside (to 5% above white, 0.05 below black), as resizing leaves
  them, and are cut there. Further out, or not finite, they are refused: nobody knows what is black and what white.
* A file of several frames is refused, except a phone's MPO, whose first frame is the picture.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import os
import re
import stat
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fitprune._support.messages import line

_URL = re.compile(r"(?!data:)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # one slash: Path("https://x") has no second
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_SHORTEST = 40  # characters of base64; a picture of 2x2 pixels has more
# Pillow widens a PNG's pixels of 2 or 4 bits to 8, and not its transparent colour.
_STRETCHED = {"L;2": 255 // 3, "L;4": 255 // 15}
_ONE_COLOUR = ("1", "L", "P", "RGB")  # modes in which one colour may be named as transparent, beside I;16


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why, and never holds the picture."""


@dataclasses.dataclass(frozen=True)
class InDataset:
    """A picture inside a Hugging Face dataset, read when it is asked for: all of them may not fit into memory.

    Attributes:
        dataset: the dataset, in its "arrow" format.
        row: its number there.
        column: the column's name.
        folder: where relative paths in it begin.
    """

    dataset: Any
    row: int
    column: str = "image"
    folder: Path = Path()

    def read(self) -> Any:
        """Return what the dataset stores: a dict of bytes and path, or a list of them, bytes or text."""
        return self.dataset[self.row][self.column].to_pylist()[0]


def load_picture(source: Any, folder: Path = Path(), *, as_shown: bool = True) -> Image.Image:
    """Load the picture that a viewer shows, in RGB; the module's docstring has the rules.

    Args:
        source: a file's name, its bytes or an open file; base64 text or a `data:` URL; a dict of `bytes` or `path`, as
            `datasets` stores a picture; its place in a dataset; an image, which is left as it is; or an array
            [height, width] or [height, width, 1, 3 or 4]. A list of one is its element.
        folder: where a relative name begins.
        as_shown: by the rules; else as Pillow's `convert("RGB")` makes it, which LLaVA's own evaluation uses: alpha is
            dropped, and nothing is turned.

    Raises:
        BadPicture: there is no such file, it is no image, truncated, animated, a single pixel or a decompression bomb;
            a URL; values whose black and white are unknown; or `source` is of another type.
    """
    if isinstance(source, InDataset):
        return load_picture(source.read(), source.folder, as_shown=as_shown)
    if isinstance(source, (list, tuple)) and len(source) == 1:
        return load_picture(source[0], folder, as_shown=as_shown)
    if isinstance(source, dict):
        return load_picture(source.get("bytes") or source.get("path"), folder, as_shown=as_shown)
    if isinstance(source, str):
        source = located(source, folder)
    elif isinstance(source, os.PathLike):
        source = Path(source)
    name = "its image"
    if isinstance(source, (Path, str)):
        name = line(str(source), 100) if isinstance(source, Path) else f"its image {line(source, 40)!r}"
    try:
        if isinstance(source, Image.Image):
            return _as_shown(source, name) if as_shown else source.convert("RGB")
        if isinstance(source, np.ndarray):
            return _as_shown(_of_array(source, name), name)
        with Image.open(_opened(source, name)) as image:
            return _as_shown(image, name) if as_shown else image.convert("RGB")
    except BadPicture:
        raise
    except UnidentifiedImageError:
        what = "does not exist, and as base64 it is not" if _is_base64(source) else "is not"
        raise BadPicture(f"{name} {what} an image file that Pillow reads") from None
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadPicture(f"{name} cannot be decoded ({line(reason, 150)})") from None


def located(text: str, folder: Path) -> Path | str:
    """Decide whether text is a file's name, which becomes a path, or holds the picture: base64 or a `data:` URL.

    If there is a file of that name, it is used, even if the text is base64 too.

    Args:
        text: the text.
        folder: where a relative name begins.

    Raises:
        BadPicture: it is the address of a picture elsewhere.
    """
    if text[:5].lower() == "data:":
        return text
    if _URL.match(text):
        raise BadPicture(f"{line(text)} is a URL, and nothing is downloaded: save the picture and name its file")
    path = folder / text
    if len(text) >= _SHORTEST and _BASE64.fullmatch(text) and not os.path.isfile(path):
        return text
    return path


def _opened(source: Any, name: str) -> Any:
    """Return what `Image.open` takes."""
    if isinstance(source, Path):
        _require_file(source, name)
        return source
    if isinstance(source, str):
        return io.BytesIO(_of_text(source, name))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    kind = f"{len(source)} pictures" if isinstance(source, (list, tuple)) else f"of type {type(source).__name__}"
    raise BadPicture(f"{name} is {kind}, must be one file name, bytes, base64 text or an image")


def _require_file(path: Path, name: str) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if _URL.match(str(path)):
            raise BadPicture(f"{name} is a URL, and nothing is downloaded: save the picture, name its file") from None
        raise BadPicture(f"image {name} does not exist") from None
    except (OSError, ValueError) as error:  # too long a name, NUL in it, no permission, a loop of links
        raise BadPicture(f"image {name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise BadPicture(f"{name} is a folder, must be an image file")
    if not stat.S_ISREG(mode):
        raise BadPicture(f"{name} is a device or a pipe, must be an image file")


def _is_base64(source: Any) -> bool:
    """Whether it is bare text, which may also be meant as the name of a file that is not there."""
    return isinstance(source, str) and source[:5].lower() != "data:"


def _of_text(source: str, name: str) -> bytes:
    """Decode base64 text, in either alphabet and cut into lines or not, or a `data:` URL."""
    text = source
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(text)
        text = urllib.parse.unquote(text)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        what = "does not exist, and is not" if _is_base64(source) else "is not"
        raise BadPicture(f"{name} {what} sound base64 ({error})") from None


def _of_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "buif" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        shape = "x".join(map(str, array.shape))
        raise BadPicture(
            f"{name} is an array {shape} of {array.dtype}, must be numbers, height x width or height x width x 3 or 4"
        )
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    if array.dtype != np.uint8 and min(array.shape[:2]) > 0:
        array = array >> 8 if array.dtype.kind == "u" and array.dtype.itemsize == 2 else _ranged(array, name)
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def _as_shown(image: Image.Image, name: str) -> Image.Image:
    """Make a new image in RGB; the module's docstring has the rules."""
    if (frames := _frames(image)) > 1 and image.format != "MPO":
        raise BadPicture(f"{name} is animated ({frames} frames); save the frame that is meant")
    if min(image.size) < 2:
        raise BadPicture(f"{name} is {'x'.join(map(str, image.size))} pixels: too small to show anything")
    tile = next(iter(getattr(image, "tile", ())), None)  # gone once the image is read
    stretch = _STRETCHED.get(str(getattr(tile, "args", "")), 1)
    image.load()
    upright, clear = _upright(image), image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(upright)
        if image.mode.startswith("I;16"):
            # Pillow gives a TIFF's 12 bits as they are; those of other formats it widens.
            bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))
            grey = (values >> (4 if bits == (12,) else 8)).astype(np.uint8)
        else:
            grey = _ranged(values, name)
        if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = 255 - grey  # white is zero; Pillow turns those of 8 bits and fewer itself
        picture = Image.fromarray(grey)
        if isinstance(clear, int):
            picture.paste(255, mask=Image.fromarray(values == clear))
        return picture.convert("RGB")
    if clear is not None and image.mode in _ONE_COLOUR:
        if isinstance(clear, tuple) and max(clear) > 255:  # Pillow cuts a PNG's 16 bits to 8, and not this
            clear = tuple(value >> 8 for value in clear)
        elif isinstance(clear, int):
            clear *= stretch
        upright.info["transparency"] = clear
    palette = getattr(upright.palette, "mode", "")
    if upright.mode.endswith(("A", "a")) or palette.endswith("A") or upright.info:
        through = upright.convert("LA") if upright.mode == "La" else upright
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, through.convert("RGBA"))
    return upright.convert("RGB")


def _frames(image: Image.Image) -> int:
    try:
        frames: int = getattr(image, "n_frames", 1)
    except Exception:  # its file is closed, and the pixels are here
        return 1
    return frames


def _upright(image: Image.Image) -> Image.Image:
    """Copy an image, turned as its EXIF says, and without it: what is turned once must not be turned again."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show a picture with broken EXIF as it lies
        orientation = 1
    upright = image.copy()
    upright.info = {}
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(upright)


def _ranged(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Bring integers or floats to 8 bits by their range."""
    lowest, highest = float(values.min()), float(values.max())
    floats = values.dtype.kind == "f"
    whites = (white for white in (1, 255, 65_535)[not floats :] if highest <= white * (1.05 if floats else 1))
    white = next(whites, None)
    if white is None or not lowest >= (-0.05 if floats else 0):
        raise BadPicture(
            f"{name} has values from {lowest:g} to {highest:g}, must be in 0..1 (floats), 0..255 or 0..65535: "
            "save it with 8 bits, black as 0 and white as 255"
        )
    values = np.clip(values, 0, white)
    if white == 1:
        values = values * 255
    elif white > 255:
        values = values // 256
    return np.asarray(np.rint(values), dtype=np.uint8)
