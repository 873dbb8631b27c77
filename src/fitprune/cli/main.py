"""The `fitprune` command: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failure, 2 wrong use. `--debug` shows an error's traceback. Each command is a file of this package
with `add`, which declares its options, and `run`; torch is imported only by the `run` that needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fitprune._version import __version__
from fitprune.cli import (
    analyze,
    benchmark,
    convert_llava_hr,
    cost,
    demo,
    env,
    evaluate,
    families,
    fit,
    generate,
    measure,
    profile,
    push,
    recipe,
    report,
    search,
    show,
)
from fitprune.cli.parser import Parser, shortened

# In the order of the data: from a model to a recipe, to answers, to tables.
GROUPS = {
    "from a model to a recipe": (recipe, measure, fit, search),
    "look at a recipe and share it": (show, cost, push),
    "use a recipe and judge it": (generate, evaluate, report),
    "time it on this device": (profile, benchmark),
    "more": (analyze, families, env, convert_llava_hr, demo),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="fitprune: %(message)s")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        more = "; run the same command again to go on" if args.resumable(args) else ""
        print(f"fitprune: interrupted{more}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        if args.debug:
            raise
        number = f"[Errno {error.errno}] " if isinstance(error, OSError) else ""
        message = " ".join(str(error).removeprefix(number).split()) or type(error).__name__
        print(f"fitprune: error: {shortened(message)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fitprune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  fitprune recipe digit-scenes --flops-reduction 0.6 -o r.json",
    )
    parser.add_argument("--version", action="version", version=f"fitprune {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="'fitprune COMMAND --help' shows its options"
    )
    lines = ["Fit a visual-token pruning recipe for a multimodal LLM to a budget, and use it. No training."]
    for title, modules in GROUPS.items():
        lines.append(f"\n{title}:")
        for module in modules:
            added = module.add(commands)
            name = added.prog.split()[-1]
            lines.append(f"  {name:<18}{(added.description or '').rstrip('.')}")
    parser.description = "\n".join(lines)
    return parser


if __name__ == "__main__":
    sys.exit(main())
