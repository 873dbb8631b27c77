"""What an evaluation runs: the model, the questions, the methods, and how answers are generated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fitprune.benchmarks.base import Benchmark
from fitprune.calibration.batches import make_batches
from fitprune.calibration.protocol import Protocol
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
        benchmarks: of the tasks that are one, task name -> benchmark.
        entries: the methods.
        batch_size: samples in a batch.
        max_new_tokens: longest answer of each task.
        prompt_template: see `fitprune.calibration.prompts.format_prompt`.
        protocol: how a benchmark's questions become prompts.
    """

    adapted: AdaptedModel
    processor: Any
    tasks: Mapping[str, Sequence[Sample]]
    benchmarks: Mapping[str, Benchmark]
    entries: Sequence[Entry]
    batch_size: int
    max_new_tokens: Mapping[str, int]
    prompt_template: str | None
    protocol: Protocol | None

    @property
    def model(self) -> Any:
        """The model, without what may be wrapped around it."""
        return self.adapted.model

    @property
    def labels(self) -> list[str]:
        """Labels of the answers: dense first."""
        return [DENSE, *(entry.label for entry in self.entries)]

    def batches(self) -> list[list[Question]]:
        """Cut the tasks into batches; none holds two tasks, or questions with an image and without one."""
        batches: list[list[Question]] = []
        for _, questions in itertools.groupby(self.questions(), key=lambda question: question[1]):
            own = list(questions)
            for has_image in (True, False):
                part = [question for question in own if (question[2].image is not None) == has_image]
                batches += [part[start : start + self.batch_size] for start in range(0, len(part), self.batch_size)]
        return batches

    def questions(self) -> Iterator[Question]:
        """Number the questions of all tasks."""
        pairs = ((task, sample) for task, samples in self.tasks.items() for sample in samples)
        for place, (task, sample) in enumerate(pairs):
            yield place, task, sample

    def inputs(self, task: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make one batch of a task's samples, on the model's device."""
        protocol = self.protocol if task in self.benchmarks and self.prompt_template is None else None
        options: dict[str, Any] = {"prompt_template": self.prompt_template, "model": self.model, "protocol": protocol}
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
            "tasks": {
                name: {
                    "samples": len(own),
                    "digest": _digest(own),
                    **({"protocol": str(self.protocol)} if name in self.benchmarks else {}),
                }
                for name, own in self.tasks.items()
            },
            "entries": {
                entry.label: [list(entry.recipe.entering), list(entry.recipe.keep), dict(entry.recipe.scorer)]
                for entry in self.entries
            },
            "batch_size": self.batch_size,
            "max_new_tokens": dict(self.max_new_tokens),
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
    """Digest the questions and their pictures; of several questions about one file, it is decoded once."""
    digest = hashlib.sha256()
    files: dict[Path, tuple[Any, bytes]] = {}
    for sample in samples:
        known = files.get(sample.image) if isinstance(sample.image, Path) else None
        size, pixels = known or _picture(sample)
        if isinstance(sample.image, Path):
            files[sample.image] = size, pixels
        digest.update(json.dumps([sample.id, sample.text, list(sample.answers), sample.kind, size]).encode())
        digest.update(pixels)
    return digest.hexdigest()[:16]


def _picture(sample: Sample) -> tuple[Any, bytes]:
    """Decode a sample's picture: its size, and the hash of its pixels; None and nothing without one."""
    if sample.image is None:
        return None, b""
    image = sample.load_image()
    return image.size, hashlib.sha256(image.tobytes()).digest()
