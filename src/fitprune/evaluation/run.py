"""What an evaluation runs: the model, the questions, the methods, and how answers are generated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune.calibration.batches import make_batches
from fitprune.calibration.samples import Sample
from fitprune.engine.prune import prune
from fitprune.evaluation.entries import Entry
from fitprune.evaluation.summary import DENSE
from fitprune.families.adapter import AdaptedModel
from fitprune.families.inputs import to_model
from fitprune.families.provenance import provenance_of
from fitprune.scoring.scorers import Scorer, get_scorer
from fitprune.scoring.view import LayerView

Question = tuple[int, str, Sample]  # its place in the journal, its task, and the sample


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        adapted: the model.
        processor: its processor.
        tasks: task name -> questions.
        entries: the methods.
        batch_size: samples in a batch.
        max_new_tokens: longest answer.
        prompt_template: see `fitprune.calibration.prompts.format_prompt`.
    """

    adapted: AdaptedModel
    processor: Any
    tasks: Mapping[str, Sequence[Sample]]
    entries: Sequence[Entry]
    batch_size: int
    max_new_tokens: int
    prompt_template: str | None

    @property
    def model(self) -> Any:
        """The model, without what may be wrapped around it."""
        return self.adapted.model

    @property
    def labels(self) -> list[str]:
        """Labels of the answers: dense first."""
        return [DENSE, *(entry.label for entry in self.entries)]

    def batches(self) -> list[list[Question]]:
        """Cut the tasks into batches of questions; no batch holds two tasks."""
        batches, place = [], 0
        for task, samples in self.tasks.items():
            for start in range(0, len(samples), self.batch_size):
                chunk = samples[start : start + self.batch_size]
                batches.append([(place + offset, task, sample) for offset, sample in enumerate(chunk)])
                place += len(chunk)
        return batches

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make one batch, on the model's device."""
        options = {"prompt_template": self.prompt_template, "model": self.model}
        return to_model(next(make_batches(samples, self.processor, batch_size=len(samples), **options)), self.model)

    def pruned(self, entry: Entry | None, places: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        """Open the block in which an entry prunes the samples at these places; None is the dense model."""
        if entry is None:
            return contextlib.nullcontext()
        return prune(self.model, entry.recipe, scorer_at(entry, places))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that the answers depend on, as plain data; every image is decoded, so that a bad one is found now."""
        model = self.model
        images: Any = getattr(self.processor, "image_processor", None)
        # How images are preprocessed and how answers are generated: both can be set without another model.
        image_settings = images.to_json_string() if hasattr(images, "to_json_string") else type(images).__name__
        settings = f"{image_settings}\n{model.generation_config.to_json_string(ignore_metadata=True)}"
        parts = (self.processor, getattr(self.processor, "tokenizer", None))  # where a chat template may be
        templates = [self.prompt_template, *(getattr(part, "chat_template", None) for part in parts)]
        return {
            **provenance_of(model),
            "attention": str(getattr(model.config, "_attn_implementation", "")),
            "tasks": {name: {"samples": len(own), "digest": _digest(own)} for name, own in self.tasks.items()},
            "entries": {
                entry.label: [list(entry.recipe.entering), list(entry.recipe.keep), dict(entry.recipe.scorer)]
                for entry in self.entries
            },
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "prompt_template": next(filter(None, templates), None),
            "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        }


@dataclasses.dataclass(frozen=True)
class _AtPlaces(Scorer):
    """A scorer that draws by its samples' places, not by their questions."""

    places: tuple[int, ...] = ()

    def __call__(self, view: LayerView) -> torch.Tensor:
        view.prompt.numbers = list(self.places)
        return super().__call__(view)


def scorer_at(entry: Entry, places: Sequence[int]) -> Scorer:
    """Make the recipe's scorer for the samples at these places: at random it draws by place, not by question."""
    return _AtPlaces(**vars(get_scorer(entry.recipe.scorer)), places=tuple(places))


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        image = sample.load_image()
        digest.update(json.dumps([sample.id, sample.text, list(sample.answers), sample.kind, image.size]).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:16]
