"""Whose call is running: the one owner of what is looked up by thread, by task, or by a call's images."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from fitprune.engine.kept import Prefill
from fitprune.engine.running import RunningPrefill, RunningStep
from fitprune.families.adapter import AdaptedModel

Running = RunningPrefill | RunningStep

# The decoders whose calls run dense, of a thread or of a task of asyncio; once for each block that pauses them.
_PAUSED: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("paused", default=())


@contextlib.contextmanager
def paused(adapted: AdaptedModel) -> Iterator[None]:
    """Let the calls of this thread or task run as in the dense model, until the block ends."""
    _PAUSED.set((*_PAUSED.get(), adapted.decoder))
    try:
        yield
    finally:  # blocks may end in another order than they began
        remaining = list(_PAUSED.get())
        remaining.remove(adapted.decoder)
        _PAUSED.set(tuple(remaining))


@dataclasses.dataclass(frozen=True)
class _UncachedStep:
    """The last step of decoding without a cache.

    Attributes:
        images: its images.
        prompt: [B, N], the prompt that the decoding began with.
        length: columns of the step, answer included.
    """

    images: weakref.ref[Any]
    prompt: torch.Tensor
    length: int


class Calls:
    """The calls of one model that run now, by thread, and what earlier ones left for later ones.

    Args:
        adapted: the model.

    Attributes:
        lock: while it is held no call begins.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.lock = threading.Lock()
        self._decoder = adapted.decoder
        # By thread, innermost last: a hook may call the model again. None is a call that neither prunes nor continues.
        self._running: dict[int, list[Running | None]] = {}
        self._uncached: dict[int, _UncachedStep] = {}  # by the id of the images
        self._of_thread = threading.local()
        self._latest: Prefill | None = None

    @property
    def paused(self) -> bool:
        """Whether calls of this thread or task run dense."""
        return self._decoder in _PAUSED.get()

    def enter(self) -> None:
        """Note that a call of this thread begins; `leave` undoes it in any case."""
        with self.lock:
            self._running.setdefault(threading.get_ident(), []).append(None)

    def begin(self, running: Running) -> None:
        """Set what this thread's innermost call does."""
        self._running[threading.get_ident()][-1] = running

    @property
    def inside(self) -> bool:
        """Whether this thread is inside a call."""
        return bool(self._running.get(threading.get_ident()))

    @property
    def current(self) -> Running | None:
        """What this thread's innermost call does; None if it runs as in the dense model."""
        calls = self._running.get(threading.get_ident())
        return calls[-1] if calls else None

    @property
    def prefill(self) -> RunningPrefill | None:
        """The prefill that this thread's innermost call is; None if it is another call."""
        return current if isinstance(current := self.current, RunningPrefill) else None

    def leave(self) -> None:
        """Discard this thread's innermost call, which has ended or failed."""
        calls = self._running.get(threading.get_ident(), [])
        if calls:
            calls.pop()
        if not calls:
            self._running.pop(threading.get_ident(), None)

    def is_only_one(self) -> bool:
        """Whether this thread's outermost call is the only one that runs."""
        return list(self._running) == [threading.get_ident()] and len(self._running[threading.get_ident()]) == 1

    def require_no_others(self) -> None:
        """Refuse to end while other threads are inside a call, which loses its hooks.

        Raises:
            ValueError: some are.
        """
        if others := set(self._running) - {threading.get_ident()}:
            raise ValueError(
                f"{len(others)} other thread(s) are inside a call of the pruned model, which now fails or is wrong: "
                "join them before leaving the prune block"
            )

    def finish(self, record: Prefill) -> None:
        """Keep what a prefill of this thread kept."""
        self._latest = self._of_thread.last = record

    @property
    def last(self) -> Prefill | None:
        """What this thread's last prefill with images kept, or any thread's where this one had none."""
        return getattr(self._of_thread, "last", self._latest)

    def prompt_length(self, images: Any, ids: torch.Tensor) -> int:
        """Length of the prompt in a call without a cache, which may repeat the last one with one more token.

        Args:
            images: the call's images; a decoding passes the same object at every step.
            ids: [B, N], prompt and answer so far.
        """
        self._uncached = {key: step for key, step in self._uncached.items() if step.images() is not None}
        before, prompt, length = self._uncached.get(id(images)), ids, ids.shape[1]
        if before is not None and before.length == length - 1 and before.prompt.shape[0] == len(ids):
            # Beams reorder the answer so far, never the prompt.
            prompt = before.prompt if torch.equal(ids[:, : before.prompt.shape[1]], before.prompt) else ids
        self._uncached[id(images)] = _UncachedStep(weakref.ref(images), prompt, length)
        return int(prompt.shape[1])
