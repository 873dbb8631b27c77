"""A latency profile: seconds of the parts of a model's prefill on one device, by the number of tokens. Data.

It predicts the time of a pruned prefill, and so lets a recipe be fitted to a latency. `fitprune.speed.profiling` makes
it.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune._support import checked, files
from fitprune._support.messages import short
from fitprune.costs.counts import Counts
from fitprune.costs.sizes import MOST_TOKENS, ModelFingerprint

FORMAT = "fitprune-profile-1"
MOST_SECONDS = 1e6


@dataclasses.dataclass(frozen=True)
class LatencyProfile:
    """Seconds of a prefill's parts, of one model on one device.

    Attributes:
        model: the model.
        tokens: measured numbers of tokens of a sample, visual and text together; ascending.
        mixer_seconds: for each of them, one layer's attention with its norms (or what a layer has instead), mean over
            layers.
        mlp_seconds: for each, one layer's MLP, mean over layers.
        removal_seconds: for each, scoring and removing tokens inside one layer.
        outside_seconds: a prefill's time outside of the layers: vision tower, projector, embeddings, head.
        visual_tokens: of the prompt whose length is the last of `tokens`.
        text_tokens: of that prompt.
        batch: samples run together.
        device: its name, and the number of threads of a CPU.
        dtype: of the weights.
        provenance: versions, date.

    Raises:
        ValueError: a list is empty, lengths differ, token counts do not ascend, or a time is not positive and finite.
    """

    model: ModelFingerprint
    tokens: tuple[int, ...]
    mixer_seconds: tuple[float, ...]
    mlp_seconds: tuple[float, ...]
    removal_seconds: tuple[float, ...]
    outside_seconds: float
    visual_tokens: int
    text_tokens: int
    batch: int = 1
    device: str = ""
    dtype: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        seconds = ("mixer_seconds", "mlp_seconds", "removal_seconds")
        for name in ("tokens", *seconds):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self.tokens) or not self.tokens:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries: must be one for each of the {len(self.tokens)} "
                    "token counts, and at least one; profile again"
                )
        for name in ("visual_tokens", "text_tokens", "batch"):
            checked.whole(name, getattr(self, name), 1, MOST_TOKENS, "; profile again")
        for place, count in enumerate(self.tokens):
            checked.whole(f"tokens[{place}]", count, 1, MOST_TOKENS, "; profile again")
        if list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError(f"tokens={short(list(self.tokens))}: must be ascending; profile again")
        _require_seconds("outside_seconds", (self.outside_seconds,))
        for name in seconds:
            _require_seconds(name, getattr(self, name))

    def __repr__(self) -> str:
        return (
            f"LatencyProfile({self.model.model_type} on {self.device or 'an unnamed device'}, batches of {self.batch}, "
            f"{self.visual_tokens} visual and {self.text_tokens} text tokens, measured up to {self.tokens[-1]})"
        )

    def prefill_seconds(
        self,
        visual_tokens: int,
        kept: Sequence[float],
        entering: Sequence[float] | None = None,
        *,
        text_tokens: int | None = None,
        scoring: bool = True,
    ) -> float:
        """Predict the seconds of one prefill of a batch.

        Args:
            visual_tokens: visual tokens of each prompt.
            kept: visual tokens left after each layer.
            entering: visual tokens that enter each layer; by default those that the one before it kept.
            text_tokens: text tokens of each prompt; by default those that were measured.
            scoring: whether scoring and removing take time; without, this is the ideal.

        Raises:
            ValueError: the prompt is longer than what was measured.
        """
        text = self.text_tokens if text_tokens is None else text_tokens
        counts = Counts(visual_tokens, kept, entering or ())  # type: ignore[arg-type]  # fractional in a fit
        total = self.outside_seconds
        for enters, left in zip(counts.entering, counts.kept, strict=True):
            total += self.seconds_at(self.mixer_seconds, enters + text) + self.seconds_at(self.mlp_seconds, left + text)
            if scoring and left < enters:
                total += self.seconds_at(self.removal_seconds, enters + text)
        return total

    def dense_seconds(self, visual_tokens: int, *, text_tokens: int | None = None) -> float:
        """Predict the seconds of the dense prefill; as for `prefill_seconds`."""
        return self.prefill_seconds(visual_tokens, [visual_tokens] * self.model.decoder.layers, text_tokens=text_tokens)

    def seconds_at(self, seconds: Sequence[float], tokens: float) -> float:
        """Interpolate one of the lists; below the first count, give its time: the weights must be read anyway.

        Args:
            seconds: one for each of `self.tokens`.
            tokens: how many there are.

        Raises:
            ValueError: `tokens` is above the last count.
        """
        if tokens > self.tokens[-1]:
            raise ValueError(
                f"a prompt of {tokens:g} tokens: the profile was measured up to {self.tokens[-1]}; profile longer ones"
            )
        return interpolated(self.tokens, seconds, tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all.

        Args:
            path: the file.

        Raises:
            OSError: `path` cannot be written.
        """
        data = {"format": FORMAT, **dataclasses.asdict(self), "model": self.model.to_dict()}
        files.write_json(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyProfile:
        """Read `save`'s file.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is truncated, or no profile of this format.
        """
        files.require_path(path)
        if not Path(path).exists():
            raise files.missing(path, files.PROFILE)
        try:
            data = files.parse_json(files.read_text(path))
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            return cls(**{**data, "model": ModelFingerprint.from_dict(data["model"])})
        except (ValueError, TypeError, KeyError) as error:
            reason = str(error).removesuffix("; profile again")
            why = ValueError(f"not readable as a latency profile ({reason}); profile again")
            raise ValueError(files.explained(path, files.PROFILE, why)) from None


def interpolated(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Read a value between those at ascending `points`; before the first and after the last it is theirs."""
    right = bisect.bisect_left(points, at)
    if right in (0, len(points)):
        return values[min(right, len(points) - 1)]
    low, high = points[right - 1], points[right]
    return values[right - 1] + (at - low) / (high - low) * (values[right] - values[right - 1])


def _require_seconds(name: str, values: Sequence[Any]) -> None:
    """Refuse what is no duration."""
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MOST_SECONDS:
            raise ValueError(f"{name} holds {short(value)}: must be seconds above 0; profile again")


def token_grid(longest: int) -> list[int]:
    """Choose token counts to measure up to `longest`.

    In pairs around multiples of 32, since matrix units take rows in blocks: one more token may cost a tenth more.
    """
    steps = [*range(32, 512, 32), *range(512, 1024, 128), *range(1024, 10**6, 256)]
    return sorted({16, longest, *(n + more for n in steps for more in (0, 1))} & set(range(1, longest + 1)))
