"""The `fitprune` command: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failure, 2 wrong use, 143 ended by SIGTERM. `--debug` shows an error's traceback. Each command is
a file of this package with `add`, which declares its options, and `run`; torch is imported only by the `run` that needs
it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points

from fitprune._version import __version__
from fitprune.cli import (
    analyze,
    app,
    benchmarks,
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
    score,
    search,
    serve,
    show,
    time,
)
from fitprune.cli.parser import HelpFormatter, Parser, shortened

# In the order of the data: from a model to a recipe, to answers, to tables.
GROUPS = {
    "from a model to a recipe": (recipe, measure, fit, search),
    "look at a recipe and share it": (show, cost, push),
    "use a recipe and judge it": (app, generate, serve, evaluate, report),
    "benchmarks and anybody's answers": (benchmarks, score),
    "time it on this device": (profile, time),
    "more": (analyze, families, env, convert_llava_hr, demo),
}

EXPECTED = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)  # of use, files and machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    handler = logging.StreamHandler()  # of our logger alone: what other libraries log is not ours
    handler.setFormatter(logging.Formatter("fitprune: %(message)s"))
    logging.getLogger("fitprune").addHandler(handler)
    own = threading.current_thread() is threading.main_thread()  # no other may set what a signal does
    if own:  # so that what is half written is removed
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args.run(args)
        if sys.stdout:  # which is None where a shell closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        more = "; run the same command again to go on" if args.resumable(args) else ""
        print(f"fitprune: interrupted{more}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        package = _plugin_of(error)
        if args.debug or not (package or isinstance(error, EXPECTED)):
            raise  # any other error is a bug of fitprune's, and its traceback is wanted
        number = f"[Errno {error.errno}] " if isinstance(error, OSError) else ""
        message = " ".join(str(error).removeprefix(number).split()) or type(error).__name__
        if package:
            kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
            message = f"{kind}{message}; in a plug-in of the package {package}, --debug shows where"
        print(f"fitprune: error: {shortened(message)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) and not package else 1
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)
        logging.getLogger("fitprune").removeHandler(handler)
    return 0


def _plugin_of(error: BaseException | None) -> str:
    """Name the package of the plug-in that an error, or the error that caused it, was raised in; "" for none."""
    known = {point.module.partition(".")[0] for group in env.GROUPS for point in entry_points(group=group)}
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
        ours = [name for name in names if name in known | {"fitprune"}]
        if ours and ours[-1] != "fitprune":  # the innermost: a plug-in's model may run our hooks
            return ours[-1]
        error = error.__cause__
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fitprune",
        formatter_class=HelpFormatter,
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
