"""`fitprune benchmarks`: the benchmarks, the files they need, and which of them are there."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fitprune.cli import options

if TYPE_CHECKING:
    from fitprune.benchmarks.base import Benchmark


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "benchmarks", run, "list the benchmarks: metric, files they need, which of these are there",
        "fitprune benchmarks pope --data-root playground/data/eval",
    )  # fmt: skip
    command.add_argument("names", nargs="*", metavar="NAME", help="show where each of its files may lie")
    options.add_data_root(command)
    return command


def run(args: options.Args) -> None:
    """Print a table, or all of the benchmarks that are named."""
    from fitprune.benchmarks.table import BENCHMARKS, get_benchmark

    root = Path(args.data_root)
    if not root.is_dir() and args.data_root != options.DATA_ROOT:
        raise FileNotFoundError(2, f"data root {root} is no folder: pass the one that holds pope/, textvqa/ and others")
    there = root if root.is_dir() else None
    options.require_different("NAME", args.names)
    if args.names:
        print("\n\n".join(_page(get_benchmark(name), there) for name in args.names))
    else:
        print(_table(list(BENCHMARKS.values()), there))
        print(f"\n{_where(root, there)}\n'fitprune benchmarks NAME' shows where each file may lie")


def _table(benchmarks: Sequence[Benchmark], root: Path | None) -> str:
    """Write each benchmark with what it needs on the lines below it."""
    cells = [("name", "title", "metric"), *((each.name, each.title, each.metric) for each in benchmarks)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    across, indent = min(max(shutil.get_terminal_size().columns, 80), 120), " " * (widths[0] + 2)
    wrapper = textwrap.TextWrapper(
        across, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    lines = []
    for row, notes in zip(cells, ["", *(_notes(each, root) for each in benchmarks)], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += wrapper.wrap(notes)
    return "\n".join(lines)


def _notes(benchmark: Benchmark, root: Path | None) -> str:
    """Say how many questions there are, where they are scored, and which files are there."""
    from fitprune._support.messages import line
    from fitprune.benchmarks.reading import located

    roles = {needed.role: needed.role + " (optional)" * needed.optional for needed in benchmark.needs}
    if root is None:
        return f"{_judged(benchmark)}; needs {', '.join(roles.values())}"
    try:
        present = located(benchmark, root)
    except OSError as error:  # a folder that may not be looked into
        return f"broken: {line(error, 300)}"
    here = ", ".join(text for role, text in roles.items() if role in present)
    absent = ", ".join(text for role, text in roles.items() if role not in present)
    parts = [_size(benchmark, root), _judged(benchmark), here and f"found {here}", absent and f"missing {absent}"]
    return "; ".join(filter(None, parts))


def _page(benchmark: Benchmark, root: Path | None) -> str:
    """Write all of one benchmark: its facts, and every place where its files may lie."""
    from fitprune.benchmarks.reading import located

    present = located(benchmark, root) if root else {}
    facts = {
        "title": ", ".join(filter(None, (benchmark.title, _size(benchmark, root) if root else ""))),
        "figure": f"{benchmark.metric}; at most {benchmark.maximum:g}; {_judged(benchmark)}",
        "answers": f"of at most {benchmark.max_new_tokens} tokens",
        "other names": ", ".join(benchmark.aliases),
    }
    lines = [benchmark.name, *(f"  {name:<13}{text}" for name, text in facts.items() if text)]
    for needed in benchmark.needs:
        lines.append(f"  {needed.role}{', optional' * needed.optional}")
        for place in needed.places:
            state = "" if root is None else f"{'found' if present.get(needed.role) == root / place else '-':<7}"
            lines.append(f"    {state}{place}")
    return "\n".join(lines)


def _judged(benchmark: Benchmark) -> str:
    """Say where its answers are scored."""
    if benchmark.score:
        return "scored here"
    return "not scored here, upload file" + (f" for {benchmark.upload.taker}" if benchmark.upload else ": its answers")


def _size(benchmark: Benchmark, root: Path) -> str:
    """Count the questions, or say why they cannot be read; "" where files are missing."""
    from fitprune._support.messages import line
    from fitprune._support.text_tables import plural
    from fitprune.benchmarks.reading import load_benchmark

    try:
        return plural(len(load_benchmark(benchmark, root, images=False)), "question")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"broken: {line(error, 300)}"


def _where(root: Path, there: Path | None) -> str:
    """Say where the files were looked for."""
    if there:
        return f"under {root}, laid out as LLaVA's eval.zip"
    return f"{root} is not there: --data-root FOLDER, laid out as LLaVA's eval.zip, shows what is found"
