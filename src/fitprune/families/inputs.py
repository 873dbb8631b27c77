"""Move a processor's batch to the model, and name each of its samples by a hash of the sample's own inputs.

Processors lay the images of all samples one after another, whole, cut into tiles or into patches. Here they are dealt
back: each sample gets the number that its visual tokens show.

Shapes: B samples, N columns, U units (images, tiles, patches or videos) of the whole batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fitprune._support.host import execution_device
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import PIXELS, feature_lengths, images_of

NOT_MEASURED = {"use_cache", "logits_to_keep"}  # arguments of a call that change nothing that is measured
_FOR_LOSS = {"labels", "shift_labels"}
_PIXELS = [name for names in PIXELS.values() for name in names]
# What else is laid image after image, or video after video; and what has their sizes.
_BESIDE = {"pixel_attention_mask", "batch_num_images", "second_per_grid_ts", "image_sizes_videos"}
_SIZES = {"image": ("image_grid_thw", "spatial_shapes", "image_sizes"), "video": ("video_grid_thw",)}
_LAID = {*_PIXELS, *_BESIDE, *_SIZES["image"], *_SIZES["video"]}


def to_model(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Move a batch to the model's device, and its floating-point tensors to the model's dtype.

    What a loss needs is left out: some processors give labels to a prompt too.
    """
    device = execution_device(model)

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, model.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in batch.items() if name not in _FOR_LOSS}


def input_digests(adapted: AdaptedModel, batch: Mapping[str, Any]) -> list[str]:
    """Name each sample by a hash of its own inputs, whatever the batch around it.

    Its own are its ids without padding, its images and videos, and what the processor says of them; zeros that only
    fill up a batch are cut off. Where an input cannot be dealt to the samples, all of it enters the hash, and the
    sample's place in the batch too: such a sample has another name in another batch, and no two of one batch have the
    same.
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_MEASURED | _FOR_LOSS}
    inputs = {name: _as_tensor(value) for name, value in inputs.items() if value is not None}
    ids, valid = inputs.pop("input_ids").cpu(), torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    if getattr(inputs.get("attention_mask"), "ndim", 0) == 2:
        valid = inputs.pop("attention_mask").cpu().bool().expand(ids.shape)
    dealer = _Dealer(adapted, inputs, ids, valid)
    names = [*(name for name in _PIXELS if name in inputs), *sorted(inputs.keys() - set(_PIXELS))]
    dealt = {name: dealer.deal(name) for name in names}
    whole = hashlib.sha256(_bytes(ids) + _bytes(valid))
    for name, parts in dealt.items():
        if parts is None:
            _update(whole, name, inputs[name])
    digests = []
    for place, (row, keep) in enumerate(zip(ids, valid, strict=True)):
        digest = hashlib.sha256(_bytes(row[keep]))
        for name, parts in dealt.items():
            own = () if parts is None else parts[place]
            # Nothing of an empty part: a sample without image is the same beside one that has some.
            if not isinstance(own, torch.Tensor) or own.numel():
                _update(digest, name, own)
        if None in dealt.values():
            _update(digest, "", f"sample {place} of {whole.hexdigest()}")
        digests.append(digest.hexdigest())
    return digests


class _Dealer:
    """Deals the inputs of one batch to its samples.

    Args:
        adapted: the model.
        inputs: what the processor made, without ids and mask.
        ids: [B, N].
        valid: [B, N] bool, False at padding.
    """

    def __init__(
        self, adapted: AdaptedModel, inputs: Mapping[str, Any], ids: torch.Tensor, valid: torch.Tensor
    ) -> None:
        self.adapted, self.inputs, self.ids, self.valid = adapted, inputs, ids, valid
        self._lengths: dict[str, list[int]] = {}

    def deal(self, name: str) -> Sequence[Any] | None:
        """Give each sample's part of an input; None where nothing says which sample it belongs to."""
        value = self.inputs[name]
        if isinstance(value, (bool, int, float, str)) or (isinstance(value, torch.Tensor) and not value.ndim):
            return [value] * len(self.ids)
        if not isinstance(value, torch.Tensor):
            return None
        if name not in _PIXELS and value.ndim < 4 and value.shape[-2:] == self.ids.shape:  # something of each token
            return [value[..., row, keep] for row, keep in enumerate(self.valid)]
        modality = "video" if "video" in name or name == "second_per_grid_ts" else "image"
        sized = [size for size in _SIZES[modality] if size in self.inputs]
        # Some processors fill every sample up to the tiles of the one with most.
        by_sample = self.adapted.family.images == "tiles" and modality == "image" and self._dimensions == 5
        if (by_sample or name not in _LAID) and len(value) == len(self.ids):
            parts: Sequence[torch.Tensor] = torch.split(value, 1)
        elif name in _LAID and (counts := self._counts(modality, sized, len(value))) is not None:
            parts = torch.split(value, counts)
        else:
            return None
        filled = name.startswith("pixel") and (by_sample or "image_sizes" in sized)
        return [_without_filling(part) for part in parts] if filled else parts

    @property
    def _dimensions(self) -> int:
        """Of the images' tensor; 0 if there is none."""
        return max((self.inputs[name].ndim for name in PIXELS["image"] if name in self.inputs), default=0)

    def _counts(self, modality: str, sized: Sequence[str], units: int) -> list[int] | None:
        """Count each sample's units; None where no known sizes of units fall on whole samples."""
        marked = self._marked(modality)
        tokens = marked.sum(1).tolist()
        if sum(map(bool, tokens)) == 1:
            return [units if own else 0 for own in tokens]
        for sizes in self._sizes(modality, sized, marked, units):
            if len(sizes) == units and (counts := _whole_units(sizes, tokens)) is not None:
                return counts
        return None

    def _marked(self, modality: str) -> torch.Tensor:
        """Mark a modality's visual tokens, [B, N]; some models mark a video's frames as images."""
        known = [self.adapted.token_ids[name] for name in (modality, "image") if name in self.adapted.token_ids]
        marked = [(self.ids == token) & self.valid for token in known]
        return next((own for own in marked if bool(own.any())), marked[-1])

    def _sizes(self, modality: str, sized: Sequence[str], marked: torch.Tensor, units: int) -> Iterator[list[int]]:
        """Give the tokens of each unit, or their proportions: the surest way first, the most expensive one last."""
        tokens = marked.sum(1)
        known = bool(self.adapted.family.model_type)
        yield tokens[tokens > 0].tolist()  # where there are no more units than samples, each has one
        for name in sized:
            value = self.inputs[name]
            # From the sizes of images that are cut into tiles only the model can count tokens.
            if getattr(value, "ndim", 0) == 2 and (name != "image_sizes" or (known and self._dimensions == 4)):
                yield value.prod(1).tolist()
        if units % max(int(tokens.sum()), 1) == 0 or (known and not sized):  # patches; tiles, or images of one size
            yield [1] * units
        runs = images_of(marked)
        yield torch.cat([own[own >= 0].bincount() for own in runs]).tolist()
        if modality not in self._lengths:
            call = to_model({"input_ids": self.ids, **self.inputs}, self.adapted.model)
            self._lengths[modality] = feature_lengths(self.adapted, call, modality)
        yield self._lengths[modality]


def _whole_units(sizes: list[int], tokens: list[int]) -> list[int] | None:
    """Count the units that each sample's tokens belong to; None unless every sample has whole units.

    Args:
        sizes: of each unit, in tokens or in proportion to them.
        tokens: of each sample.
    """
    unit, sample = np.array(sizes, dtype=np.int64), np.array(tokens, dtype=np.int64)
    size, total = int(unit.sum()), int(sample.sum())
    if not total or unit.min() < 1 or (len(unit) < total and (unit * total % size).any()):
        return None
    ends = np.concatenate([[0], unit.cumsum()]) * total
    wanted = np.concatenate([[0], sample.cumsum()]) * size
    places = ends.searchsorted(wanted)
    counts: list[int] = np.diff(places).tolist()
    return counts if (ends[places] == wanted).all() else None


def _without_filling(part: torch.Tensor) -> torch.Tensor:
    """Cut zeros off the end of every axis but the first: they fill images of different sizes up to one tensor."""
    for axis in range(1, part.ndim):
        other = [n for n in range(part.ndim) if n != axis]
        last = (part != 0).sum(other).nonzero()
        part = part.narrow(axis, 0, int(last[-1]) + 1 if len(last) else 0)
    return part


def _update(digest: Any, name: str, value: Any) -> None:
    """Add a value to a hash, with its name and a tensor's shape; a square image needs none beside its bytes."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            _update(digest, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _update(digest, f"{name}.{number}", item)
    elif isinstance(value, torch.Tensor):
        if not (name in PIXELS["image"] and value.ndim == 4 and value.shape[2] == value.shape[3]):
            digest.update(json.dumps([name, list(value.shape)]).encode())
        digest.update(_bytes(value))
    else:
        digest.update(json.dumps([name, repr(value)]).encode())


def _as_tensor(value: Any) -> Any:
    """Turn numbers in lists or arrays to a tensor; leave all else."""
    if isinstance(value, (list, tuple, np.ndarray)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return torch.as_tensor(value)
    return value


def _bytes(value: torch.Tensor) -> bytes:
    """A tensor's values, the same from every device and for every dtype that holds them."""
    return (value.float() if value.is_floating_point() else value.long()).cpu().numpy().tobytes()
