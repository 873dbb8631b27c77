"""Answer one batch of questions with the dense model and with each method, greedily, as records of the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune._support.journal import Record
from fitprune.evaluation.entries import Entry
from fitprune.evaluation.run import Question, Run
from fitprune.evaluation.summary import DENSE
from fitprune.families.adapter import AdaptedModel
from fitprune.families.clip_tower import crops_of
from fitprune.families.images import visual_mask
from fitprune.output_search.divergence import kl

MOST_DIVERGENCE = 1e6  # nats; stands for an infinite one, which JSON cannot hold


def answer_batch(run: Run, batch: Sequence[Question], known: Mapping[int, Record]) -> list[Record]:
    """Answer one batch with every method that the records of an earlier run lack: a record for each sample.

    Args:
        run: the evaluation.
        batch: the questions.
        known: place -> record of an earlier run, which may lack methods.

    Raises:
        ValueError: logits are NaN.
    """
    places = [place for place, _, _ in batch]
    earlier = [known[place] for place in places if place in known]
    entries = list(run.entries)
    if len(earlier) == len(batch):  # dense answers again all the same: divergences are from it
        entries = [entry for entry in entries if not all(entry.label in record["said"] for record in earlier)]
    task = batch[0][1]
    inputs = run.inputs(task, [sample for _, _, sample in batch])
    has_image = batch[0][2].image is not None
    answers: list[dict[str, str]] = [{} for _ in batch]
    divergences: list[dict[str, float]] = [{} for _ in batch]
    dense: torch.Tensor | None = None
    for entry in [None, *entries]:
        name = DENSE if entry is None else entry.label
        if dense is None or has_image:  # without an image nothing is removed: every method answers as dense does
            texts, first = _answer(run, inputs, entry, places, run.max_new_tokens[task])
        dense = first if dense is None else dense
        if bool((broken := first.isnan().any(1)).any()):
            sample = batch[int(broken.int().argmax())][2]
            dtype = run.model.dtype
            raise ValueError(
                f"{name}: logits of sample {sample.id} are NaN in {dtype}: use another dtype, such as bfloat16"
            )
        divergence = kl(dense, first).clamp(0, MOST_DIVERGENCE).tolist()
        for row, (text, distance) in enumerate(zip(texts, divergence, strict=True)):
            answers[row][name] = text.strip()
            divergences[row][name] = round(distance, 6)
    return [
        {
            "place": place,
            "task": task,
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.text,
            "accepted": list(sample.answers),
            "sizes": size,
            "said": {**known.get(place, {}).get("said", {}), **answers[row]},
            "divergence": {**known.get(place, {}).get("divergence", {}), **divergences[row]},
        }
        for row, ((place, task, sample), size) in enumerate(zip(batch, prompt_sizes(run.adapted, inputs), strict=True))
    ]


def _answer(
    run: Run, inputs: Mapping[str, Any], entry: Entry | None, places: Sequence[int], max_new_tokens: int
) -> tuple[list[str], torch.Tensor]:
    """Answer greedily; returns the texts and the log-probabilities [batch, vocabulary] of each first token."""
    with torch.inference_mode(), run.pruned(entry, places):
        output = run.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = run.processor.batch_decode(answers, skip_special_tokens=True)
    return texts, output.logits[0].float().log_softmax(-1)


def prompt_sizes(adapted: AdaptedModel, inputs: Mapping[str, Any]) -> list[list[int]]:
    """Count for each sample: visual tokens, text tokens before the image, all text tokens, and image crops."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    crops = crops_of(adapted, inputs.get("image_sizes"), len(ids))
    sizes = []
    for row, visual in enumerate(visual_mask(adapted, ids)):
        own = visual if mask is None else visual[mask[row].bool()]
        where = torch.nonzero(own)[:, 0]
        sizes.append([len(where), int(where[0]) if len(where) else 0, len(own) - len(where), crops[row]])
    return sizes
