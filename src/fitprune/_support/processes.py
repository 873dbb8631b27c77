"""The processes of one run, under `accelerate launch` or torchrun; alone, one."""

from __future__ import annotations

import datetime
import os
from typing import Any, TypeVar

T = TypeVar("T")
# One process may wait for another's whole share; torch's own limit of some minutes would end the run. Where one has
# died, the launcher ends the others.
LONGEST_WAIT = datetime.timedelta(days=1)


class Processes:
    """Which of how many processes this is.

    Attributes:
        rank: number of this process, 0 to count - 1.
        count: how many there are.

    Raises:
        ImportError: there are several, and accelerate is not installed.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch

            try:
                from accelerate import PartialState
            except ImportError:
                raise ImportError("several processes need accelerate: pip install accelerate") from None
            self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
            self.rank, self.count = self._state.process_index, self._state.num_processes

    def has(self, batch: int) -> bool:
        """Whether the batch of this number is this process's: they are dealt in turn."""
        return batch % self.count == self.rank

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def gather(self, value: T) -> list[T]:
        """Give every process the values of all, in the order of their ranks; waits until all have come here."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values
