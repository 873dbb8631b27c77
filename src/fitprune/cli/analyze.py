"""`fitprune analyze`: what attention statistics show, and how stable the recipes are that they give."""

from __future__ import annotations

import argparse
from pathlib import Path

from fitprune._support import files
from fitprune.cli import options, parser


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "analyze", run, "analyse attention statistics and the stability of the recipes that they give",
        "fitprune analyze stats.safetensors -o analysis/",
    )  # fmt: skip
    command.add_argument("stats", metavar="STATS", nargs="+", help="files made by 'fitprune measure', of one model")
    options.add_output(command, "folder for JSON, CSV tables and pictures", required=True)
    command.add_argument(
        "--flops-reduction", type=float, nargs="+", default=[0.4, 0.6, 0.8], metavar="X",
        help="budgets (default: 0.4 0.6 0.8)",
    )  # fmt: skip
    command.add_argument(
        "--resamples", type=parser.whole(1, 10_000), default=30, help="draws of each calibration size (default: 30)"
    )
    command.add_argument("--seed", type=parser.seed, default=0, help="seed of draws and halves (default: 0)")
    command.add_argument("--no-pictures", action="store_true", help="JSON and tables alone; needs no matplotlib")
    return command


def run(args: options.Args) -> None:
    """Analyse, write the files, and print the findings."""
    from fitprune._support.plots import require_matplotlib
    from fitprune.analysis.analyze import analyze
    from fitprune.analysis.figures import draw_analysis
    from fitprune.analysis.save import NAME, findings, save
    from fitprune.fitting.stats import AttentionStats

    files.claim_folder(args.output, _is_analysis, "name another folder", overwrite=args.overwrite)
    replaced = files.claim(Path(args.output) / NAME, files.ANALYSIS, overwrite=args.overwrite)
    if not args.no_pictures:
        require_matplotlib("use --no-pictures")
    if len({Path(name).stem for name in args.stats}) < len(args.stats):
        raise ValueError(f"STATS {' '.join(args.stats)}: two files have the same name; rename one")
    stats = {Path(name).stem: AttentionStats.load(name) for name in args.stats}
    analysis = analyze(stats, budgets=args.flops_reduction, resamples=args.resamples, seed=args.seed)
    written = save(analysis, args.output)
    if not args.no_pictures:
        written += draw_analysis(analysis, args.output)
    print(findings(analysis))
    print(f"{args.output}: {len(written)} files, of which {NAME} holds all figures{replaced}")


def _is_analysis(entry: Path) -> bool:
    """Whether an entry of a folder is of an earlier analysis: beside its JSON, its tables and pictures."""
    from fitprune.analysis.save import NAME

    whole = entry.with_name(NAME)
    return entry.suffix in (".csv", ".png", ".svg", ".json") and files.kind_of(whole) == files.ANALYSIS
