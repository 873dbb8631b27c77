"""Examples of a report: some samples with their picture, answers, and how long each visual token stays."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from fitprune._support.journal import Record
from fitprune.engine.prune import kept_positions
from fitprune.evaluation.entries import firsts
from fitprune.evaluation.run import Run, scorer_at
from fitprune.families.images import visual_mask

PICTURE = 288  # longest side of an example's picture, pixels


def make_examples(run: Run, records: Sequence[Record], count: int) -> Iterator[dict[str, Any]]:
    """Describe `count` samples of different kinds.

    Args:
        run: the evaluation.
        records: all its answers, in order.
        count: number of examples.

    Yields:
        The record, its picture as a `data:` URL, and how many layers each visual token enters under each method.
    """
    samples = [sample for task in run.tasks.values() for sample in task]
    for place in _varied(records, count):
        inputs = run.inputs([samples[place]])
        visual = torch.nonzero(visual_mask(run.adapted, inputs["input_ids"])[0])[:, 0]
        entered = {}
        for entry in firsts(run.entries):
            layers = kept_positions(run.model, entry.recipe, inputs, scorer_at(entry, [place]))
            stays = torch.stack([torch.isin(visual, columns[0]) for columns in layers])
            entered[entry.label] = stays.sum(0).tolist()
        picture = samples[place].load_image()
        picture.thumbnail((PICTURE, PICTURE))
        yield {**records[place], "picture": _data_url(picture), "layers_entered": entered}


def _varied(records: Sequence[Record], count: int) -> list[int]:
    """Pick places, tasks and kinds of question in turn."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        by_kind.setdefault((record["task"], record["kind"]), []).append(place)
    columns = list(by_kind.values())
    turns = [column[turn] for turn in range(max(map(len, columns))) for column in columns if turn < len(column)]
    return sorted(turns[:count])


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
