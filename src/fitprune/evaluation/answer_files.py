"""Write a benchmark's answers for others: LLaVA's answers file and what a server takes, for each method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fitprune._support import files
from fitprune.benchmarks.answers import write_answers
from fitprune.benchmarks.base import Benchmark
from fitprune.calibration.samples import Sample
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import DENSE

LONGEST_NAME = 100  # characters of a file's name before its ending


def write_all(results: Results, benchmark: Benchmark, samples: Sequence[Sample], folder: Path) -> str:
    """Write the answers of every label into `folder / benchmark.name`; returns a line that says what is there.

    Args:
        results: with the answers.
        benchmark: the benchmark.
        samples: its questions, in the order of the answers.
        folder: where its folder goes.

    Raises:
        OSError: a file cannot be written.
        ImportError: what the upload file needs is not installed.
    """
    own = [record for record in results.answers if record["task"] == benchmark.name]
    place = folder / benchmark.name
    place.mkdir(parents=True, exist_ok=True)
    model, upload = Path(str(results.provenance.get("model", "model"))).name, benchmark.upload
    for label, name in file_names(own[0]["said"]).items():
        texts = [record["said"][label] for record in own]
        write_answers(place / f"{name}.jsonl", samples, texts, model if label == DENSE else f"{model}-{name}")
        if upload is not None:
            upload.save(samples, texts, place / f"{name}.upload{upload.ending}")
    more = f"; *.upload{upload.ending} is for {upload.taker}" if upload else ""
    return f"{place}: each method's answers, as LLaVA's scripts take them{more}"


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """Name a file for each label, all different: "fastv 60%" is fastv-60.

    Args:
        labels: of methods, all different.
    """
    names: dict[str, str] = {}
    for label in labels:
        name = plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip("-.")[:LONGEST_NAME] or "method"
        number = 1
        while name.lower() in map(str.lower, names.values()):  # some disks know no case
            number += 1
            name = f"{plain}-{number}"
        names[label] = name
    return names


def require_places(benchmark: Benchmark, folder: Path) -> None:
    """Refuse, before long work, what is in the way of a benchmark's answers.

    Args:
        benchmark: the benchmark.
        folder: where its folder goes.

    Raises:
        ValueError: a file is where a folder goes.
        OSError: a folder is where a file goes, or files cannot be written.
    """
    place = folder / benchmark.name
    for path in (folder, place, *place.glob("*.upload")):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{path}: is a file, and answers go into a folder of that name; rename it, or choose another -o"
            )
    if place.exists():
        for path in (place / f"{DENSE}.jsonl", *place.glob("*.jsonl"), *place.glob("*.upload.*")):
            files.require_writable(path)
