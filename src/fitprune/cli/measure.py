"""`fitprune measure`: a model's attention statistics on calibration data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import files
from fitprune._support.text_tables import plural
from fitprune.cli import options, parser

if TYPE_CHECKING:
    from fitprune.fitting.stats import AttentionStats


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "measure", run, "measure a model's attention statistics on calibration data",
        "fitprune measure digit-scenes --data digit-scenes/calibration -o stats.safetensors",
        lambda args: has_parts(args.output),
    )  # fmt: skip
    options.add_model(command)
    options.add_data(command)
    options.add_output(command, "statistics file to write", required=True)
    add_batch_size(command)
    return command


def add_batch_size(to: argparse.ArgumentParser) -> None:
    """Add --batch-size of measuring."""
    to.add_argument(
        "--batch-size", type=parser.positive, default=1,
        help="samples measured at a time; more are faster and take more memory (default: 1)",
    )  # fmt: skip


def run(args: options.Args) -> None:
    """Measure, and write the statistics."""
    from fitprune.calibration.measure import forget_parts

    replaced = files.claim(args.output, files.STATISTICS, overwrite=args.overwrite)
    stats = measured(args, args.output)
    if stats is not None:
        stats.save(args.output)
        forget_parts(f"{args.output}.parts")
        print(f"{args.output}: {plural(len(stats), 'sample')}, {stats.model.decoder.layers} layers{replaced}")


def measured(
    args: options.Args,
    path: str | Path,
    known: Callable[[Any, Callable[[], Any]], AttentionStats | None] = lambda model, batches: None,
) -> AttentionStats | None:
    """Measure by the options of a command; goes on from a run that was killed. The parts stay: the caller deletes them.

    Args:
        args: the command's.
        path: where they will be saved.
        known: gives the statistics if they need not be measured: of the model, and of a function that makes its
            batches.

    Returns:
        The statistics; None in all processes but the first.
    """
    from fitprune._support.processes import Processes
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.measure import measure

    samples = options.joined(options.read_samples(args))  # before the model: bad data is found in seconds
    model, processor = options.load(args)
    samples = options.usable(args, samples, processor, model)
    processes = Processes()

    def batches(own: Processes | None = None) -> Any:
        template, size = args.prompt_template, args.batch_size
        return make_batches(samples, processor, batch_size=size, prompt_template=template, processes=own, model=model)

    stats = known(model, batches)
    if stats is None:
        total = -(-len(samples) // args.batch_size)
        stats = measure(model, batches(processes), parts=f"{path}.parts", total=total, progress=True)
    return stats if processes.rank == 0 else None


def has_parts(path: str | Path) -> bool:
    """Whether a measurement that was to write `path` was cut off after its first sample."""
    return any(Path(f"{path}.parts").glob("*.safetensors"))
