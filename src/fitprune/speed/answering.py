"""One answer with its clock: tokens as they come, and the bytes of the KV cache at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fitprune._support.host import cache_in
from fitprune.speed.clocks import now


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """A greedy answer to one prompt.

    Attributes:
        ids: its tokens [1, tokens].
        first_seconds: from the call of generate to the first token; image encoder and prefill.
        token_seconds: of each further token, mean; None where there is one alone.
        kv_bytes: keys and values in the cache at the end, padding included.
    """

    ids: torch.Tensor
    first_seconds: float
    token_seconds: float | None
    kv_bytes: int


def timed_answer(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> TimedAnswer:
    """Answer one prompt greedily, dense or inside `prune`.

    Args:
        model: a supported model.
        inputs: of one prompt, on the model's device.
        max_new_tokens: longest answer.
    """
    clock = _Clock(model)
    begin = now(model)
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=clock,
        return_dict_in_generate=True,
    )  # fmt: skip
    times = clock.times[1:]  # generate passes the prompt first
    steps = len(times) - 1
    layers = getattr(cache_in(output), "layers", [])
    values = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return TimedAnswer(
        output.sequences[:, inputs["input_ids"].shape[1] :],
        times[0] - begin,
        (times[-1] - times[0]) / steps if steps else None,
        sum(value.nbytes for value in values if isinstance(value, torch.Tensor)),
    )


class _Clock:
    """What generate takes for a streamer: notes when tokens come."""

    def __init__(self, model: Any) -> None:
        self.times: list[float] = []
        self._model = model

    def put(self, _: torch.Tensor) -> None:
        self.times.append(now(self._model))

    def end(self) -> None:
        """Do nothing: generate says here that the answer is over."""
