"""A journal: results a line at a time, so that a killed run goes on where it stopped, alone or in several processes.

The first line says what run it is; every other is one record with a place. Only whole batches count: what a killed
process left of one is done again, so that a record never comes from a smaller batch than in an unbroken run. A damaged
line is left out, with a warning, and its record is made again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune._support import files

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Journal:
    """Records of one run, in a file for each process.

    Args:
        path: the journal; process 0 writes it, process r the same name with `.r` after it.
        run: what the run is; all that its results depend on. Of "entries", a mapping, another run may hold others, as
            long as those that both hold are the same.
        sound: whether a record is whole.
        rank: number of this process.

    Raises:
        ValueError: a file is there and is of another run.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run: Mapping[str, Any],
        sound: Callable[[Record], bool] = bool,
        rank: int = 0,
    ) -> None:
        self.path = Path(path)
        self.sound = sound
        self.run = json.loads(json.dumps(run))
        self.own = self.path if rank == 0 else self.path.with_name(f"{self.path.name}.{rank}")
        self._entries: dict[str, Any] = {}  # what records of earlier runs hold, of all that were read

    def done(self) -> dict[int, Record]:
        """Read what all processes have written: place -> record."""
        records: dict[int, Record] = {}
        for part in self._parts():
            records.update({record["place"]: record for record in self._read(part)})
        return records

    def open(self) -> None:
        """Make this process's file ready to append to: its header written, what is damaged left out."""
        records = self._read(self.own) if self.own.exists() else []
        # Records may hold entries that this run lacks: the header goes on saying what they are.
        mine = self.run.get("entries")
        more = {"entries": {**self._entries, **mine}} if isinstance(mine, dict) else {}
        self._write(self.own, records, {**self.run, **more})

    def append(self, records: Sequence[Record]) -> None:
        """Write the records of one batch."""
        try:
            with self.own.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            why = f"cannot write {self.own}: {error.strerror}; make room, and run again to go on"
            raise OSError(error.errno, why) from error

    def finish(self, records: Sequence[Record]) -> None:
        """Write all records in order as the journal, whole or not at all, and remove the other processes' files."""
        self._write(self.path, records, self.run)
        for part in self._parts():
            if part != self.path:
                part.unlink()

    def _parts(self) -> list[Path]:
        """The files of all processes."""
        others = [
            p for p in self.path.parent.glob(f"{self.path.name}.*") if p.name[len(self.path.name) + 1 :].isdigit()
        ]
        return [part for part in [self.path, *sorted(others)] if part.exists()]

    def _write(self, part: Path, records: Sequence[Record], run: Mapping[str, Any]) -> None:
        lines = [json.dumps({"run": run}), *(json.dumps(record) for record in records)]
        files.write_text(part, "\n".join(lines) + "\n")

    def _read(self, part: Path) -> list[Record]:
        """The sound records of a file; a line without its end is what a killed process left."""
        lines = part.read_bytes().split(b"\n")[:-1]
        if not lines:
            return []
        theirs = _parsed(lines[0])
        if not isinstance(theirs, dict) or not isinstance(theirs.get("run"), dict):
            raise ValueError(f"{part}: is no journal of this program; choose another output, or delete it")
        if len(lines) == 1:
            return []  # nothing was done yet: whatever run it was, nothing is lost
        if differing := self._differing(theirs["run"]):
            raise ValueError(
                f"{part}: holds results of another run (other {', '.join(differing)}); "
                "choose another output, or delete it to start again"
            )
        if isinstance(others := theirs["run"].get("entries"), dict):
            self._entries |= others
        records = []
        for number, line in enumerate(lines[1:], 2):
            record = _parsed(line)
            if isinstance(record, dict) and type(record.get("place")) is int and self.sound(record):
                records.append(record)
            else:
                logger.warning("%s:%d: damaged, left out; its record is made again", part, number)
        return records

    def _differing(self, theirs: Mapping[str, Any]) -> list[str]:
        """Name what another run did otherwise."""
        names = sorted({*theirs, *self.run} - {"entries"})
        # As text: another order of tasks is another run, whose places are those of other questions.
        differing = [name for name in names if json.dumps(theirs.get(name)) != json.dumps(self.run.get(name))]
        mine, others = self.run.get("entries", {}), theirs.get("entries", {})
        if not isinstance(others, dict) or not isinstance(mine, dict):
            return differing if mine == others else [*differing, "entries"]
        return differing + [f"entries {name}" for name in mine if name in others and mine[name] != others[name]]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
