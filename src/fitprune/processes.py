"""The processes of one run, under `accelerate launch` or torchrun; alone, one."""

from __future__ import annotations

import os
from typing import Any


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
            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count = self._state.process_index, self._state.num_processes

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()
