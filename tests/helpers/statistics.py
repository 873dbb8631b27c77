"""Attention statistics that no model was measured for."""

import torch

from fitprune import AttentionStats
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint

SHAPE = ModelFingerprint("llava", DecoderSizes(8, 64, 128, 4, 4, 16))


def synthetic(samples=20, counts=(144,), layers=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    visual = tuple(counts[i % len(counts)] for i in range(samples))

    def draw():
        return torch.randn(layers, sum(visual), generator=generator).mul(1.5).exp()

    digests = tuple(str(i) for i in range(samples))
    return AttentionStats(draw(), draw(), visual, (20,) * samples, digests, SHAPE)
