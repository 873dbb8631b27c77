"""`evaluate`: what pruning methods cost and what they keep, against the dense model on the same questions.

Every method answers every question greedily, batch by batch. The answers of a batch go to a journal at once, so that a
killed run continues. Figures are computed from the journal at the end: they depend neither on how often the run was
killed nor on the number of processes.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from fitprune._support import checked
from fitprune._support.journal import Journal, Record
from fitprune._support.messages import line
from fitprune._support.processes import Processes
from fitprune.benchmarks.base import Benchmark
from fitprune.calibration.entry import BadSample
from fitprune.calibration.protocol import protocol_for
from fitprune.calibration.samples import Sample
from fitprune.costs.sizes import MOST_TOKENS
from fitprune.evaluation.answers import answer_batch
from fitprune.evaluation.entries import Entry, entries_of, grouped, readable
from fitprune.evaluation.examples import make_examples
from fitprune.evaluation.records import is_sound
from fitprune.evaluation.results import Results
from fitprune.evaluation.rows import best_of, chosen_metrics, judge, rows_of
from fitprune.evaluation.run import Run
from fitprune.evaluation.summary import DENSE, UNNAMED, label
from fitprune.evaluation.timings import time_methods
from fitprune.families.adapter import adapt
from fitprune.recipes.recipe import PruningRecipe

LONGEST = 16  # tokens of an answer to a question of no benchmark


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    methods: PruningRecipe | Mapping[str, PruningRecipe] | Sequence[PruningRecipe | Entry],
    *,
    benchmarks: Mapping[str, Benchmark] = MappingProxyType({}),
    protocol: str | None = None,
    metric: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    skipped: Sequence[Mapping[str, Any]] = (),
    batch_size: int = 8,
    max_new_tokens: int | None = None,
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
        methods: name -> recipe; a recipe, or several in a list; or entries as `entries_for` makes them. A scorer that
            draws at random draws again for each sample, by the sample's place, even if the question is the same.
        benchmarks: of the tasks that are one, task name -> benchmark (`fitprune.benchmarks`): official metric, prompts
            and longest answer.
        protocol: how a benchmark's questions become prompts, "llava" or "chat"; None chooses by the model
            (`fitprune.calibration.protocol`).
        metric: how answers of other tasks are judged, a name of `fitprune.evaluation.metrics.METRICS`; None chooses for
            each task by its data: "vqa" for ten annotators' answers, else "normalized".
        journal: file for each sample's answers; a run that was killed continues from it, and a run with more methods
            runs only the new ones. None keeps nothing.
        skipped: methods that could not be solved for a budget; copied into the results.
        batch_size: samples in a batch.
        max_new_tokens: longest answer; None is the benchmark's, 16 for other tasks.
        prompt_template: see `fitprune.calibration.prompts.format_prompt`.
        timed_batches: batches of each task whose prefill and decoding are timed, methods in turn; 0 for none.
        examples: number of samples, of different kinds, whose picture and kept tokens go into the results.
        progress: show a progress bar.

    Returns:
        The results; in a process other than the first, without rows.

    Raises:
        ValueError: there is no sample, a method is called "dense", is listed more than once or was fitted for another
            model, there is no such metric, the journal is of another run, an image is bad (all are decoded before the
            first answer), or logits are NaN.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_new_tokens", 1 if max_new_tokens is None else max_new_tokens, 1),
        ("timed_batches", timed_batches, 0),
        ("examples", examples, 0),
    ):
        checked.whole(name, value, least, MOST_TOKENS)
    if protocol is not None and prompt_template is not None:
        raise ValueError(f"protocol={protocol!r}: prompt_template takes its place; leave one out")
    tasks = dict(samples) if isinstance(samples, Mapping) else {UNNAMED: samples}
    _require_benchmarks(benchmarks, tasks)
    if protocol is not None and not benchmarks:
        raise ValueError(f"protocol={protocol!r}: is for benchmarks; other tasks take prompt_template")
    if metric is not None and benchmarks.keys() == tasks.keys():
        raise ValueError(f"metric={metric!r}: is for other tasks; a benchmark has its own; leave it out")
    adapted = adapt(model)
    entries, blind = readable(adapted, entries_of(methods))
    own = {task: benchmarks[task].max_new_tokens if task in benchmarks else LONGEST for task in tasks}
    longest = {task: max_new_tokens or length for task, length in own.items()}
    how = protocol_for(protocol, processor, adapted.model) if benchmarks else None
    run = Run(adapted, processor, tasks, benchmarks, entries, batch_size, longest, prompt_template, how)
    _require_sound(run)
    _require_own_questions(run)
    _require_text_alone(run)
    names = chosen_metrics({task: own for task, own in tasks.items() if task not in benchmarks}, metric)
    records = _answer_all(run, journal, progress)
    if records is None:
        return Results(())
    timings = time_methods(run, timed_batches, progress=progress)
    parts = list(judge(tasks, {**names, **benchmarks}, metric is None, run.labels, records))
    scores = {
        record["place"]: {label: float(of[number]) for label, of in part.scores.items()}
        for part in parts
        for number, record in enumerate(part.judged)
    }
    return Results(
        rows=tuple(rows_of(adapted.fingerprint, parts, entries, run.model.dtype.itemsize)),
        best=tuple(best_of(parts, entries)),
        skipped=tuple(dict(entry) for entry in [*skipped, *blind]),
        recipes={
            label(name, budget): json.loads(group[0].recipe.to_json()) for name, budget, group in grouped(entries)
        },
        examples=tuple(make_examples(run, records, scores, examples)),
        provenance={name: value for name, value in run.identity.items() if name != "entries"}
        | {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"},
        answers=tuple(records),
        timings=timings,
        tasks=tuple(part.task for part in parts),
    )


def _require_benchmarks(benchmarks: Any, tasks: Mapping[str, Any]) -> None:
    """Refuse benchmarks of another type, or of no task."""
    if not isinstance(benchmarks, Mapping):
        raise ValueError(f"benchmarks is a {type(benchmarks).__name__}: must be task name -> Benchmark")
    for name, benchmark in benchmarks.items():
        if not isinstance(benchmark, Benchmark):
            raise ValueError(
                f"benchmarks[{name!r}] is a {type(benchmark).__name__}: must be a Benchmark, as "
                "fitprune.benchmarks.table.get_benchmark returns it"
            )
        if name not in tasks:
            raise ValueError(f"benchmarks has {name!r}, which is no task: samples has {', '.join(map(repr, tasks))}")


def _require_own_questions(run: Run) -> None:
    """Refuse questions that a benchmark cannot score, by scoring an empty answer to each."""
    for name, benchmark in run.benchmarks.items():
        samples, score = run.tasks[name], benchmark.score
        try:
            if score is not None:
                benchmark.measure(samples).of([score("", sample) for sample in samples])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"samples of {name!r} are not those of {benchmark.title} ({type(error).__name__}: {line(error, 80)}): "
                "must be those that load_benchmark returns"
            ) from error


def _require_text_alone(run: Run) -> None:
    """Refuse questions without an image where the processor does: they come after all others of their task."""
    for task, samples in run.tasks.items():
        alone = [sample for sample in samples if sample.image is None]
        if not alone:
            continue
        try:
            run.inputs(task, alone[:1])
        except BadSample as error:
            raise BadSample(
                f"{error}: {len(alone)} of {len(samples)} questions of {task} have no image, which this model's "
                f"processor refuses; leave {task} out"
            ) from error


def _require_sound(run: Run) -> None:
    """Refuse what would be found only after long work."""
    for name, samples in run.tasks.items():
        wrong = [s for s in samples if not isinstance(s, Sample)] if isinstance(samples, Sequence) else [samples]
        if wrong:
            kind = type(wrong[0]).__name__
            raise ValueError(f"samples of {name!r}: {kind}, must be a list of Sample, as load_samples returns it")
    if not run.tasks or not all(run.tasks.values()):
        empty = [name for name, samples in run.tasks.items() if not samples]
        raise ValueError(f"samples is empty ({', '.join(empty) or 'no task'}): there must be at least one question")
    labels = run.labels
    if repeated := sorted({name for name in labels if labels.count(name) > 1}):
        raise ValueError(f"methods has {repeated[0]!r} twice ({DENSE!r} is the model without pruning): rename one")
    for entry in run.entries:
        entry.recipe.model.require_same(run.adapted.fingerprint, what=f"recipe {entry.label!r}")


def _answer_all(run: Run, path: str | os.PathLike[str] | None, progress: bool) -> list[Record] | None:
    """Answer what the journal lacks, in all processes; None in a process other than the first."""
    processes = Processes()
    if processes.count > 1 and path is None:
        raise ValueError(f"{processes.count} processes gather their answers through a journal: pass journal=FILE")
    identity = run.identity  # decodes all images, so that a bad one is found before the first answer
    journal = None if path is None else Journal(path, identity, is_sound, processes.rank)
    records = journal.done() if journal else {}
    processes.wait()  # all have read before any writes
    if journal:
        journal.open()
    batches, labels = run.batches(), run.labels
    todo = [batch for batch in batches if not all(_is_whole(records.get(place), labels) for place, _, _ in batch)]
    total, own = sum(map(len, batches)), todo[processes.rank :: processes.count]
    before = total - sum(map(len, todo))
    share = before + sum(map(len, own))  # with several processes, the bar shows the first one's share
    quiet = not progress or processes.rank > 0
    with tqdm(desc="evaluate", initial=before, total=share, unit="question", disable=quiet or None) as bar:
        for batch in own:
            new = answer_batch(run, batch, records)
            records.update({record["place"]: record for record in new})
            if journal:
                journal.append(new)
            bar.update(len(batch))
    processes.wait()
    if processes.rank > 0:
        return None
    if journal:
        records = {place: _of_labels(record, labels) for place, record in journal.done().items() if place < total}
        journal.finish([records[place] for place in range(total)])
    return [records[place] for place in range(total)]


def _is_whole(record: Record | None, labels: Sequence[str]) -> bool:
    """Whether a record is there and holds all methods."""
    return record is not None and all(label in record["said"] for label in labels)


def _of_labels(record: Record, labels: Sequence[str]) -> Record:
    """Copy a record with these methods alone, in their order, whichever run added which."""
    return {**record, **{part: {label: record[part][label] for label in labels} for part in ("said", "divergence")}}
