"""The records of an evaluation: what a sound one holds, those beside a results file, and the answers that changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fitprune._support.journal import Record
from fitprune.evaluation.metrics import METRICS
from fitprune.evaluation.results import Results, beside
from fitprune.evaluation.summary import DENSE

MOST_BYTES = 32 << 20  # of a journal that is read
_LONGEST_LINE = 1 << 20
_NOT_OF_THE_RUN = {"entries": None, "date": None}  # those of a journal may be more, and it has no date


@dataclasses.dataclass(frozen=True)
class Change:
    """One question that some method answers otherwise than the dense model.

    Attributes:
        record: its record.
        answers: what others answer -> the labels of those.
        scores: answer -> its score from 0 to 1, the dense one's too; empty where nothing is judged.
    """

    record: Record
    answers: Mapping[str, Sequence[str]]
    scores: Mapping[str, float]

    def kind(self, answer: str) -> str:
        """Say what became of the question: "lost", "won", or "other"."""
        if not self.scores:
            return "other"
        before, after = self.scores[self.record["said"][DENSE]], self.scores[answer]
        return "lost" if after < before else "won" if after > before else "other"


def changed(results: Results, records: Iterable[Record]) -> Iterator[Change]:
    """Give the questions whose answer some method changed.

    Args:
        results: of the evaluation; its tasks say how answers are judged.
        records: of its questions.
    """
    metrics = {task.name: METRICS.get(str(task.metric)) for task in results.tasks if task.comparable}
    for record in records:
        answers: dict[str, list[str]] = {}
        for label, text in record["said"].items():
            if text != record["said"][DENSE]:
                answers.setdefault(text, []).append(label)
        if answers:
            metric, accepted = metrics.get(record["task"]), record["accepted"]
            judged = metric is not None and any(text.strip() for text in accepted)
            texts = [record["said"][DENSE], *answers] if judged else []
            yield Change(record, answers, {text: metric(text, accepted) for text in texts} if metric else {})


def journal_of(results: Results, path: str | os.PathLike[str]) -> Iterator[Record]:
    """Read the records beside results, `NAME.samples.jsonl`, as far as they are whole and of the same run.

    Args:
        results: that were read from `path`.
        path: of the results.

    Yields:
        The records, at most as many as `MOST_BYTES` hold; none without a journal of this run.
    """
    with contextlib.suppress(OSError), open(beside(path, "samples.jsonl"), "rb") as file:
        left, run = MOST_BYTES, None
        for line in iter(functools.partial(file.readline, _LONGEST_LINE), b""):
            left -= len(line)
            entry = _parsed(line)
            if run is None:
                run = entry.get("run")
                if not isinstance(run, dict) or run | _NOT_OF_THE_RUN != dict(results.provenance) | _NOT_OF_THE_RUN:
                    return
            elif left < 0:
                return
            elif is_sound(entry):
                yield entry


def _parsed(line: bytes) -> Record:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def is_sound(record: Record) -> bool:
    """Whether a record of the journal holds all that figures are computed from, for the methods that it names."""
    answers, divergence, sizes = (record.get(name) for name in ("said", "divergence", "sizes"))
    return (
        isinstance(answers, dict)
        and isinstance(divergence, dict)
        and DENSE in answers
        and answers.keys() == divergence.keys()
        and all(isinstance(answers[name], str) and isinstance(divergence[name], float) for name in answers)
        and isinstance(sizes, list)
        and len(sizes) == 4
        and all(isinstance(record.get(name), str) for name in ("task", "kind", "question"))
        and isinstance(record.get("id"), (str, int))
        and isinstance(record.get("accepted"), list)
        and all(isinstance(text, str) for text in record["accepted"])
    )
