"""`evaluate`: what recipes cost and what they keep, against the dense model on the same questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fitprune import files
from fitprune.adapters import adapt, visual_mask
from fitprune.batches import equal_batches
from fitprune.benchmark import prefill_seconds, time_ratios
from fitprune.calibration import Sample
from fitprune.measurement import provenance_of, to_model
from fitprune.pruning import prune
from fitprune.recipe import Cost, PruningRecipe
from fitprune.tables import aligned

SCHEMA = 1
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe's figures over all samples.

    Attributes:
        name: the recipe's name; "dense" is the model without pruning.
        accuracy: fraction of the samples with answers that are answered right; None where the data has no answers.
        agreement: fraction of all samples answered as the dense model answers.
        accuracy_by_kind: accuracy for each kind of question.
        cost: figures of the cost model, for the first sample's token counts.
        prefill_time_ratio: measured prefill time against dense in the same run; None where it was not timed.
    """

    name: str
    accuracy: float | None
    agreement: float
    accuracy_by_kind: dict[str, float]
    cost: Cost
    prefill_time_ratio: float | None


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found.

    Attributes:
        rows: dense first, then one for each recipe.
        answers: for each sample, its id, question, accepted answers, and the answer under each row's name.
        provenance: model, versions and sizes.
    """

    rows: tuple[Row, ...]
    answers: tuple[dict[str, Any], ...]
    provenance: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON, whole or not at all.

        Raises:
            OSError: `path` cannot be written.
        """
        data = {
            "schema": SCHEMA,
            "provenance": dict(self.provenance),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "answers": list(self.answers),
        }
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n")


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    recipes: Mapping[str, PruningRecipe],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    prompt_template: str | None = None,
    timed_batches: int = 3,
    progress: bool = False,
) -> Results:
    """Answer every question with the dense model and with each recipe, greedily.

    An answer is right if, stripped and in lower case, it is one of the accepted ones.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        processor: its processor.
        samples: questions; accuracy needs answers, agreement does not.
        recipes: name -> recipe.
        batch_size: samples in a batch; only samples of one shape share a batch.
        max_new_tokens: longest answer.
        prompt_template: see `fitprune.batches.format_prompt`.
        timed_batches: batches whose prefill is timed, dense and pruned in turn; 0 for none.
        progress: show a progress bar.

    Raises:
        ValueError: there is no sample, a recipe is called "dense" or is of another model, or an image is bad.
    """
    if not samples:
        raise ValueError("samples is empty: there must be at least one question to evaluate")
    if DENSE in recipes:
        raise ValueError(f"recipes has a recipe named {DENSE!r}: that name stands for the model without pruning")
    adapted = adapt(model)
    for name, recipe in recipes.items():
        recipe.model.require_same(adapted.shape, what=f"recipe {name!r}")
    columns: dict[str, PruningRecipe | None] = {DENSE: None, **recipes}
    said: dict[str, dict[int, str]] = {name: {} for name in columns}
    seconds: list[list[float]] = [[] for _ in columns]
    sizes: tuple[int, int, int, int] | None = None
    batches = equal_batches(samples, processor, batch_size=batch_size, prompt_template=prompt_template)
    with tqdm(total=len(samples), desc="evaluate", unit="question", disable=not progress) as bar:
        for number, (indices, batch) in enumerate(batches):
            inputs = to_model(batch, model)
            if sizes is None:
                sizes = _sizes(visual_mask(adapted, inputs["input_ids"])[0], inputs)
            for name, used in columns.items():
                context = contextlib.nullcontext() if used is None else prune(model, used)
                with torch.inference_mode(), context:
                    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
                texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                said[name].update({i: text.strip() for i, text in zip(indices, texts, strict=True)})
            if number < timed_batches:
                for kept, new in zip(seconds, prefill_seconds(model, inputs, list(columns.values())), strict=True):
                    kept += new
            bar.update(len(indices))
    assert sizes is not None
    ratios: Sequence[float | None] = time_ratios(seconds) if seconds[0] else [None] * len(columns)
    rows = []
    for (name, used), ratio in zip(columns.items(), ratios, strict=True):
        priced = used or PruningRecipe.dense(adapted.shape, sizes[0])
        cost = priced.cost(
            visual_tokens=sizes[0], text_before=sizes[1], text_tokens=sizes[2], crops=sizes[3],
            value_bytes=model.dtype.itemsize,
        )  # fmt: skip
        accuracy, by_kind = _accuracy(samples, said[name])
        agreement = sum(said[name][i] == said[DENSE][i] for i in range(len(samples))) / len(samples)
        rows.append(Row(name, accuracy, agreement, by_kind, cost, ratio))
    answers = tuple(
        {
            "id": s.id,
            "kind": s.kind,
            "question": s.text,
            "accepted": list(s.answers),
            "said": {n: said[n][i] for n in said},
        }
        for i, s in enumerate(samples)
    )
    provenance = {**provenance_of(model), "samples": len(samples), "batch_size": batch_size}
    return Results(tuple(rows), answers, provenance)


def table(results: Results) -> str:
    """Format the rows for people; fractions become percent here and only here."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    lines = [("", "FLOPs cut", "tokens/layer", "tokens left", "KV bytes", "accuracy", "agreement", "prefill time")]
    for row in results.rows:
        ratio = "-" if row.prefill_time_ratio is None else f"{row.prefill_time_ratio:.2f}x"
        cost = row.cost
        counts = (f"{cost.mean_visual_tokens:.1f}", str(cost.kept[-1]), f"{cost.kv_bytes:,}")
        accuracy, agreement = percent(row.accuracy), percent(row.agreement)
        lines.append((row.name, percent(cost.flops_reduction), *counts, accuracy, agreement, ratio))
    return aligned(lines)


def kind_table(results: Results) -> str:
    """Format the accuracy on each kind of question, a column for each row of the results."""
    lines = [("accuracy on", *(row.name for row in results.rows))]
    for kind in results.rows[0].accuracy_by_kind:
        lines.append((kind, *(f"{100 * row.accuracy_by_kind[kind]:.1f}%" for row in results.rows)))
    return aligned(lines)


def _sizes(visual: torch.Tensor, inputs: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Visual tokens, text tokens before the image, all text tokens, and image crops, of the first sample."""
    where = torch.nonzero(visual)[:, 0]
    pixels = inputs["pixel_values"]
    crops = pixels.shape[1] if pixels.ndim == 5 else 1
    return len(where), int(where[0]) if len(where) else 0, len(visual) - len(where), crops


def _accuracy(samples: Sequence[Sample], said: Mapping[int, str]) -> tuple[float | None, dict[str, float]]:
    """Accuracy over the samples that have answers, whole and for each kind of question."""
    right: dict[str, list[bool]] = {}
    for index, sample in enumerate(samples):
        if sample.answers:
            accepted = {answer.strip().lower() for answer in sample.answers}
            right.setdefault(sample.kind, []).append(said[index].lower() in accepted)
    every = [hit for hits in right.values() for hit in hits]
    by_kind = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items()) if kind}
    return (sum(every) / len(every) if every else None), by_kind
