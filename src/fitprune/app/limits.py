"""What a person may send to the app: pictures, questions and answers within limits, each with a message of its own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
from pathlib import Path
from typing import cast

from PIL import Image

from fitprune._support import checked
from fitprune._support.messages import short
from fitprune.calibration.pictures import BadPicture, load_picture

# What Pillow decodes itself. It hands others, such as PostScript, to programs of the machine.
Image.init()  # else Pillow knows but five
FORMATS: tuple[str, ...] = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM") if name in Image.OPEN
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it was sent. The file is kept, not its pixels, which may take a hundred times as much memory.

    Attributes:
        data: the file.
        name: of the file, without a folder.
    """

    data: bytes = dataclasses.field(repr=False)
    name: str

    @functools.cached_property
    def digest(self) -> str:
        """A name for the file's content."""
        return hashlib.sha256(self.data).hexdigest()

    def image(self) -> Image.Image:
        """Decode it upright, in RGB, what is transparent on white. Others may get the same image: do not change it."""
        return _decoded(self.data)

    def small(self) -> Image.Image:
        """The image with sides of at most 1,024 pixels, for the page."""
        return _small(self.data)


@functools.lru_cache(maxsize=4)  # the last few are asked for several times each
def _decoded(data: bytes) -> Image.Image:
    return load_picture(data)


@functools.lru_cache(maxsize=16)
def _small(data: bytes) -> Image.Image:
    image = _decoded(data).copy()
    image.thumbnail((1024, 1024))
    return image


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one person may ask for at a time.

    Attributes:
        megabytes: of a picture's file.
        megapixels: of a picture.
        question: characters of a question.
        answer: tokens of an answer.
    """

    megabytes: int = 10
    megapixels: int = 25
    question: int = 1000
    answer: int = 256

    @property
    def usual_answer(self) -> int:
        """Tokens of an answer where nothing else is chosen."""
        return min(64, self.answer)

    def read_picture(self, path: str | os.PathLike[str] | None) -> Picture:
        """Read a picture's file, and decode it once, so that a bad one is refused now.

        Args:
            path: the file; None where there is none yet.

        Raises:
            ValueError: there is none, it has too many bytes or pixels, or it is no picture.
        """
        if path is None:
            raise ValueError("no picture: upload one, paste it, use the camera, or choose an example")
        try:
            with open(path, "rb") as file:
                data = file.read((self.megabytes << 20) + 1)
        except OSError:  # uploads are kept for an hour
            raise ValueError(f"{Path(path).name} is no longer here: upload it again") from None
        picture = Picture(data, Path(path).name)
        if len(data) > self.megabytes << 20:
            size = os.path.getsize(path) / 2**20
            raise ValueError(
                f"{picture.name} has {size:.1f} MB: must have at most {self.megabytes} MB; save it smaller"
            )
        most = f"must have at most {self.megapixels} million; make it smaller"
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:  # its header alone
                width, height = opened.size
            if width * height > self.megapixels * 10**6:
                raise ValueError(f"{picture.name} has {width:,} x {height:,} pixels: {most}")
            picture.image()
        except Image.DecompressionBombError:
            raise ValueError(f"{picture.name} has more pixels than Pillow opens: {most}") from None
        except (BadPicture, OSError, SyntaxError) as error:
            known = isinstance(error, BadPicture)
            reason = str(error).removeprefix("its image ") if known else "is not an image file that Pillow reads"
            raise ValueError(f"{picture.name} {reason}; choose a JPEG, PNG or WebP picture") from None
        return picture

    def check_question(self, text: object) -> str:
        """Return a question without the spaces around it; a ValueError says that there is none, or a too long one."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"question={short(text)}: must be a text that is not empty; type what you want to know")
        if len(text) > self.question:
            raise ValueError(
                f"the question has {len(text):,} characters: must have at most {self.question:,}; shorten it"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("the question holds half of a letter (a surrogate): must be Unicode text; type it again")
        return text.strip()

    def check_answer(self, tokens: object) -> int:
        """Return the most tokens of an answer; a ValueError says that it is out of range."""
        if isinstance(tokens, float) and tokens.is_integer():  # JSON has one kind of number
            tokens = int(tokens)
        checked.whole("answer tokens", tokens, 1, self.answer)
        return cast(int, tokens)
