"""Examples of a report: some samples with their picture, answers, and how long each visual token stays."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from fitprune._support.journal import Record
from fitprune.calibration.samples import Sample
from fitprune.engine.prune import kept_positions
from fitprune.evaluation.entries import firsts
from fitprune.evaluation.run import Run, scorer_at
from fitprune.families.grids import token_grids
from fitprune.families.images import visual_mask
from fitprune.pictures.kept import KeptImage
from fitprune.pictures.views import views_of

PICTURE = 288  # longest side of an example's picture, pixels


def make_examples(
    run: Run, records: Sequence[Record], scores: Mapping[int, Mapping[str, float]], count: int
) -> Iterator[dict[str, Any]]:
    """Describe `count` samples of different kinds, of those with an image.

    Args:
        run: the evaluation.
        records: all its answers, in order.
        scores: place -> label -> the answer's score, of questions with accepted answers.
        count: number of examples.

    Yields:
        The record, the scores of its answers, its picture as a `data:` URL with its size, the views of it that the
        visual tokens have (empty where they lie on no known grid), and how many layers each visual token enters under
        each method.
    """
    questions = list(run.questions())
    for place in _varied([records[place] for place, _, sample in questions if sample.image is not None], count):
        _, task, sample = questions[place]
        inputs = run.inputs(task, [sample])
        visual = torch.nonzero(visual_mask(run.adapted, inputs["input_ids"])[0])[:, 0]
        entered = {}
        for entry in firsts(run.entries):
            layers = kept_positions(run.model, entry.recipe, inputs, scorer_at(entry, [place]))
            stays = torch.stack([torch.isin(visual, columns[0]) for columns in layers])
            entered[entry.label] = stays.sum(0).tolist()
        picture = sample.load_image()
        views = _views(run, task, sample, inputs, picture)
        picture.thumbnail((PICTURE, PICTURE))
        yield {
            **records[place],
            "scores": dict(scores.get(place, {})),
            "picture": _data_url(picture),
            "size": list(picture.size),
            "views": views,
            "layers_entered": entered,
        }


def _views(
    run: Run, task: str, sample: Sample, inputs: Mapping[str, Any], picture: Image.Image
) -> list[dict[str, Any]]:
    """Say where the visual tokens lie in the picture, in fractions of its sides; nothing where that is not known."""

    def inputs_of(other: Image.Image) -> dict[str, Any]:
        return run.inputs(task, [dataclasses.replace(sample, image=other)])

    try:
        ((grids,),) = token_grids(run.model, inputs, inputs_of, [picture])
        views = views_of(KeptImage(grids, torch.zeros(0), 0), 1, 1)
    except ValueError:
        return []
    return [
        {
            "name": view.name,
            "extent": [round(side, 4) + 0.0 for side in view.extent],
            "grids": [
                {"box": [round(side, 4) + 0.0 for side in box], "tokens": grid.tokens.tolist()}
                for grid, box in view.grids
            ],
        }
        for view in views
    ]


def _varied(records: Sequence[Record], count: int) -> list[int]:
    """Pick places, tasks and kinds of question in turn."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    for record in records:
        by_kind.setdefault((record["task"], record["kind"]), []).append(record["place"])
    columns = list(by_kind.values())
    turns = [
        column[turn] for turn in range(max(map(len, columns), default=0)) for column in columns if turn < len(column)
    ]
    return sorted(turns[:count])


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
