"""`fitprune score`: the official figure of anybody's answers. Knows no model, and imports no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import files
from fitprune._support.text_tables import aligned
from fitprune.cli import options, parser

if TYPE_CHECKING:
    from fitprune.benchmarks.answers import Lines
    from fitprune.benchmarks.base import Benchmark
    from fitprune.calibration.samples import Sample


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "score", run, "score answers to a benchmark's questions by its official rule; no model is needed",
        "fitprune score pope --answers playground/data/eval/pope/answers/llava-v1.5-13b.jsonl",
    )  # fmt: skip
    command.add_argument("benchmark", metavar="BENCHMARK", help="such as pope; 'fitprune benchmarks' lists them")
    command.add_argument(
        "--answers", nargs="+", required=True, type=parser.path, metavar="FILE", help="answers files as LLaVA or "
        "'fitprune evaluate' writes them (JSON lines), or MMBench's .xlsx; a column of the table for each",
    )  # fmt: skip
    options.add_data_root(command)
    command.add_argument("--partial", action="store_true", help="score the questions that are answered, if not all are")
    command.add_argument(
        "--upload", type=parser.path, metavar="PATH", help="write what the benchmark's own script or server takes"
    )
    options.add_output(command, "JSON file of the figures to write")
    return command


def run(args: options.Args) -> None:
    """Score each file, print a table, and write what is asked for."""
    from fitprune.benchmarks.answers import matched, read_answers
    from fitprune.benchmarks.table import get_benchmark

    benchmark = get_benchmark(args.benchmark)
    paths = [os.path.realpath(path) for path in (*args.answers, args.upload, args.output) if path]
    options.require_different("--answers, --upload, --output", paths)  # none is to replace another
    _require_possible(benchmark, args)
    replaced = files.claim(args.output, files.SCORES, overwrite=args.overwrite) if args.output else ""
    read = [read_answers(path) for path in args.answers]
    questions = _questions(benchmark, args, read)
    pairs = [matched(benchmark, own, lines, partial=args.partial) for own, lines in zip(questions, read, strict=True)]
    if args.upload:
        _write_upload(benchmark, *pairs[0], args)
    if benchmark.score is None:
        return
    entries = [
        {"answers": path, "questions": len(own), "answered": len(pair[0]), **_figures(benchmark, *pair)}
        for path, own, pair in zip(args.answers, questions, pairs, strict=True)
    ]
    if args.output:  # before the table, whose reader may have had enough of it
        facts = {"benchmark": benchmark.name, "title": benchmark.title, "metric": benchmark.metric}
        files.write_json(args.output, {**facts, "maximum": benchmark.maximum, "scores": entries})
    print(f"{benchmark.title}: {benchmark.metric}\n\n{_table(entries)}")
    if args.output:
        print(f"{args.output}{replaced}")


def _require_possible(benchmark: Benchmark, args: options.Args) -> None:
    """Refuse what a benchmark does not have, before anything is read."""
    upload = benchmark.upload
    if benchmark.score is None and (args.output or not args.upload):
        way = f"pass --upload FILE alone to write what {upload.taker} takes" if upload else "its server takes the file"
        raise ValueError(f"{benchmark.name}: no answers are published, so nothing can be scored here; {way}")
    if not args.upload:
        return
    if upload is None:
        raise ValueError(f"--upload {args.upload}: {benchmark.name} has no other format; pass on the answers file")
    upload.require(benchmark.name)
    if len(args.answers) > 1:
        raise ValueError(f"--upload {args.upload}: holds one model's answers, not {len(args.answers)}; pass one file")
    if not args.upload.endswith(upload.ending):
        raise ValueError(f"--upload {args.upload}: must end in {upload.ending}, as {upload.taker} takes it")
    if upload.ending:
        files.claim(args.upload, files.UPLOAD, overwrite=args.overwrite)
    else:
        files.claim_folder(args.upload, lambda _: False, "name another folder", overwrite=args.overwrite)


def _questions(benchmark: Benchmark, args: options.Args, read: Sequence[Lines]) -> list[list[Sample]]:
    """Read the questions that belong to each file: of the root, or, without one, those that the file holds."""
    from fitprune.benchmarks.reading import load_benchmark

    root = Path(args.data_root)
    if benchmark.rebuild and args.data_root == options.DATA_ROOT and not root.is_dir():
        return [benchmark.rebuild(lines) for lines in read]
    return [load_benchmark(benchmark, root, images=False)] * len(read)


def _write_upload(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str], args: options.Args) -> None:
    if benchmark.upload is None:
        return
    benchmark.upload.save(samples, texts, args.upload)
    print(f"{args.upload}: for {benchmark.upload.taker}")


def _figures(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, Any]:
    """Compute the figures of one file's answers, with the 95% interval of the first."""
    from fitprune.benchmarks.answers import scores
    from fitprune.evaluation.bootstrap import interval, sums

    measure, each = benchmark.measure(samples), scores(benchmark, samples, texts)
    figures = measure.of(each)
    name = next(iter(figures))
    spread = interval(measure.figures(sums(measure.counts(each)))[name])
    return {"figure": name, "interval": spread, "figures": figures}


def _table(entries: Sequence[dict[str, Any]]) -> str:
    """Write a column for each file: questions, the benchmark's figure with its interval, then every other."""
    paths = [entry["answers"] for entry in entries]
    names = [Path(path).stem for path in paths]
    counts = [
        f"{entry['answered']:,}" + (f" of {entry['questions']:,}" if entry["answered"] < entry["questions"] else "")
        for entry in entries
    ]
    lines = [("", *(names if len(set(names)) == len(names) else paths)), ("questions", *counts)]
    figures = list(dict.fromkeys(name for entry in entries for name in entry["figures"]))
    for name in figures:
        values = [entry["figures"].get(name) for entry in entries]
        lines.append((name, *("-" if value is None else f"{value:.2f}" for value in values)))
    spreads = ["..".join(f"{end:.2f}" for end in entry["interval"]) for entry in entries]
    return aligned([*lines[:3], ("  95% interval", *spreads), *lines[3:]])
