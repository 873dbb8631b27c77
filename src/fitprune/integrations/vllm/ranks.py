"""Tensor parallelism: what the ranks that hold a layer's heads between them exchange, to choose as one device would.

Received attention is a sum over rows of the maximum over heads, so no rank can make its part of it of its own heads.
Where tokens may leave, ranks gather queries, keys and values of all heads; a scorer sees the whole layer, whatever it
reads. Each then sums a share of the rows, and the sums are added up. Last, all take what rank 0 chose: they hold the
same hidden states, but how a collective rounds may differ between them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fitprune.scoring.received import Attention


class TensorRanks:
    """The ranks of a tensor-parallel group, as `fitprune.scoring.received.Ranks`. One alone exchanges nothing.

    Args:
        group: vLLM's GroupCoordinator.
        kv_heads: key/value heads of a layer, on all ranks together. Where there are fewer than ranks, some have the
            same.
    """

    def __init__(self, group: Any, kv_heads: int) -> None:
        self._group, self._copies = group, max(1, group.world_size // kv_heads)
        self.number: int = group.rank_in_group
        self.count: int = group.world_size

    @classmethod
    def of(cls, vllm_config: Any) -> TensorRanks:
        """Give those of this worker.

        Args:
            vllm_config: the engine's VllmConfig.
        """
        from vllm.distributed.parallel_state import get_tp_group

        return cls(get_tp_group(), vllm_config.model_config.get_total_num_kv_heads())

    def whole(self, own: Attention) -> Attention:
        """Gather the heads of all ranks.

        Args:
            own: of this rank's heads.
        """
        if self.count == 1:
            return own
        query, key, value = (self._gathered(part, 1) for part in (own.query, own.key, own.value))
        sinks = own.softmax.sinks
        softmax = own.softmax if sinks is None else dataclasses.replace(own.softmax, sinks=self._gathered(sinks, 0))
        return Attention(query, key[:, :: self._copies], value[:, :: self._copies], softmax, ranks=self)

    def sum(self, share: torch.Tensor) -> torch.Tensor:
        """Add up the ranks' shares; see `fitprune.scoring.received.Ranks`."""
        total: torch.Tensor = self._group.all_reduce(share)
        return total

    def agreed(self, stays: torch.Tensor) -> torch.Tensor:
        """Give what rank 0 chose.

        Args:
            stays: bool, this rank's choice.
        """
        agreed: torch.Tensor = self._group.broadcast(stays.byte(), src=0)
        return agreed.bool()

    def _gathered(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        gathered: torch.Tensor = self._group.all_gather(part.contiguous(), dim)
        return gathered
