"""Samples: an image with a question each, loaded from users' data, drawn by seed, or recombined. Knows no models."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fitprune._support.messages import line
from fitprune.calibration.entry import BadSample, fields_of, is_text_alone, no_image
from fitprune.calibration.formats import read_entries
from fitprune.calibration.pictures import BadPicture, InDataset, load_picture

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question, with its image.

    Attributes:
        id: `question_id`, `id` or where the entry is; a whole number stays one, as files of answers need it.
        text: the question, without image token and without prompt format.
        image: path of the image file; or anything else that `fitprune.calibration.pictures.load_picture` reads; None
            for a question of text alone, as benchmarks have.
        answers: accepted answers; empty where the data has none.
        kind: a label that results are grouped by ("" where the data has none).
        where: file and line, for messages.
        facts: what else a benchmark knows of its question.
    """

    id: str | int
    text: str
    image: Path | str | bytes | InDataset | Image.Image | np.ndarray[Any, Any] | None
    answers: tuple[str, ...] = ()
    kind: str = ""
    where: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def load_image(self, *, as_shown: bool = True) -> Image.Image:
        """Decode the image as RGB, as a viewer shows it (`fitprune.calibration.pictures` has the rules).

        Args:
            as_shown: see `fitprune.calibration.pictures.load_picture`.

        Raises:
            BadSample: the file is missing, no image, truncated, animated, a single pixel, or a decompression bomb.
        """
        try:
            return load_picture(self.image, as_shown=as_shown)
        except BadPicture as error:
            of_data = self.where and not self.where.startswith("--")  # an option names its image itself
            hint = "; check --image-folder" if of_data and "does not exist" in str(error) else ""
            raise BadSample(f"{self.where}: {error}{hint}".removeprefix(": ")) from None


def load_samples(
    data: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> list[Sample]:
    """Read samples from a file, a folder or a Hugging Face dataset.

    The content decides the format: JSONL with a question on each line (`question_id`, `image` or `file_name`, `text`,
    and optionally `answer` (string or list), `kind`); LLaVA's instruction JSON (a list of `id`, `image`,
    `conversations`; the first question and its answer are used, and entries of text alone are left out, with a count);
    a folder or hub name that `datasets` loads (columns `image` and `text` or `question`, optionally `answer` or
    `answers`), with its split as `name:split`. docs/data.md has all keys and the values that each may have.

    Args:
        data: the file, folder or name, also of bundled data.
        image_folder: where relative image paths begin; by default the data file's folder.
        samples: number of samples, drawn without replacement; all by default, in the data's order.
        seed: seed of the draw.
        skip_bad: leave bad entries out, with a warning and a count, instead of raising. Images are decoded to find
            out: all of them, or those of a draw, where others are drawn for bad ones.

    Raises:
        FileNotFoundError: there is no such file.
        BadSample: an entry is broken, with its file and line; not with `skip_bad`.
        ValueError: no sample is left, there is no such split, `samples` is below 1 or more than there are, or an
            argument is of another type.
    """
    if not isinstance(data, (str, os.PathLike)) or not os.fspath(data):
        raise ValueError(f"data={line(repr(data))}: must be the name of a file, a folder or a dataset")
    if samples is not None:
        require_whole("samples", samples, 1)
    require_whole("seed", seed)
    path, entries = read_entries(os.fspath(data))
    folder = Path(image_folder) if image_folder is not None else path.parent if os.path.isfile(path) else path
    if not (image_folder is None or os.path.isdir(folder)):
        raise FileNotFoundError(2, f"image folder {folder} does not exist")
    bad = _Bad(skip_bad)
    usable = _read(data, entries, folder, bad)
    total = len(usable) + bad.count
    if samples is None or samples <= len(usable):
        places = range(len(usable)) if samples is None else draw(len(usable), samples, seed)
        good = (place for place in places if not skip_bad or bad.has_image(usable[place]))
        usable = [usable[place] for place in sorted(itertools.islice(good, samples))]
    if bad.count:
        logger.warning("%d of %d entries of %s skipped", bad.count, total, data)
    if not usable:
        raise ValueError(f"{data}: no usable sample in it ({bad.count} skipped); there must be at least one")
    if samples is not None and samples > len(usable):
        raise ValueError(
            f"samples={samples}: {data} has only {len(usable)} usable ones; ask for fewer, or leave it out for all"
        )
    return usable


@dataclasses.dataclass
class _Bad:
    """What happens to bad entries: with `skip` each is named in a warning and counted, else the first one raises."""

    skip: bool
    count: int = 0

    def add(self, error: BadSample) -> None:
        if not self.skip:
            raise error
        logger.warning("skipped: %s", error)
        self.count += 1

    def has_image(self, sample: Sample) -> bool:
        """Whether its image can be decoded; one that cannot is added."""
        try:
            sample.load_image()
        except BadSample as error:
            self.add(error)
            return False
        return True


def _read(data: Any, entries: Iterable[tuple[str, Any]], folder: Path, bad: _Bad) -> list[Sample]:
    """Make samples of the entries; those of text alone are left out, with one count."""
    samples: list[Sample] = []
    alone: list[str] = []  # where entries of text alone are
    for where, entry in entries:
        if is_text_alone(entry):
            alone.append(where)
            continue
        try:
            samples.append(Sample(**fields_of(entry, folder, where)))
        except BadSample as error:
            bad.add(error)
    if alone and not samples and not bad.count:
        bad.add(BadSample(f"{alone[0]}: {no_image(None)}; no entry has an image"))
    elif alone:
        total = len(alone) + len(samples) + bad.count
        logger.warning("%d of %d entries of %s have no image: left out", len(alone), total, data)
    return samples


def draw(total: int, count: int, seed: int) -> Iterable[int]:
    """Draw `count` places without replacement, and after them the others, in random order, to replace bad ones."""
    generator = random.Random(seed)
    first = generator.sample(range(total), count)
    yield from first
    others = sorted(set(range(total)).difference(first))
    generator.shuffle(others)
    yield from others


def recombined(samples: Sequence[Sample], times: int, *, seed: int = 0) -> list[Sample]:
    """Ask `times` questions about every image: its own, and then those of other samples, drawn without repetition.

    The new samples have no accepted answers: they are for what needs none, such as `fitprune.search`, which compares a
    pruned model with the dense one. A small calibration set gives more this way.

    Args:
        samples: the samples; they stay the first of the result.
        times: questions for each image, at most as many as there are samples.
        seed: seed of the draw.

    Raises:
        ValueError: `times` is below 1.
    """
    if times < 1:
        raise ValueError(f"times={times}: must be at least 1")
    result, count = list(samples), len(samples)
    for shift in random.Random(seed).sample(range(1, count), max(0, min(times, count) - 1)):
        for number, sample in enumerate(samples):
            other = samples[(number + shift) % count]
            result.append(
                dataclasses.replace(sample, id=f"{sample.id} {other.id}", text=other.text, kind=other.kind, answers=())
            )
    return result


def require_whole(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse an argument that is not a whole number, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        rule = "must be a whole number" if math.isinf(least) else f"must be at least {least:g}, a whole number"
        raise ValueError(f"{name}={line(repr(value))}: {rule}")
