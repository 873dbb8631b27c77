"""`fitprune families`: the families of models."""

from __future__ import annotations

import argparse

from fitprune.cli import options


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    return options.command(
        commands, "families", run, "list the families of models: supported, refused and why, generic",
        "fitprune families",
    )  # fmt: skip


def run(args: options.Args) -> None:
    """Print the table."""
    from fitprune.families.table import table

    print(table())
