"""Attention statistics of a calibration set: their form in memory and on disk. Knows no model.

Samples may differ in visual-token count, so the tokens of all samples follow each other in one dimension.
Legend: L layers, S samples, T visual tokens of all samples together.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fitprune._support import checked, files, text_tables
from fitprune.costs.sizes import ModelFingerprint

logger = logging.getLogger(__name__)

FORMAT = "fitprune-stats-1"


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionStats:
    """Received attention of every visual token, layer by layer, for each calibration sample.

    Attributes:
        self_attention: [L, T] fp32, mean over the sample's visual query rows, maximum over heads.
        cross_attention: [L, T] fp32, mean over the text query rows after the image.
        visual_tokens: [S] visual tokens of each sample; they sum to T.
        text_tokens: [S] text tokens of each sample.
        digests: [S] SHA-256 of each sample's inputs, so that a run can be continued and equal samples are found.
        model: the model that was measured.
        provenance: how it was measured.

    Raises:
        ValueError: the parts disagree in size, or a value is negative or not finite.
    """

    self_attention: torch.Tensor
    cross_attention: torch.Tensor
    visual_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    digests: tuple[str, ...]
    model: ModelFingerprint
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _FIELDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is a {type(value).__name__}: must be a {kind.__name__}")
        for name, least in (("visual_tokens", 1), ("text_tokens", 0)):
            if any(type(n) is not int or n < least for n in getattr(self, name)):
                raise ValueError(f"{name} holds something else than counts of at least {least}: measure again")
        if not all(isinstance(digest, str) for digest in self.digests):
            raise ValueError("digests holds something else than strings: measure again")
        shape = (self.model.decoder.layers, sum(self.visual_tokens))
        for name in ("self_attention", "cross_attention"):
            values = getattr(self, name)
            if not values.is_floating_point():
                raise ValueError(f"{name} is {values.dtype}: must be floating point")
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"{name} is {tuple(values.shape)}: must be [layers, visual tokens of all samples] = {shape}"
                )
            if not values.numel():
                continue
            lowest, highest = map(float, values.aminmax())  # NaN if one is; no copy of what may be large
            if not 0 <= lowest <= highest < float("inf"):
                raise ValueError(
                    f"{name} holds negative or non-finite values: measure again, in another dtype if in fp16"
                )
        if not len(self.visual_tokens) == len(self.text_tokens) == len(self.digests):
            raise ValueError("visual_tokens, text_tokens and digests differ in length: must be one for each sample")

    def __repr__(self) -> str:
        counts = sorted(set(self.visual_tokens)) or [0]
        each = f"{counts[0]}..{counts[-1]}" if len(counts) > 1 else str(counts[0])
        name = str(self.provenance.get("model", self.model.model_type))[-40:]
        return (
            f"AttentionStats({name}: {text_tables.plural(len(self), 'sample')}, {each} visual tokens, "
            f"{self.model.decoder.layers} layers)"
        )

    def _repr_html_(self) -> str:
        sums = [values.sum(1).tolist() for values in (self.self_attention, self.cross_attention)]
        most = [max(*layers, 1e-30) for layers in sums]
        samples = max(len(self), 1)
        rows = [
            (str(layer), f"{own / samples:.3f}", own / most[0], f"{cross / samples:.3f}", cross / most[1])
            for layer, (own, cross) in enumerate(zip(*sums, strict=True))
        ]
        return text_tables.bars(repr(self), ("layer", "received self attention", "", "cross", ""), rows)

    def __len__(self) -> int:
        return len(self.visual_tokens)

    @property
    def usual_visual_tokens(self) -> int:
        """The most common number of visual tokens of a sample, the larger one of two equally common."""
        return max(Counter(self.visual_tokens).items(), key=lambda item: item[::-1])[0]

    def select(self, samples: Sequence[int]) -> AttentionStats:
        """Select samples by number, from 0; a ValueError says that there is no such sample."""
        for number in samples:
            checked.whole("sample", number, 0, len(self) - 1)
        ends = torch.tensor(self.visual_tokens).cumsum(0).tolist()
        picked = [torch.arange(ends[i] - self.visual_tokens[i], ends[i]) for i in samples]
        index = torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)
        return dataclasses.replace(
            self,
            self_attention=self.self_attention[:, index],
            cross_attention=self.cross_attention[:, index],
            visual_tokens=tuple(self.visual_tokens[i] for i in samples),
            text_tokens=tuple(self.text_tokens[i] for i in samples),
            digests=tuple(self.digests[i] for i in samples),
        )

    @classmethod
    def concat(cls, parts: Iterable[AttentionStats]) -> AttentionStats:
        """Put statistics of one model together, in order; the log says how many samples are left out.

        A sample that an earlier part has too is left out. Samples that are equal within one part stay, as in `measure`:
        there each row of the data counts.

        Args:
            parts: statistics, such as those of several runs.

        Raises:
            ValueError: there is no part, or the parts are of different models.
        """
        known: set[str] = set()
        kept, left_out = [], 0
        for part in _checked(parts):
            new = [number for number, digest in enumerate(part.digests) if digest not in known]
            left_out += len(part) - len(new)
            known.update(part.digests)
            kept.append(part if len(new) == len(part) else part.select(new))
        whole = join(kept)
        if left_out:
            logger.warning(
                "%d of %d samples are in earlier statistics too and are left out: %d are left",
                left_out, len(whole) + left_out, len(whole),
            )  # fmt: skip
        return whole

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or, with an OSError, not at all; the same statistics give the same bytes."""
        tensors = {
            "self_attention": self.self_attention.contiguous(),
            "cross_attention": self.cross_attention.contiguous(),
            "visual_tokens": torch.tensor(self.visual_tokens, dtype=torch.int64),
            "text_tokens": torch.tensor(self.text_tokens, dtype=torch.int64),
        }
        metadata = {
            "format": FORMAT,
            "model": json.dumps(self.model.to_dict()),
            "digests": json.dumps(self.digests),
            "provenance": json.dumps(dict(self.provenance)),
        }
        with files.replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:  # how safetensors says that the disk is full
                raise OSError(28, str(error)) from error
            _sort_metadata(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionStats:
        """Read `save`'s file; a ValueError says what is wrong with it, or what else it is."""
        files.require_path(path)
        if not Path(path).is_file():
            raise files.missing(path, files.STATISTICS)
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r}, must be {FORMAT!r}; not of this version")
                model = ModelFingerprint.from_dict(files.parse_json(metadata["model"]))
                digests = tuple(files.parse_json(metadata["digests"]))
                _require_shapes(opened, model.decoder.layers, len(digests))
                tensors = {name: opened.get_tensor(name) for name in _TENSORS}
                provenance = files.parse_json(metadata["provenance"])
            self_attention, cross_attention, visual, text = (tensors[name] for name in _TENSORS)
            counts = tuple(visual.tolist()), tuple(text.tolist())
            return cls(self_attention, cross_attention, *counts, digests, model, provenance)
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
            why = ValueError(f"not readable as statistics ({error}); truncated or foreign file, measure again")
            raise ValueError(files.explained(path, files.STATISTICS, why)) from None


_FIELDS: dict[str, type] = {
    "self_attention": torch.Tensor,
    "cross_attention": torch.Tensor,
    "visual_tokens": tuple,
    "text_tokens": tuple,
    "digests": tuple,
    "model": ModelFingerprint,
    "provenance": Mapping,
}
_TENSORS = ("self_attention", "cross_attention", "visual_tokens", "text_tokens")


def _require_shapes(opened: Any, layers: int, samples: int) -> None:
    """Refuse a file whose header contradicts itself, before anything of that size is read."""
    shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in _TENSORS}
    for name in _TENSORS[2:]:
        if shapes[name] != (samples,):
            raise ValueError(f"{name} is {shapes[name]}: must be [samples] = {(samples,)}")
    shape = (layers, int(opened.get_tensor("visual_tokens").sum()))
    for name in _TENSORS[:2]:
        if shapes[name] != shape:
            raise ValueError(f"{name} is {shapes[name]}: must be [layers, visual tokens of all samples] = {shape}")


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata: safetensors writes them in the order of a hash map, another one in each run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _checked(parts: Iterable[AttentionStats]) -> Iterator[AttentionStats]:
    """Refuse what is no statistics."""
    if isinstance(parts, AttentionStats) or not isinstance(parts, Iterable):
        raise ValueError(f"parts is {type(parts).__name__}: must be a list of them")
    for part in parts:
        if not isinstance(part, AttentionStats):
            raise ValueError(f"parts holds a {type(part).__name__}: must be AttentionStats, as of AttentionStats.load")
        yield part


def join(parts: Iterable[AttentionStats]) -> AttentionStats:
    """Join statistics of one model, all samples of all parts, in order; `AttentionStats.concat` leaves out repeats.

    Args:
        parts: statistics. An iterable that can be iterated again and loads each part on demand is read twice, so that
            no more than one part is in memory beside the result.

    Raises:
        ValueError: there is no part, or the parts are of different models.
    """
    parts = list(parts) if isinstance(parts, Iterator) else parts
    first: AttentionStats | None = None
    visual: list[int] = []
    text: list[int] = []
    digests: list[str] = []
    for part in _checked(parts):
        if first is None:
            first = part
        part.model.require_same(first.model, what="a part of the statistics")
        weights = [of.provenance.get("weights", "") for of in (first, part)]
        if all(weights) and weights[0] != weights[1]:
            raise ValueError(
                f"parts are of different weights ({weights[0]}, {weights[1]}), or of one model in two dtypes: measure "
                "with one model and dtype"
            )
        visual += part.visual_tokens
        text += part.text_tokens
        digests += part.digests
    if first is None:
        raise ValueError("parts is empty: must hold at least one AttentionStats")
    shape = (len(first.self_attention), sum(visual))
    self_attention, cross_attention = first.self_attention.new_empty(shape), first.cross_attention.new_empty(shape)
    begin = 0
    for part in parts:
        end = begin + sum(part.visual_tokens)
        self_attention[:, begin:end], cross_attention[:, begin:end] = part.self_attention, part.cross_attention
        begin = end
    return dataclasses.replace(
        first,
        self_attention=self_attention,
        cross_attention=cross_attention,
        visual_tokens=tuple(visual),
        text_tokens=tuple(text),
        digests=tuple(digests),
    )
