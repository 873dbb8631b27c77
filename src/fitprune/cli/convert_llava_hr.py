"""`fitprune convert-llava-hr`: a LLaVA-HR checkpoint into transformers' format."""

from __future__ import annotations

import argparse
from pathlib import Path

from fitprune.cli import options


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "convert-llava-hr", run, "convert a LLaVA-HR checkpoint of its authors to transformers' format",
        "fitprune convert-llava-hr llava-hr-7b-sft-1024 llava-hr-7b",
        lambda args: any(Path(args.destination).glob("*.safetensors")),
    )  # fmt: skip
    command.add_argument("source", metavar="SRC", help="folder with the authors' config.json, weights and tokenizer")
    command.add_argument("destination", metavar="DST", help="folder to write; what a killed run left there is kept")
    return command


def run(args: options.Args) -> None:
    """Convert, and print what to do next."""
    from fitprune.families.llava_hr.conversion import convert

    folder = convert(args.source, args.destination)
    print(f"{folder}: now 'fitprune generate {folder} --recipe llava-hr-7b:60 --image IMAGE --question QUESTION'")
