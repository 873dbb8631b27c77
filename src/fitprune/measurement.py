"""`measure`: one dense forward per calibration sample gives the statistics that every budget is fitted from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fitprune.adapters import AdaptedModel, adapt
from fitprune.arguments import valid_columns
from fitprune.attention import Attention, ReceivedAttention, received_attention, text_after
from fitprune.hooks import tap_attention
from fitprune.images import PIXELS, read_images, visual_mask
from fitprune.selection import images_of
from fitprune.stats import AttentionStats, merge

logger = logging.getLogger(__name__)


def measure(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    parts: str | os.PathLike[str] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> AttentionStats:
    """Measure the attention that visual tokens receive in each decoder layer of the dense model.

    The model's own attention implementation stays in use; the needed softmax rows are recomputed beside it.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        batches: the processor's outputs: `input_ids`, `attention_mask`, `pixel_values` and what else the model takes.
            Samples of a batch may differ in length (padded) and in visual tokens.
        parts: folder for one file per sample; a run that was killed continues from it. None keeps all in memory.
        total: number of batches, for the progress bar.
        progress: show a progress bar.

    Returns:
        Statistics of all samples, in the order of the batches.

    Raises:
        ValueError: `batches` is empty, a sample has no visual token or no text after its last one, or `parts` is of
            another model.

    Source: arXiv:2409.10197. Differs from the authors' code: no attention map is kept, samples may be batched, and the
    attention of each token is stored instead of the sum, so that a fit needs no model.
    """
    adapted = adapt(model)
    folder = Path(parts) if parts is not None else None
    provenance = provenance_of(model)  # once: it reads from every weight
    measured: list[AttentionStats] = []
    for batch in tqdm(batches, total=total, desc="measure", unit="batch", disable=not progress):
        digests = input_digests(adapted, batch)
        files = [folder / f"{digest}.safetensors" for digest in digests] if folder else []
        found = _found_parts(adapted, files, provenance)
        if found is None:
            found = _measure_batch(adapted, batch, digests, provenance)
            for file, part in zip(files, found, strict=False):
                part.save(file)
        measured += found
    if not measured:
        raise ValueError("batches is empty: the calibration set must hold at least one sample")
    return merge(measured)


def _found_parts(adapted: AdaptedModel, files: list[Path], provenance: dict[str, str]) -> list[AttentionStats] | None:
    """Load a batch's parts if an earlier run left them all, measured alike; None if it is to be measured."""
    if not files or not all(file.exists() for file in files):
        return None
    try:
        found = [AttentionStats.load(file) for file in files]
    except ValueError as error:
        logger.warning("measured again: %s", error)
        return None
    for part in found:
        part.model.require_same(adapted.shape, what=f"a part in {files[0].parent}")
    # Other weights, dtype or versions: not what this run would measure.
    return found if all(part.provenance == provenance for part in found) else None


_NOT_MEASURED = {"use_cache", "logits_to_keep"}


def _measure_batch(
    adapted: AdaptedModel, batch: Mapping[str, Any], digests: list[str], provenance: dict[str, str]
) -> list[AttentionStats]:
    """Run one batch and split what its visual tokens received by sample."""
    model = adapted.model
    inputs = {name: value for name, value in to_model(batch, model).items() if name not in _NOT_MEASURED}
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

    def look(layer: int, at: Attention) -> None:
        softmax = dataclasses.replace(at.softmax, valid=padded)
        received[layer] = received_attention(at.query, at.key, seen.image, question, softmax, at.lse)

    with torch.no_grad(), tap_attention(adapted, lambda layer, _: functools.partial(look, layer)):
        seen = read_images(adapted, inputs)
        model(**{**inputs, **seen.changed}, use_cache=False, logits_to_keep=1)
    # A layer without attention shows none; nothing leaves there.
    nothing = torch.zeros_like(next(iter(received.values())).self_attention)
    ordered = [received.get(layer, ReceivedAttention(nothing, nothing)) for layer in range(len(adapted.layers))]
    self_attention = torch.stack([r.self_attention for r in ordered], 1).cpu()  # [B, L, N]
    cross_attention = torch.stack([r.cross_attention for r in ordered], 1).cpu()
    visual, valid = visual.cpu(), valid.cpu()
    return [
        AttentionStats(
            self_attention[row][:, visual[row]],
            cross_attention[row][:, visual[row]],
            (int(visual[row].sum()),),
            (int((valid[row] & ~visual[row]).sum()),),
            (digest,),
            adapted.shape,
            provenance,
        )
        for row, digest in enumerate(digests)
    ]


def provenance_of(model: Any) -> dict[str, str]:
    """Say what was measured with which versions."""
    import transformers

    import fitprune

    return {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fitprune": fitprune.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def weights_digest(model: Any) -> str:
    """Tell weights of one shape apart: a hash of the first values of every parameter that is not on the meta device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            digest.update(name.encode())
            values = parameter.detach()
            if hasattr(type(values), "tensor_data_names"):  # torchao's: they have no views, but rows that are numbers
                values = values[:1].dequantize()
            digest.update(values.flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def forget_parts(parts: str | os.PathLike[str]) -> None:
    """Delete the parts of a finished run, and their folder unless something else lies in it."""
    for part in Path(parts).glob("*.safetensors"):
        if len(part.stem) == hashlib.sha256().digest_size * 2:
            part.unlink()
    with contextlib.suppress(OSError):
        Path(parts).rmdir()


def to_model(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Move a batch to the model's device, and its floating-point tensors to the model's dtype.

    What a loss needs is left out: some processors give labels to a prompt too.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in batch.items() if name not in ("labels", "shift_labels")}


def input_digests(adapted: AdaptedModel, batch: Mapping[str, Any]) -> list[str]:
    """Name each sample by a hash of its own inputs, whatever the batch around it.

    Images are dealt to samples in order, one for each run of visual tokens. Where they do not come out even (adjacent
    images, tiles, patches of several images in one tensor), the whole batch's images enter the hash: safe, only less
    able to continue with another batch size.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    given = [batch[name] for names in PIXELS.values() for name in names if batch.get(name) is not None]
    images = (images_of(visual_mask(adapted, ids)).amax(1) + 1).tolist()
    even = len(given) == 1 and sum(images) == len(given[0])
    digests, first = [], 0
    for row, count in enumerate(images):
        own = ids[row] if mask is None else ids[row][mask[row].bool()]
        digest = hashlib.sha256(own.cpu().numpy().tobytes())
        for pixels in given:
            mine = pixels[first : first + count] if even else pixels
            digest.update(mine.float().cpu().numpy().tobytes())
        first += count
        digests.append(digest.hexdigest())
    return digests
