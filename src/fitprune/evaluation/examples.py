"""Examples of a report: some samples with their picture, answers, and how long each visual token stays."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from fitprune._support.journal import Record
from fitprune.engine.prune import kept_positions
from fitprune.evaluation.entries import firsts
from fitprune.evaluation.run import Run, scorer_at
from fitprune.families.images import visual_mask

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
        The record, the scores of its answers, its picture as a `data:` URL, and how many layers each visual token
        enters under each method.
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
        picture.thumbnail((PICTURE, PICTURE))
        facts = {"scores": dict(scores.get(place, {})), "picture": _data_url(picture), "layers_entered": entered}
        yield {**records[place], **facts}


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
