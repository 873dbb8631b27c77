"""`fitprune profile`: what the parts of a prefill take on this device."""

from __future__ import annotations

import argparse

from fitprune._support import files
from fitprune.cli import options, parser


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "profile", run, "measure what a prefill's parts take on this device, to fit recipes to a latency",
        "fitprune profile MODEL --device cuda -o profile.json",
    )  # fmt: skip
    options.add_timed_model(command)
    options.add_output(command, "profile to write", required=True)
    command.add_argument("--batch-size", type=parser.positive, default=1, help="prompts in a batch (default: 1)")
    command.add_argument(
        "--rounds", type=parser.whole(1, 10_000), default=3, help="times that a length is measured (default: 3)"
    )
    return command


def run(args: options.Args) -> None:
    """Measure, and write the profile."""
    from fitprune.speed.profiling import profile_latency

    replaced = files.claim(args.output, files.PROFILE, overwrite=args.overwrite)
    model, make_inputs = options.timed_model(args)
    profile = profile_latency(model, make_inputs(args.batch_size), repeats=args.rounds, progress=True)
    profile.save(args.output)
    dense = profile.dense_seconds(profile.visual_tokens)
    print(
        f"{args.output}: {profile.device}, batches of {profile.batch}, {profile.visual_tokens} visual and "
        f"{profile.text_tokens} text tokens: dense prefill {dense:.3f} s{replaced}"
    )
