"""The search's meter: what recipes diverge from the dense model, each measured once, at a price, in a journal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support.journal import Journal, Record
from fitprune.families.inputs import input_digests
from fitprune.families.provenance import provenance_of
from fitprune.output_search.divergence import Judge
from fitprune.recipes.recipe import PruningRecipe

MOST = 0.5  # nats; an answer that has changed cannot change more, and a few such samples must not decide alone


class Meter:
    """Measures recipes batch by batch, and counts what that costs.

    Args:
        judge: what measures.
        run: all that divergences depend on, as `run_of` gives it.
        journal: file that keeps what was measured, for a run that is killed; None keeps nothing.

    Attributes:
        judge: what measures.
        passes: what was computed so far, in dense prefills of `judge.unit` samples; the dense answers count too.

    Raises:
        ValueError: the journal is of another run.
    """

    def __init__(self, judge: Judge, run: Mapping[str, Any], journal: str | os.PathLike[str] | None = None) -> None:
        self.judge = judge
        self.passes = sum(map(len, judge.references)) / judge.unit
        self._measured: dict[tuple[str, int], list[float]] = {}
        # What a journal holds of an earlier run is paid for again, so that both runs end alike.
        self._charged: set[tuple[str, int]] = set()
        self._journal = None if journal is None else Journal(journal, run, _sound)
        if self._journal:
            sizes = dict(enumerate(map(len, judge.references)))
            for record in self._journal.done().values():
                if sizes.get(record["batch"]) == len(record["divergence"]):
                    self._measured[record["plan"], record["batch"]] = record["divergence"]
            self._journal.open()

    def samples(self, numbers: Sequence[int]) -> int:
        """Count the samples of some batches."""
        return sum(len(self.judge.references[number]) for number in numbers)

    def charge_dense(self, number: int) -> None:
        """Add the price of a dense pass over one batch."""
        self.passes += len(self.judge.references[number]) / self.judge.unit

    def price(self, numbers: Sequence[int], recipe: PruningRecipe) -> float:
        """Price a recipe on some batches, measured already or not."""
        return sum(self.judge.price(number, [recipe]) for number in numbers)

    def mean(self, numbers: Sequence[int], recipe: PruningRecipe) -> float:
        """Mean divergence of a recipe on some batches, in nats."""
        values = [value for number in numbers for value in self.measure(number, [recipe])[0]]
        return sum(values) / len(values)

    def measure(self, number: int, recipes: Sequence[PruningRecipe]) -> list[list[float]]:
        """Measure recipes on one batch, each once; the price of the new ones is added to `passes`."""
        keys = [_digest(recipe) for recipe in recipes]
        new = {key: recipe for key, recipe in zip(keys, recipes, strict=True) if (key, number) not in self._charged}
        self.passes += self.judge.price(number, list(new.values()))
        self._charged |= {(key, number) for key in new}
        todo = {key: recipe for key, recipe in new.items() if (key, number) not in self._measured}
        if todo:
            divergences = self.judge.divergences(number, list(todo.values()))
            records: list[Record] = []
            for key, values in zip(todo, divergences, strict=True):
                place = len(self._measured)
                self._measured[key, number] = values = [_capped(value) for value in values]
                records.append({"place": place, "plan": key, "batch": number, "divergence": values})
            if self._journal:
                self._journal.append(records)
        return [self._measured[key, number] for key in keys]


def run_of(judge: Judge, batches: Sequence[Mapping[str, Any]], seed: int, max_new_tokens: int) -> dict[str, Any]:
    """All that divergences depend on, as plain data; the keys stand in journals that are already written."""
    digest = hashlib.sha256()
    # Of the inputs and of the answers, no probabilities: their last bits depend on the number of threads.
    for inputs, batch in zip(batches, judge.references, strict=True):
        digest.update("".join(input_digests(judge.adapted, inputs)).encode())
        digest.update(batch.answers.cpu().numpy().tobytes())
    return {
        "objective": "output",
        **provenance_of(judge.model),
        "batches": [len(batch) for batch in judge.references],
        "digest": digest.hexdigest()[:16],
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "capped": MOST,
    }


def _capped(value: float) -> float:
    """A divergence as it is compared: not below 0 by rounding, and at most MOST, which a broken one (NaN) is too."""
    return MOST if value != value else round(min(max(value, 0.0), MOST), 9)


def _digest(recipe: PruningRecipe) -> str:
    """Name what a recipe does."""
    text = json.dumps([list(recipe.entering), list(recipe.keep), recipe.scorer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _sound(record: Record) -> bool:
    values = record.get("divergence")
    return (
        isinstance(record.get("plan"), str)
        and type(record.get("batch")) is int
        and isinstance(values, list)
        and all(isinstance(value, float) and 0 <= value <= MOST for value in values)
    )
