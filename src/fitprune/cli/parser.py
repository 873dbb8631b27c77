"""The command line's own argparse: errors of one line that name what was meant, and the types of option values."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from fitprune.costs.sizes import MOST_TOKENS

LONGEST_MESSAGE = 600  # characters of an error; a longer one quotes a file, and is cut in the middle
HINTS = {
    "benchmark": "'fitprune benchmark' is now 'fitprune time'; question sets are 'fitprune benchmarks' and "
    "'fitprune evaluate --benchmark'",
    "--objective": "--objective is gone: 'fitprune fit' is the paper's rule (attention); for output use 'fitprune "
    "search MODEL --stats STATS --data DATA'",
    "--shape": "--shape is now --random-model",
    "--prefill-latency-reduction": "unknown: --prefill-latency-reduction; only 'fitprune recipe' and "
    "'fitprune fit' have it",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks the line of a group of options, which argparse leaves whole whatever its length."""

    def _format_usage(self, *args: Any) -> str:
        lines = []
        for line in super()._format_usage(*args).splitlines():
            indent = " " * (len(line) - len(line.lstrip()) + 1)
            lines += textwrap.wrap(line, self._width, subsequent_indent=indent, break_on_hyphens=False) or [""]
        return "\n".join(lines) + "\n\n"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what was meant where that can be guessed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a command refuses what it does not know, which argparse would leave to its parent.

        A command with a default for `unknown` gets it there, without the first "--".
        """
        self.words = list(sys.argv[1:] if args is None else args)
        result, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:
            if not hasattr(result, "unknown"):
                self.error(f"unknown: {' '.join(unknown)}")
            if "--" in unknown:
                unknown.remove("--")
            result.unknown, unknown = unknown, []
        return result, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            if str(value) in HINTS:
                self._exit(HINTS[str(value)])
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r}: must be one of {', '.join(choices)}{_nearest(value, choices)}"
            )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        known = list(self._option_string_actions)
        options = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        stray = [option for option in options if not any(name.startswith(option) for name in known)]
        if hint := next((HINTS[option] for option in stray if option in HINTS), None):
            self._exit(hint)
        for group in self._mutually_exclusive_groups:
            names = [option for action in group._group_actions for option in action.option_strings]
            if group.required and message.startswith("the following") and not set(names) & set(self.words):
                message += f"; and one of {', '.join(names)}"
        if stray and "did you mean" not in message:
            message += _nearest(stray[0], known)
        self._exit(message)

    def _exit(self, message: str) -> NoReturn:
        self.exit(2, f"fitprune: error: {shortened(message)}; see '{self.prog} --help'\n")


def shortened(message: str) -> str:
    """Cut a message in the middle to `LONGEST_MESSAGE` characters."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def whole(least: int, most: int = MOST_TOKENS) -> Callable[[str], int]:
    """Make the type of an integer from `least` to `most`."""

    def read(text: str) -> int:
        number = text.strip()
        if len(number) <= 20 and number.isascii() and number.isdecimal() and least <= int(number) <= most:
            return int(number)
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be an integer of at least {least} and at most {most:,}")

    return read


positive = whole(1)
seed = whole(0, 2**32 - 1)


def _filled(what: str) -> Callable[[str], str]:
    """Make the type of text that is not empty."""

    def read(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError(f"{text!r}: must be the name of {what}")
        return text

    return read


path = _filled("a file or folder")
recipe = _filled("a recipe")


def template(text: str) -> str:
    r"""Read a prompt template: \n and \t, which a shell's quotes leave as they are, become a new line and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
