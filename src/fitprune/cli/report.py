"""`fitprune report`: results as one HTML page."""

from __future__ import annotations

import argparse

from fitprune._support import files
from fitprune.cli import options


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "report", run, "make one self-contained HTML page of results",
        "fitprune report results.json -o report.html",
    )  # fmt: skip
    command.add_argument("results", metavar="RESULTS", help="file made by 'fitprune evaluate'")
    options.add_output(command, "HTML file to write", required=True)
    return command


def run(args: options.Args) -> None:
    """Write the page."""
    from fitprune.evaluation.report import write_report
    from fitprune.evaluation.results import Results

    if not args.output.lower().endswith(".html"):
        raise ValueError(f"{args.output}: must end in .html")
    replaced = files.claim(args.output, files.REPORT, overwrite=args.overwrite)
    results = Results.load(args.results)
    write_report(results, args.output, source=args.results)
    print(f"{args.output}{replaced}")
