"""`evaluate`: what pruning methods cost and what they keep, against the dense model on the same questions.

Every method answers every question greedily, batch by batch; each sample's answers go to a journal at once, so that a
killed run continues. Figures are made from the journal at the end: they do not depend on how often it was killed, or on
how many processes ran.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fitprune._support.journal import Journal, Record
from fitprune._support.processes import Processes
from fitprune.baselines.table import BASELINES, make_method, parse_name
from fitprune.calibration.batches import make_batches
from fitprune.calibration.samples import Sample
from fitprune.costs.sizes import ModelFingerprint
from fitprune.engine.prune import kept_positions, prune
from fitprune.evaluation import results
from fitprune.evaluation.results import DENSE, Results
from fitprune.evaluation.rows import Entry, best_of, chosen_metrics, entries_of, firsts, grouped, judge, rows_of
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.clip_tower import crops_of, watching
from fitprune.families.images import visual_mask
from fitprune.families.inputs import to_model
from fitprune.families.provenance import provenance_of
from fitprune.fitting.budget import OutOfReach, checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.output_search.divergence import kl
from fitprune.recipes.recipe import PruningRecipe
from fitprune.recipes.rounding import require_tokens
from fitprune.scoring.scorers import Scorer, get_scorer
from fitprune.scoring.view import LayerView
from fitprune.speed.in_turn import decode_seconds, prefill_seconds, time_ratios

MOST_DIVERGENCE = 1e6  # nats; stands for an infinite one, which JSON cannot hold
PICTURE = 288  # longest side of an example's picture, pixels


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    methods: PruningRecipe | Mapping[str, PruningRecipe] | Sequence[PruningRecipe | Entry],
    *,
    metric: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    skipped: Sequence[Mapping[str, Any]] = (),
    batch_size: int = 8,
    max_new_tokens: int = 16,
    prompt_template: str | None = None,
    timed_batches: int = 1,
    examples: int = 0,
    progress: bool = False,
) -> Results:
    """Answer every question with the dense model and with each method, greedily, and compare.

    Under accelerate or torchrun the processes share the batches; the results are those of one process.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        processor: its processor.
        samples: questions, or task name -> questions; accuracy needs answers, agreement does not.
        methods: a recipe, or several in a list; name -> recipe; or entries as `entries_for` makes them. A recipe whose
            scorer draws at random draws anew for each sample, by its place, also where one question is asked of
            several images.
        metric: how answers are judged, a name of `fitprune.evaluation.metrics.METRICS`; None chooses for each task by
            its data: "vqa" for ten annotators' answers, else "normalized".
        journal: file for each sample's answers; a run that was killed goes on from it, and one with more methods
            answers with those alone. None keeps nothing.
        skipped: methods that could not be solved for a budget; passed on to the results.
        batch_size: samples in a batch.
        max_new_tokens: longest answer.
        prompt_template: see `fitprune.calibration.batches.format_prompt`.
        timed_batches: batches of each task whose prefill and decoding are timed, methods in turn; 0 for none.
        examples: samples, of different kinds, whose picture and kept tokens go into the results.
        progress: show a progress bar.

    Returns:
        The results; in a process other than the first, without rows.

    Raises:
        ValueError: there is no sample, a method is called "dense" or stands twice or is of another model, there is no
            such metric, the journal is of another run, an image is bad (all are looked at before the first answer), or
            logits are NaN.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("timed_batches", timed_batches, 0),
        ("examples", examples, 0),
    ):
        require_tokens(name, value, least)
    tasks = dict(samples) if isinstance(samples, Mapping) else {results.UNNAMED: samples}
    adapted = adapt(model)
    model = adapted.model
    entries, blind = readable(adapted, entries_of(methods))
    skipped = [*skipped, *blind]
    _require_sound(tasks, entries, adapted.fingerprint)
    names = chosen_metrics(tasks, metric)
    processes = Processes()
    if processes.count > 1 and journal is None:
        raise ValueError(f"{processes.count} processes gather their answers through a journal: state one")
    plan = _batches(tasks, batch_size)
    run = _run_of(model, processor, tasks, entries, batch_size, max_new_tokens, prompt_template)
    book = None
    if journal is not None:
        book = Journal(journal, run, _sound, processes.rank)
    records = book.done() if book else {}
    processes.wait()  # all have read before any writes
    if book:
        book.open()
    labels = _labels(entries)
    todo = [batch for batch in plan if not all(_whole(records.get(place), labels) for place, _, _ in batch)]
    total, own = sum(map(len, plan)), todo[processes.rank :: processes.count]
    before = total - sum(map(len, todo))
    mine = before + sum(map(len, own))  # of several processes, the bar shows the first's share
    quiet = not progress or processes.rank > 0
    with tqdm(desc="evaluate", initial=before, total=mine, unit="question", disable=quiet or None) as bar:
        for batch in own:
            said = _answer(model, processor, batch, entries, max_new_tokens, prompt_template, records)
            records.update({record["place"]: record for record in said})
            if book:
                book.append(said)
            bar.update(len(batch))
    processes.wait()
    if processes.rank > 0:
        return Results(())
    if book:
        records = {place: _of_labels(record, labels) for place, record in book.done().items() if place < total}
        book.finish([records[place] for place in range(total)])
    ordered = [records[place] for place in range(total)]
    timings = _timings(model, processor, tasks, entries, batch_size, prompt_template, timed_batches)
    parts = list(judge(names, metric is None, entries, ordered))
    return Results(
        rows=tuple(rows_of(adapted.fingerprint, parts, entries, model.dtype.itemsize)),
        best=tuple(best_of(parts, entries)),
        skipped=tuple(dict(entry) for entry in skipped),
        recipes={
            results.label(name, budget): json.loads(group[0].recipe.to_json())
            for name, budget, group in grouped(entries)
        },
        examples=tuple(_examples(model, processor, tasks, entries, ordered, examples, prompt_template)),
        provenance={name: value for name, value in run.items() if name != "entries"},
        answers=tuple(ordered),
        timings=timings,
        tasks=tuple(part.task for part in parts),
    )


def entries_for(
    names: Sequence[str], fitter: Fitter, budgets: Sequence[float], seeds: Sequence[int] = (0,)
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Solve methods for budgets.

    Args:
        names: methods, as `fitprune.baselines.table.make_method` takes them.
        fitter: statistics of the model.
        budgets: fractions of visual-token FLOPs to remove.
        seeds: for methods that draw at random.

    Returns:
        The entries, and for each method that cannot meet a budget: method, budget and reason.

    Raises:
        ValueError: there is no such method or parameter, or a budget is out of range.
    """
    entries: list[Entry] = []
    skipped: list[dict[str, Any]] = []
    for name in names:
        seeded = BASELINES[parse_name(name)[0]].seeded
        for budget in budgets:
            stated = checked_budget("flops_reduction", budget)
            try:
                for seed in seeds if seeded else (0,):
                    recipe = make_method(name, fitter, stated, seed=seed)
                    entries.append(Entry(name, recipe, budget, seed if seeded else None))
            except OutOfReach as error:
                skipped.append({"method": name, "budget": budget, "reason": str(error)})
    return entries, skipped


def _require_sound(tasks: Mapping[str, Sequence[Sample]], entries: Sequence[Entry], shape: ModelFingerprint) -> None:
    """Refuse what would be found out late."""
    for name, samples in tasks.items():
        wrong = [s for s in samples if not isinstance(s, Sample)] if isinstance(samples, Sequence) else [samples]
        if wrong:
            kind = type(wrong[0]).__name__
            raise ValueError(f"samples of {name!r}: {kind}, must be a list of Sample, as load_samples gives it")
    if not tasks or not all(tasks.values()):
        empty = [name for name, samples in tasks.items() if not samples]
        raise ValueError(f"samples is empty ({', '.join(empty) or 'no task'}): there must be at least one question")
    labels = _labels(entries)
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise ValueError(f"methods has {twice[0]!r} twice ({DENSE!r} is the model without pruning): rename one")
    for entry in entries:
        entry.recipe.model.require_same(shape, what=f"recipe {entry.label!r}")


def readable(adapted: AdaptedModel, entries: Sequence[Entry]) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Leave out methods that read a [CLS] token of the vision tower, where there is none; also says which and why."""
    reason = ""
    seeing = [entry for entry in entries if get_scorer(entry.recipe.scorer).reads_vision]
    if seeing:
        try:
            with watching(adapted):
                pass
        except ValueError as error:
            reason = str(error)
    left = seeing if reason else []
    out = [{"method": entry.name, "budget": entry.budget, "reason": reason} for entry in left]
    return [entry for entry in entries if entry not in left], out


def _labels(entries: Sequence[Entry]) -> list[str]:
    return [DENSE, *(entry.label for entry in entries)]


def _sound(record: Record) -> bool:
    """Whether a journal's record holds what figures are made of, for the methods that it names."""
    said, divergence, sizes = record.get("said"), record.get("divergence"), record.get("sizes")
    return (
        isinstance(said, dict)
        and isinstance(divergence, dict)
        and DENSE in said
        and said.keys() == divergence.keys()
        and all(isinstance(said[name], str) and isinstance(divergence[name], float) for name in said)
        and isinstance(sizes, list)
        and len(sizes) == 4
        and all(isinstance(record.get(name), str) for name in ("task", "kind", "question"))
        and isinstance(record.get("id"), (str, int))
        and isinstance(record.get("accepted"), list)
    )


def _whole(record: Record | None, labels: Sequence[str]) -> bool:
    """Whether a record is there and holds all methods."""
    return record is not None and all(label in record["said"] for label in labels)


def _of_labels(record: Record, labels: Sequence[str]) -> Record:
    """A record with these methods alone, in their order, so that it does not tell which run added which."""
    return {**record, **{part: {label: record[part][label] for label in labels} for part in ("said", "divergence")}}


def _run_of(
    model: Any,
    processor: Any,
    tasks: Mapping[str, Sequence[Sample]],
    entries: Sequence[Entry],
    batch_size: int,
    max_new_tokens: int,
    prompt_template: str | None,
) -> dict[str, Any]:
    """All that the answers depend on, as plain data."""

    def digest(samples: Sequence[Sample]) -> str:
        found = hashlib.sha256()
        for s in samples:  # decoded, so that a bad image is found now and not when its batch comes
            image = s.load_image()
            found.update(json.dumps([s.id, s.text, list(s.answers), s.kind, image.size]).encode())
            found.update(image.tobytes())
        return found.hexdigest()[:16]

    def named(entry: Entry) -> list[Any]:
        return [list(entry.recipe.entering), list(entry.recipe.keep), dict(entry.recipe.scorer)]

    parts = (processor, getattr(processor, "tokenizer", None))  # where a chat template may be
    template = prompt_template or next(filter(None, (getattr(part, "chat_template", None) for part in parts)), None)
    return {
        **provenance_of(model),
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "tasks": {name: {"samples": len(samples), "digest": digest(samples)} for name, samples in tasks.items()},
        "entries": {entry.label: named(entry) for entry in entries},
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "prompt_template": template,
        "settings": _settings(model, processor),
    }


def _settings(model: Any, processor: Any) -> str:
    """Hash how images are made ready, and how answers are generated: both can be set without another model."""
    images: Any = getattr(processor, "image_processor", None)
    said = [images.to_json_string() if hasattr(images, "to_json_string") else type(images).__name__]
    said.append(model.generation_config.to_json_string(ignore_metadata=True))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _batches(tasks: Mapping[str, Sequence[Sample]], batch_size: int) -> list[list[tuple[int, str, Sample]]]:
    """Cut the tasks into batches of (place in the journal, task, sample); no batch holds two tasks."""
    batches, place = [], 0
    for task, samples in tasks.items():
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            batches.append([(place + offset, task, sample) for offset, sample in enumerate(chunk)])
            place += len(chunk)
    return batches


def _inputs(model: Any, processor: Any, samples: Sequence[Sample], template: str | None) -> dict[str, Any]:
    batch = next(make_batches(samples, processor, batch_size=len(samples), prompt_template=template, model=model))
    return to_model(batch, model)


def _pruned(model: Any, entry: Entry | None, places: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
    """The block in which an entry's method works on the samples at these places; None is the dense model."""
    if entry is None:
        return contextlib.nullcontext()
    return prune(model, entry.recipe, _scorer(entry, places))


def _scorer(entry: Entry, places: Sequence[int]) -> Scorer:
    """The recipe's scorer; one that draws at random draws anew for every sample, also of one question asked twice."""
    scorer = get_scorer(entry.recipe.scorer)

    def score(view: LayerView) -> torch.Tensor:
        view.prompt.numbers = list(places)
        return scorer.score(view)

    return dataclasses.replace(scorer, score=score)


def _answer(
    model: Any,
    processor: Any,
    batch: Sequence[tuple[int, str, Sample]],
    entries: Sequence[Entry],
    max_new_tokens: int,
    template: str | None,
    before: Mapping[int, Record],
) -> list[Record]:
    """Answer one batch with every entry that the records of an earlier run lack: a record for each sample."""
    known = [before[place] for place, _, _ in batch if place in before]
    if len(known) == len(batch):  # dense comes anew all the same: divergences are from it
        entries = [entry for entry in entries if not all(entry.label in record["said"] for record in known)]
    inputs = _inputs(model, processor, [sample for _, _, sample in batch], template)
    sizes = _sizes(adapt(model), inputs)
    records: list[Record] = [
        {
            "place": place,
            "task": task,
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.text,
            "accepted": list(sample.answers),
            "sizes": size,
            "said": {},
            "divergence": {},
        }
        for (place, task, sample), size in zip(batch, sizes, strict=True)
    ]
    dense: torch.Tensor | None = None
    for entry in [None, *entries]:
        with torch.inference_mode(), _pruned(model, entry, [place for place, _, _ in batch]):
            made = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        first = made.logits[0].float().log_softmax(-1)
        dense = first if dense is None else dense
        if bool((broken := first.isnan().any(1)).any()):
            sample, name = batch[int(broken.int().argmax())][2], "dense" if entry is None else entry.label
            raise ValueError(
                f"{name}: logits of sample {sample.id} are NaN in {model.dtype}: use another dtype, such as bfloat16"
            )
        divergence = kl(dense, first).clamp(0, MOST_DIVERGENCE).tolist()
        texts = processor.batch_decode(made.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        name = DENSE if entry is None else entry.label
        for record, text, distance in zip(records, texts, divergence, strict=True):
            record["said"][name] = text.strip()
            record["divergence"][name] = round(distance, 6)
    for record in records:
        for part in ("said", "divergence"):
            record[part] = {**before.get(record["place"], {}).get(part, {}), **record[part]}
    return records


def _sizes(adapted: Any, inputs: Mapping[str, Any]) -> list[list[int]]:
    """For each sample: visual tokens, text tokens before the image, all text tokens, and image crops."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    crops = crops_of(adapted, inputs.get("image_sizes"), len(ids))
    sizes = []
    for row, visual in enumerate(visual_mask(adapted, ids)):
        own = visual if mask is None else visual[mask[row].bool()]
        where = torch.nonzero(own)[:, 0]
        sizes.append([len(where), int(where[0]) if len(where) else 0, len(own) - len(where), crops[row]])
    return sizes


def _examples(
    model: Any,
    processor: Any,
    tasks: Mapping[str, Sequence[Sample]],
    entries: Sequence[Entry],
    records: Sequence[Record],
    count: int,
    template: str | None,
) -> Iterator[dict[str, Any]]:
    """Show some samples: picture, answers, and for each visual token how many layers it enters under each method."""
    adapted = adapt(model)
    for place in _varied(records, count):
        record = records[place]
        first = next(number for number, r in enumerate(records) if r["task"] == record["task"])
        sample = tasks[record["task"]][place - first]
        inputs = _inputs(model, processor, [sample], template)
        visual = torch.nonzero(visual_mask(adapted, inputs["input_ids"])[0])[:, 0]
        entered = {}
        for entry in firsts(entries):
            layers = kept_positions(model, entry.recipe, inputs, _scorer(entry, [place]))
            stays = torch.stack([torch.isin(visual, columns[0]) for columns in layers])
            entered[entry.label] = stays.sum(0).tolist()
        picture = sample.load_image()
        picture.thumbnail((PICTURE, PICTURE))
        yield {**record, "picture": _data_uri(picture), "layers_entered": entered}


def _varied(records: Sequence[Record], count: int) -> list[int]:
    """Pick places, tasks and kinds of question in turn."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        by_kind.setdefault((record["task"], record["kind"]), []).append(place)
    columns = list(by_kind.values())
    turns = [column[turn] for turn in range(max(map(len, columns))) for column in columns if turn < len(column)]
    return sorted(turns[:count])


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _timings(
    model: Any,
    processor: Any,
    tasks: Mapping[str, Sequence[Sample]],
    entries: Sequence[Entry],
    batch_size: int,
    template: str | None,
    timed_batches: int,
) -> dict[str, Any]:
    """Time prefill and decoding of each method in turn, on the first batches of each task."""
    if not timed_batches:
        return {}
    used = firsts(entries)
    prefill: list[list[float]] = [[] for _ in [None, *used]]
    decode: list[list[float]] = [[] for _ in prefill]
    for samples in tasks.values():
        for start in range(0, min(timed_batches * batch_size, len(samples)), batch_size):
            inputs = _inputs(model, processor, samples[start : start + batch_size], template)
            places = range(len(inputs["input_ids"]))
            blocks = [functools.partial(_pruned, model, entry, places) for entry in [None, *used]]
            for kept, seconds in ((prefill, prefill_seconds), (decode, decode_seconds)):
                for row, new in zip(kept, seconds(model, inputs, blocks), strict=True):
                    row += new
    shares = zip([DENSE, *(entry.name for entry in used)], [None, *(entry.budget for entry in used)], strict=True)
    ratios = zip(shares, time_ratios(prefill), time_ratios(decode), strict=True)
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dense_prefill_seconds": min(prefill[0]),
        "dense_decode_seconds_per_token": min(decode[0]),
        "rows": [
            {"method": name, "budget": budget, "prefill_ratio": round(p, 4), "decode_ratio": round(d, 4)}
            for (name, budget), p, d in ratios
        ],
    }
