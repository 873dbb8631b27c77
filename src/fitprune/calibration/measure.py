"""`measure`: one dense forward per calibration sample gives the statistics that every budget is fitted from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fitprune._support.processes import Processes
from fitprune.engine.arguments import valid_columns
from fitprune.engine.attention_tap import tap_attention
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.images import read_images, visual_mask
from fitprune.families.inputs import NOT_MEASURED, input_digests, to_model
from fitprune.families.provenance import provenance_of
from fitprune.fitting.stats import AttentionStats, join
from fitprune.scoring.received import Attention, ReceivedAttention, Sums, text_after

logger = logging.getLogger(__name__)

EMPTY = "batches is empty: the calibration set must hold at least one sample"


def measure(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    parts: str | os.PathLike[str] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> AttentionStats:
    """Measure the attention that visual tokens receive in each decoder layer of the dense model.

    The model's own attention implementation stays in use; the needed softmax rows are recomputed beside it. Under
    accelerate or torchrun the processes share the batches, dealt in turn; with as many threads each, the statistics are
    those of one process, bit by bit.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        batches: the processor's outputs: `input_ids`, `attention_mask`, `pixel_values` and what else the model takes.
            Samples of a batch may differ in length (padded) and in visual tokens. Of several processes each is given
            all, and passes over those of the others (`make_batches(..., processes=Processes())` does not make them).
        parts: folder for one file per sample; a run that was killed continues from it, if its batches are the same, in
            as many processes or not. Measured samples are then not held in memory until the end, which needs no more
            than the result. Several processes need one that all see. None keeps all in memory.
        total: number of batches, for the progress bar.
        progress: show a progress bar; of several processes the first does, with its share.

    Returns:
        Statistics of all samples, in the order of the batches; in every process. Equal samples count each, as rows of
        the data do in the authors' code; the log says how many are equal to earlier ones.

    Raises:
        ValueError: `batches` is empty or something else, a sample has no visual token or no text after its last one,
            `parts` is of another model, or there are several processes and no `parts`.
        FileNotFoundError: a part that another process measured is not in this one's `parts`.

    Source: arXiv:2409.10197. Differs from the authors' code: no attention map is kept, samples may be batched, and the
    attention of each token is stored instead of the sum, so that a fit needs no model.
    """
    processes = Processes()
    share = checked(batches, processes.has)
    adapted = adapt(model)
    model = adapted.model  # without what may be wrapped around it
    if processes.count > 1 and parts is None:
        raise ValueError(
            f"{processes.count} processes gather what they measure through a folder that all see: state parts=FOLDER"
        )
    folder = Path(parts) if parts is not None else None
    provenance = provenance_of(model)  # once: it reads from every weight
    configs = (model.config, adapted.decoder.config, model.config.vision_config)
    attention = [str(getattr(config, "_attn_implementation", "")) for config in configs]
    measured: list[AttentionStats] = []  # without a folder
    names: list[list[str]] = []  # of each batch's parts in the folder
    count = None if total is None else -(-total // processes.count)
    quiet = not progress or processes.rank > 0
    for batch in tqdm(share, total=count, desc="measure", unit="batch", disable=quiet or None):
        digests = input_digests(adapted, batch)
        if folder is None:
            measured += _measure_batch(adapted, batch, digests, provenance)
            continue
        files = _part_files(folder, digests, batch, attention)
        if not _are_parts(adapted, files, provenance):
            for file, part in zip(files, _measure_batch(adapted, batch, digests, provenance), strict=True):
                part.save(file)
        names.append([file.name for file in files])
    if folder is None:
        if not measured:
            raise ValueError(EMPTY)
        return _counted(join(measured), processes)
    turns = itertools.zip_longest(*processes.gather(names), fillvalue=[])
    files = [folder / name for turn in turns for batch_names in turn for name in batch_names]
    if not files:
        raise ValueError(EMPTY)
    if absent := [file for file in files if not file.exists()]:
        raise FileNotFoundError(
            2, f"{absent[0]}: not there, though a process has written it; parts must be a folder that all processes see"
        )
    whole = join(_Parts(files))
    processes.wait()  # all have read, so the caller may delete the parts
    return _counted(whole, processes)


def checked(batches: Any, own: Callable[[int], bool] = lambda _: True) -> Iterator[Mapping[str, Any]]:
    """Pass on the batches of this process.

    Args:
        batches: batches of all processes.
        own: whether the batch of a number is this process's.

    Raises:
        ValueError: `batches` cannot be iterated over; or, when it is reached, one of them is no batch.
    """
    wanted = "must be a list of batches, as make_batches(samples, processor) gives them"
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches is a {type(batches).__name__}: {wanted}")

    def each() -> Iterator[Mapping[str, Any]]:
        for number, batch in enumerate(batches):
            if not own(number):  # which another process has; here it may be empty
                continue
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError(f"batches[{number}] is a {type(batch).__name__} without 'input_ids': {wanted}")
            yield batch

    return each()


def _counted(stats: AttentionStats, processes: Processes) -> AttentionStats:
    """Say how many samples are equal to others."""
    again = len(stats) - len(set(stats.digests))
    if again and processes.rank == 0:
        logger.warning("%d of %d samples are equal to earlier ones, and each counts", again, len(stats))
    return stats


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Parts on disk, loaded one at a time."""

    files: Sequence[Path]

    def __iter__(self) -> Iterator[AttentionStats]:
        return map(AttentionStats.load, self.files)


def _part_files(folder: Path, digests: Sequence[str], batch: Mapping[str, Any], attention: list[str]) -> list[Path]:
    """Name each part by its sample, by the batch that it is measured in, its place there, and how attention is made.

    In another batch, or padded otherwise, a sample's statistics differ by rounding. So a run that goes on gives the
    bits of an unbroken one, of a sample that two processes measure in two batches neither overwrites the other's, and
    equal samples of one batch have a part each.
    """
    mask = batch.get("attention_mask")
    around = [*digests, list(batch["input_ids"].shape), mask if mask is None else mask.tolist()]
    named = (hashlib.sha256(json.dumps([place, *around, *attention]).encode()) for place in range(len(digests)))
    return [folder / f"{name.hexdigest()}.safetensors" for name in named]


def _are_parts(adapted: AdaptedModel, files: Sequence[Path], provenance: dict[str, str]) -> bool:
    """Whether an earlier run left all of a batch's parts, measured alike; if not, it is to be measured."""
    if not all(file.exists() for file in files):
        return False
    try:
        loaded = [AttentionStats.load(file) for file in files]
    except ValueError as error:
        logger.warning("measured again: %s", error)
        return False
    for part in loaded:
        part.model.require_same(adapted.fingerprint, what=f"a part in {files[0].parent}")
    # Other weights, dtype or versions: not what this run would measure.
    return all(part.provenance == provenance for part in loaded)


def _measure_batch(
    adapted: AdaptedModel, batch: Mapping[str, Any], digests: list[str], provenance: dict[str, str]
) -> list[AttentionStats]:
    """Run one batch and split what its visual tokens received by sample."""
    model = adapted.model
    inputs = {name: value for name, value in to_model(batch, model).items() if name not in NOT_MEASURED}
    ids = inputs["input_ids"]
    padded, _ = valid_columns(inputs)
    valid = torch.ones_like(ids, dtype=torch.bool) if padded is None else padded
    visual = visual_mask(adapted, ids)
    question = text_after(visual, padded)
    for needed, what in ((visual, "visual token"), (question, "text after its last visual token")):
        if not bool(needed.any(1).all()):
            number = int(needed.any(1).int().argmin())
            raise ValueError(f"sample {number} of the batch has no {what}: scores need an image and then a question")
    received: dict[int, ReceivedAttention] = {}
    sums: dict[torch.device, Sums] = {}

    def look(layer: int, at: Attention) -> None:
        here = at.query.device  # a model may be spread over several
        if here not in sums:
            sums[here] = Sums(images.image.to(here), question.to(here))
        softmax = at.softmax
        if padded is not None:
            softmax = dataclasses.replace(softmax, valid=padded.to(here))
        received[layer] = sums[here].received(at.query, at.key, softmax, at.lse)

    with torch.no_grad(), tap_attention(adapted, lambda layer, _: functools.partial(look, layer)):
        images = read_images(adapted, inputs)
        model(**{**inputs, **images.changed}, use_cache=False, logits_to_keep=1)
    # A layer without attention shows none; nothing leaves there.
    nothing = torch.zeros_like(next(iter(received.values())).self_attention)
    ordered = [received.get(layer, ReceivedAttention(nothing, nothing)) for layer in range(len(adapted.layers))]
    # Fetched here and not in the tap, where each layer would wait for its device.
    self_attention = torch.stack([r.self_attention.cpu() for r in ordered], 1)  # [B, L, N]
    cross_attention = torch.stack([r.cross_attention.cpu() for r in ordered], 1)
    visual, valid = visual.cpu(), valid.cpu()
    return [
        AttentionStats(
            self_attention[row][:, visual[row]],
            cross_attention[row][:, visual[row]],
            (int(visual[row].sum()),),
            (int((valid[row] & ~visual[row]).sum()),),
            (digest,),
            adapted.fingerprint,
            provenance,
        )
        for row, digest in enumerate(digests)
    ]


def forget_parts(parts: str | os.PathLike[str]) -> None:
    """Delete the parts of a finished run, and their folder unless something else lies in it."""
    name = "[0-9a-f]" * hashlib.sha256().digest_size * 2
    for pattern in (f"{name}.safetensors", f".{name}.safetensors.*.part"):  # whole, and cut off when a run was killed
        for part in Path(parts).glob(pattern):
            part.unlink()
    with contextlib.suppress(OSError):
        Path(parts).rmdir()
