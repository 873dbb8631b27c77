"""Calibration and test data as users have it.

Reads the FitPrune authors' question JSONL, LLaVA's instruction JSON and Hugging Face datasets; every bad entry is named
with its line. Knows no models.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)


class BadSample(ValueError):
    """One entry of the data that cannot be used; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class InDataset:
    """An image file inside a Hugging Face dataset, read when it is asked for: all of them may not fit into memory.

    Attributes:
        dataset: the dataset, whose column "image" is not decoded.
        row: its number there.
    """

    dataset: Any
    row: int

    def read(self) -> bytes:
        """Give the file's bytes."""
        found: bytes = self.dataset[self.row]["image"]["bytes"]
        return found


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with one question.

    Attributes:
        id: `question_id`, `id` or the entry's number.
        text: the question, without image token and without prompt format.
        image: path of the image file; its bytes, its place in a dataset, or the image itself.
        answers: accepted answers; empty where the data has none.
        kind: a label that results are grouped by ("" where the data has none).
        where: file and line, for messages.
    """

    id: str
    text: str
    image: Path | bytes | InDataset | Image.Image
    answers: tuple[str, ...] = ()
    kind: str = ""
    where: str = ""

    def load_image(self) -> Image.Image:
        """Decode the image as RGB.

        Raises:
            BadSample: the file is missing, no image, truncated, animated, a single pixel, or a decompression bomb.
        """
        name = self.image if isinstance(self.image, Path) else "its image"
        if isinstance(self.image, Path) and not self.image.is_file():
            raise BadSample(f"{self.where}: image {name} does not exist; check --image-folder")
        try:
            if isinstance(self.image, Image.Image):
                opened = self.image
            else:
                held = self.image.read() if isinstance(self.image, InDataset) else self.image
                opened = Image.open(io.BytesIO(held) if isinstance(held, bytes) else held)
            # A phone's MPO holds a second view of the same picture; the first is what is shown.
            if (frames := getattr(opened, "n_frames", 1)) > 1 and opened.format != "MPO":
                raise BadSample(f"{self.where}: {name} is animated ({frames} frames); save the frame that is meant")
            if min(opened.size) < 2:
                size = "x".join(map(str, opened.size))
                raise BadSample(f"{self.where}: {name} is {size} pixels: too small to show anything")
            if opened.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
                opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            return opened.convert("RGB")
        except BadSample:
            raise
        except UnidentifiedImageError:
            raise BadSample(f"{self.where}: {name} is not an image file") from None
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise BadSample(f"{self.where}: {name} cannot be decoded ({error})") from None


def load_samples(
    data: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> list[Sample]:
    """Read samples from a file, a folder or a Hugging Face dataset.

    Formats, told apart by content: JSONL with a question a line (`question_id`, `image` or `file_name`, `text`, and
    optionally `answer` (string or list), `kind`); LLaVA's instruction JSON (a list of `id`, `image`, `conversations`;
    the first question and its answer are used); a folder or hub name that `datasets` loads (columns `image` and `text`
    or `question`, optionally `answer` or `answers`).

    Args:
        data: the file, folder or name.
        image_folder: where relative image paths begin; by default the data file's folder.
        samples: take so many, drawn without replacement; all by default, in the data's order.
        seed: seed of the draw.
        skip_bad: leave bad entries out, with a warning and a count, instead of raising. Images are decoded to see.

    Raises:
        FileNotFoundError: there is no such file.
        BadSample: an entry is broken, with its file and line; not with `skip_bad`.
        ValueError: no sample is left, or `samples` is below 1 or more than there are.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
    path = Path(data)
    if (path / "metadata.jsonl").is_file():  # an image folder in the datasets sense reads without datasets too
        path = path / "metadata.jsonl"
    if path.is_file():
        entries: Iterable[tuple[str, Any]] = _file_entries(path)
    else:
        entries = _dataset_entries(path, str(data))
    folder = Path(image_folder) if image_folder is not None else path.parent if path.is_file() else path
    if image_folder is not None and not folder.is_dir():
        raise FileNotFoundError(2, f"image folder {folder} does not exist")

    bad: list[str] = []
    found: list[Sample] = []
    for where, entry in entries:
        try:
            sample = _sample(entry, folder, where)
            if skip_bad:
                sample.load_image()  # what cannot be decoded must be known before the draw
            found.append(sample)
        except BadSample as error:
            if not skip_bad:
                raise
            logger.warning("skipped: %s", error)
            bad.append(str(error))
    if bad:
        logger.warning("%d of %d entries of %s skipped", len(bad), len(bad) + len(found), data)
    if not found:
        raise ValueError(f"{data}: no usable sample in it ({len(bad)} skipped); there must be at least one")
    if samples is None:
        return found
    if samples > len(found):
        raise ValueError(f"samples={samples}: {data} has only {len(found)} usable ones; ask for that or fewer")
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), samples))]


def recombined(samples: Sequence[Sample], times: int, *, seed: int = 0) -> list[Sample]:
    """Ask every image `times` questions: its own, and then those of other samples, drawn without repetition.

    The new samples have no accepted answers: they are for what needs none, such as `fitprune.fit_output`, which
    compares a pruned model with the dense one. So a small calibration set says more.

    Args:
        samples: the samples; they stay the first of the result.
        times: questions for each image, at most as many as there are samples.
        seed: of the draw.

    Raises:
        ValueError: `times` is below 1.
    """
    if times < 1:
        raise ValueError(f"times={times}: must be at least 1")
    found, count = list(samples), len(samples)
    for shift in random.Random(seed).sample(range(1, count), max(0, min(times, count) - 1)):
        for number, sample in enumerate(samples):
            asks = samples[(number + shift) % count]
            found.append(
                dataclasses.replace(sample, id=f"{sample.id} {asks.id}", text=asks.text, kind=asks.kind, answers=())
            )
    return found


def _file_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Give (where, entry) for a JSONL file or a JSON list; a broken line is an entry that is an exception."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; must be JSONL or JSON") from None
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadSample(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(whole))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", BadSample(f"{path}:{number}: not JSON ({error.msg})")


def _dataset_entries(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Give (where, row) of a Hugging Face dataset: saved to disk, an image folder, or a hub name, split or not."""
    if not path.is_dir() and (path.suffix or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(2, f"{name}: no such file or folder")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: reading a dataset needs the datasets package: pip install datasets") from None
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except Exception as error:  # datasets raises many kinds; all mean that the name does not load
        raise ValueError(
            f"{name}: datasets cannot load it ({error}); give a JSONL file, a folder or a hub name"
        ) from None
    if isinstance(loaded, dict):
        splits = list(loaded)
        if len(splits) > 1:
            logger.warning("%s has splits %s: %r is used", name, splits, splits[0])
        loaded = loaded[splits[0]]
    if isinstance((loaded.features or {}).get("image"), datasets.Image):  # decoded here, where a bad one can be named
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(loaded):
        if isinstance(image := row.get("image"), dict) and image.get("bytes"):
            row = {**row, "image": InDataset(loaded, number)}
        yield f"{name}, row {number}", row


def _sample(entry: Any, folder: Path, where: str) -> Sample:
    """Make a sample of one entry in any of the formats."""
    if isinstance(entry, BadSample):
        raise entry
    if not isinstance(entry, dict):
        raise BadSample(f"{where}: is a JSON {type(entry).__name__}, must be an object with an image and a text")
    image = entry.get("image", entry.get("file_name"))
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):  # how datasets holds an image that is not decoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        image = folder / image
    elif not isinstance(image, (bytes, InDataset, Image.Image)):
        raise BadSample(f"{where}: 'image' is {image!r}, must be one file name (or 'file_name')")
    text, answer = entry.get("text", entry.get("question")), entry.get("answer", entry.get("answers"))
    if "conversations" in entry:
        text, answer = _first_exchange(entry["conversations"], where)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"{where}: 'text' is {text!r}, must be a question (or 'question', or 'conversations')")
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in answers):
        raise BadSample(f"{where}: 'answer' is {answer!r}, must be a string or a list of strings")
    number = entry.get("question_id", entry.get("id", where))
    return Sample(
        str(number),
        text.replace("<image>", "").strip(),
        image,
        tuple(str(a) for a in answers),
        str(entry.get("kind") or ""),
        where,
    )


def _first_exchange(conversations: Any, where: str) -> tuple[str, str | None]:
    """Take the first question, its image marker cut out, and its answer from LLaVA's conversation form."""
    try:
        turns = [(turn["from"], str(turn["value"])) for turn in conversations]
        question = next(value for speaker, value in turns if speaker == "human")
        answer = next((value for speaker, value in turns if speaker == "gpt"), None)
    except (TypeError, KeyError, StopIteration):
        raise BadSample(
            f"{where}: 'conversations' must be a list of {{'from': 'human'|'gpt', 'value': text}}"
        ) from None
    return question, answer
