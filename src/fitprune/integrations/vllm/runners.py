"""What vLLM's two model runners know of a request, read alike: the only code that differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch


@dataclasses.dataclass
class PromptFacts:
    """A request's prompt, as vLLM's runner holds it.

    Attributes:
        length: tokens of the prompt, Q; an answer that was begun before a preemption is not among them.
        features: what is no text in it, vLLM's MultiModalFeatureSpec, in the order of their places.
        ids: gives the prompt's token ids, [Q] int64.
    """

    length: int
    features: list[Any]
    ids: Callable[[], torch.Tensor]


class Runner(Protocol):
    """One of vLLM's model runners."""

    @property
    def block_size(self) -> int:
        """Tokens of a block of its block table; known once there is a KV cache."""

    def name(self, row: int, common: Any) -> str:
        """Give the request's id of a row of the step, by its metadata; "" if it is no request's."""

    def holds(self, name: str) -> bool:
        """Say whether a request of that id is there."""

    def prompt(self, row: int, common: Any) -> PromptFacts | None:
        """Read the prompt of a row of the step, by its metadata; None if no request has it, as in vLLM's dry runs."""


class RunnerV1:
    """vllm.v1.worker.gpu_model_runner.GPUModelRunner, or a child of it."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @property
    def block_size(self) -> int:
        """Tokens of a block; known once there is a KV cache."""
        return int(self._runner.input_batch.block_table[0].block_size)

    def name(self, row: int, common: Any) -> str:
        """Read as `Runner` says; rows are those of its input batch."""
        names = self._runner.input_batch.req_ids
        return str(names[row]) if row < len(names) else ""

    def holds(self, name: str) -> bool:
        """Read as `Runner` says."""
        return name in self._runner.requests

    def prompt(self, row: int, common: Any) -> PromptFacts | None:
        """Read as `Runner` says."""
        batch, request = self._runner.input_batch, self._runner.requests.get(self.name(row, common))
        if request is None:
            return None
        return PromptFacts(
            int(batch.num_prompt_tokens[row]),
            _in_order(request.mm_features),
            lambda: torch.tensor(request.prompt_token_ids),
        )


class RunnerV2:
    """vllm.v1.worker.gpu.model_runner.GPUModelRunner, or a child of it."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @property
    def block_size(self) -> int:
        """Tokens of a block; known once there is a KV cache."""
        return int(self._runner.block_tables.block_sizes[0])

    def name(self, row: int, common: Any) -> str:
        """Read as `Runner` says; the metadata names the rows of its states."""
        return str(self._runner.req_states.index_to_req_id.get(int(common.req_idx[row]), ""))

    def holds(self, name: str) -> bool:
        """Read as `Runner` says."""
        return name in self._runner.req_states.req_id_to_index

    def prompt(self, row: int, common: Any) -> PromptFacts | None:
        """Read as `Runner` says."""
        states, cache = self._runner.req_states, self._runner.encoder_cache
        index, name = int(common.req_idx[row]), self.name(row, common)
        if not name:
            return None
        length = int(states.prompt_len.np[index])
        features = cache.mm_features.get(name, ()) if cache is not None else ()
        return PromptFacts(length, _in_order(features), lambda: states.all_token_ids.gpu[index, :length].long().cpu())


def reader_of(runner: Any) -> Runner:
    """Give the reader of a model runner.

    Args:
        runner: the worker's.

    Raises:
        ValueError: it is none of vLLM's two.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    if isinstance(runner, SecondRunner):
        return RunnerV2(runner)
    if isinstance(runner, FirstRunner):
        return RunnerV1(runner)
    kind = type(runner)
    raise ValueError(
        f"fitprune: model runner {kind.__qualname__} of {kind.__module__}: must be GPUModelRunner of "
        "vllm.v1.worker.gpu_model_runner or of vllm.v1.worker.gpu.model_runner, or a child of one"
    )


def _in_order(features: Any) -> list[Any]:
    return sorted(features, key=lambda feature: feature.mm_position.offset)
