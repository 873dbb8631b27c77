"""Named things of one kind: the library's own, those registered at run time, and those of installed packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from fitprune._support.messages import line

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextlib.contextmanager
def failures_of(what: str) -> Iterator[None]:
    """Make a ValueError that says whose it is of what code from outside raises; fitprune's own ValueErrors stay.

    Args:
        what: whose the code is: "scorer 'late'".

    Raises:
        ValueError: the code raised an error, or would end the process. Want of memory passes as it is, and so does the
            end that a signal's handler asks for while the code runs.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        modules = type(error).__module__, place.tb_frame.f_globals.get("__name__") if place else None
        own = isinstance(error, ValueError) and any(str(module).startswith("fitprune.") for module in modules)
        if own or "Memory" in type(error).__name__ or _of_signal(error):  # the memory errors of Python and of torch
            raise
        kind = "" if type(error) is ValueError else f" failed: {type(error).__name__}"
        raise ValueError(f"{what}{kind}: {line(error, 300)}") from error


def _of_signal(error: BaseException) -> bool:
    """Say whether a signal's handler raised it, as those of vLLM's workers do; they do so once."""
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things of one kind, which other packages can extend.

    A package adds one by an entry point of the group: its name is the thing's, its object the thing itself. It is
    imported when the name is first asked for, so a name works in every process where the package is installed: in the
    command line, in lmms-eval, in a vLLM worker. `add` adds one to this process alone. An entry point whose name `add`
    would not take is left out, with one warning.

    Args:
        kind: what the things are, for messages: "scorer".
        group: the entry points' group: "fitprune.scorers".
        types: what a thing must be an instance of.
        builtin: the library's own.
        reserved: names that nothing may have, and why: {"all": "stands for all of them"}.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        types: type | tuple[type, ...],
        builtin: Mapping[str, T],
        reserved: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self._types = types
        self._builtin = dict(builtin)
        self._reserved = dict(reserved or {})
        self._left_out: set[str] = set()  # names of entry points that the log has a warning of
        self._added: dict[str, T] = {}
        self._lock = threading.Lock()

    def add(self, name: str, thing: T, *, replace: bool = False) -> None:
        """Register a thing in this process.

        Args:
            name: not empty; letters, digits, "-", "_" and ".".
            thing: of the registry's kind.
            replace: take the place of one that `add` registered under this name.

        Raises:
            ValueError: the name is not allowed or is taken, or the thing is of another kind.
        """
        self._check(name, thing, "registered")
        if why := self._refusal(name):
            raise ValueError(f"{why}; choose another name")
        with self._lock:
            if name in self._added and not replace:
                raise ValueError(
                    f"{self.kind} {name!r}: is registered already; choose another name, or pass replace=True"
                )
            self._added[name] = thing

    def _refusal(self, name: str) -> str | None:
        """Say why nothing from outside may have a name; None if it may."""
        if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_." for c in name):
            return f"{self.kind} name {name!r}: must be letters, digits, '-', '_' and '.'"
        if name in self._reserved:
            return f"{self.kind} name {name!r}: {self._reserved[name]}"
        if name in self._builtin:
            return f"{self.kind} {name!r}: is one of fitprune's own, which cannot change"
        return None

    def _check(self, name: str, thing: T, how: str) -> None:
        if not isinstance(thing, self._types):
            types = self._types if isinstance(self._types, tuple) else (self._types,)
            raise ValueError(
                f"{self.kind} {name!r}: {how} as {type(thing).__name__}, must be "
                f"{' or '.join(kind.__name__ for kind in types)}"
            )

    def _entry_points(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        points: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            if why := self._refusal(point.name):
                if point.name not in self._left_out:
                    self._left_out.add(point.name)
                    logger.warning("%s; the entry point %r of an installed package is left out", why, point.value)
                continue
            same = points.setdefault(point.name, [])
            if point not in same:  # a package that is found twice on the path
                same.append(point)
        return points

    def __getitem__(self, name: str) -> T:
        """Find a thing by its name.

        Args:
            name: its name.

        Raises:
            KeyError: nothing has this name.
            ValueError: two packages have it, or the package's object cannot be imported or is of another kind.
        """
        if name in self._builtin:
            return self._builtin[name]
        with self._lock:
            if name in self._added:
                return self._added[name]
        points = self._entry_points().get(name, [])
        if not points:
            raise KeyError(name)
        if len(points) > 1:
            values = ", ".join(point.value for point in points)
            raise ValueError(f"{self.kind} {name!r}: several packages have one ({values}); uninstall all but one")
        try:
            thing = points[0].load()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{self.kind} {name!r}: its entry point {points[0].value!r} cannot be imported "
                f"({type(error).__name__}: {error}); mend or uninstall the package that has it"
            ) from error
        self._check(name, thing, f"found at the entry point {points[0].value!r}")
        with self._lock:
            return self._added.setdefault(name, thing)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._builtin, *self._added, *sorted(self._entry_points())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:  # Mapping's own would import an entry point
        return name in self._builtin or name in self._added or name in self._entry_points()
