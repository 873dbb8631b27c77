"""Two or more answers that grow in turn, a token each, while one pass at a time runs on the device.

`generate` runs in a thread for each answer and waits at every token, so that the time of a token is that of its own
pass, and answers stream side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from typing import Any

from transformers.generation.streamers import BaseStreamer

Generate = Callable[[BaseStreamer], Any]  # calls `generate` with the streamer


@dataclasses.dataclass
class Answer:
    """An answer so far.

    Attributes:
        ids: its tokens.
        seconds: of each token's pass; the first is the prefill.
        done: whether it has ended.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    done: bool = False

    @property
    def first_seconds(self) -> float | None:
        """Seconds to the first token; None before it."""
        return self.seconds[0] if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is none."""
        return (len(self.seconds) - 1) / sum(self.seconds[1:]) if len(self.seconds) > 1 else None


class _Left(Exception):
    """Ends a generation whose answer nobody waits for any more."""


class _Turn(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """A generation in another thread that goes one token ahead each time that `step` is called."""

    def __init__(self, generate: Generate, threads: Executor) -> None:
        self._go = threading.Semaphore(0)
        self._tokens: queue.SimpleQueue[tuple[list[int], float] | BaseException | None] = queue.SimpleQueue()
        self._left = self._has_prompt = False
        self._began = 0.0
        self._running = threads.submit(self._run, generate)

    def _run(self, generate: Generate) -> None:
        try:
            self._wait()
            generate(self)
        except _Left:
            pass
        except BaseException as error:
            self._tokens.put(error)
        self._tokens.put(None)

    def _wait(self) -> None:
        self._go.acquire()
        if self._left:
            raise _Left
        self._began = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take what `generate` hands over: the prompt, and then one token at a time."""
        if self._has_prompt:
            self._tokens.put((value.tolist(), time.perf_counter() - self._began))
            self._wait()
        self._has_prompt = True

    def end(self) -> None:
        """Be called when the answer has ended; `_run` sees that itself."""

    def step(self, answer: Answer) -> None:
        """Run until the next token, and add it to the answer."""
        self._go.release()
        token = self._tokens.get()
        if isinstance(token, BaseException):
            raise token
        if token is None:
            answer.done = True
        else:
            answer.ids += token[0]
            answer.seconds.append(token[1])

    def leave(self) -> None:
        """End the generation, and wait for its end."""
        self._left = True
        self._go.release()
        self._running.result()


def in_turn(generates: Sequence[Generate], threads: Executor) -> Generator[list[Answer]]:
    """Let answers grow in turn.

    Args:
        generates: one function for each answer.
        threads: where they run; as many as there are answers.

    Yields:
        All answers, after each token of one of them. Closing the iterator ends them.
    """
    answers = [Answer() for _ in generates]
    with contextlib.ExitStack() as stack:
        turns = [_Turn(generate, threads) for generate in generates]
        for turn in turns:
            stack.callback(turn.leave)
        while not all(answer.done for answer in answers):
            for turn, answer in zip(turns, answers, strict=True):
                if not answer.done:
                    turn.step(answer)
                    yield [dataclasses.replace(each, ids=[*each.ids], seconds=[*each.seconds]) for each in answers]
