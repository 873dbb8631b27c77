"""A journal: results a line at a time, so that a killed run goes on where it stopped, alone or in several processes.

The first line says what run it is; every other is one record with a place. Only whole batches count: what a killed
process left of one is done again, so that a record never comes from a smaller batch than in an unbroken run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune import files

Record = dict[str, Any]


class Journal:
    """Records of one run, in a file for each process.

    Args:
        path: the journal; process 0 writes it, process r the same name with `.r` behind it.
        run: what the run is; all that its results depend on.
        rank: number of this process.

    Raises:
        ValueError: a file is there and is of another run.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any], rank: int = 0) -> None:
        self.path = Path(path)
        self.run = json.loads(json.dumps(run))
        self.own = self.path if rank == 0 else self.path.with_name(f"{self.path.name}.{rank}")

    def done(self) -> dict[int, Record]:
        """Read what all processes have written: place -> record."""
        found: dict[int, Record] = {}
        for part in self._parts():
            found.update({record["place"]: record for record in self._read(part)[0]})
        return found

    def open(self) -> None:
        """Make this process's file ready to append to: its header written, a half line at its end cut off."""
        if self.own.exists():
            whole = self._read(self.own)[1]
            os.truncate(self.own, whole)
            if whole:
                return
        files.require_writable(self.own)
        self.own.write_text(json.dumps({"run": self.run}) + "\n", encoding="utf-8")

    def append(self, records: Sequence[Record]) -> None:
        """Write the records of one batch."""
        with self.own.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def finish(self, records: Sequence[Record]) -> None:
        """Write all records in order as the journal, whole or not at all, and remove the other processes' files."""
        lines = [json.dumps({"run": self.run}), *(json.dumps(record) for record in records)]
        with files.replacing(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for part in self._parts():
            if part != self.path:
                part.unlink()

    def _parts(self) -> list[Path]:
        """The files of all processes."""
        others = [
            p for p in self.path.parent.glob(f"{self.path.name}.*") if p.name[len(self.path.name) + 1 :].isdigit()
        ]
        return [part for part in [self.path, *sorted(others)] if part.exists()]

    def _read(self, part: Path) -> tuple[list[Record], int]:
        """The records of a file, and the bytes up to the end of its last whole line."""
        data = part.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not whole:
            return [], 0
        try:
            header, *records = [json.loads(line) for line in data[:whole].decode().splitlines()]
            theirs = header["run"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{part}: is no journal of an evaluation; choose another output, or delete it") from None
        if theirs != self.run:
            names = sorted({*theirs, *self.run}) if isinstance(theirs, dict) else []
            differing = [name for name in names if theirs.get(name) != self.run.get(name)]
            raise ValueError(
                f"{part}: holds results of another run (other {', '.join(differing) or 'header'}); "
                "delete it to start anew, or choose another output"
            )
        return records, whole
