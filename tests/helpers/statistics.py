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


def statistics_of(own, cross=None, counts=None, model=None):
    """Statistics of this attention [L, T]; by default one sample, and cross attention equal to self attention."""
    own = torch.as_tensor(own, dtype=torch.float32)
    cross = own if cross is None else torch.as_tensor(cross, dtype=torch.float32)
    counts = counts or (own.shape[1],)
    model = model or ModelFingerprint("llava", DecoderSizes(len(own), 8, 16, 2, 2, 4))
    return AttentionStats(own, cross, counts, (5,) * len(counts), tuple(map(str, range(len(counts)))), model)
