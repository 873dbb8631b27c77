"""The paper's rule at one tolerance, for all samples: what every layer would keep. No model.

Legend: L layers, S samples, n visual tokens of the longest sample.
"""

from __future__ import annotations

import torch

from fitprune.fitting.stats import AttentionStats

_CHUNK = 32  # samples walked at a time: their working set stays in the processor's cache


class Simulation:
    """Walks all samples through the layers at a tolerance, on attention that was measured in the dense model."""

    def __init__(self, stats: AttentionStats) -> None:
        layers, samples, longest = stats.model.decoder.layers, len(stats), max(stats.visual_tokens)
        self.prunable = stats.model.decoder.prunable
        self.counts = torch.tensor(stats.visual_tokens)
        self.present = torch.arange(longest) < self.counts[:, None]  # [S, n]
        self.sides = []  # for self and cross attention: values ascending [L, S, n], their places [L, S, n], sums [L, S]
        for attention in (stats.self_attention, stats.cross_attention):
            padded = torch.full((layers, samples, longest), float("inf"))
            padded.masked_scatter_(self.present.expand(layers, -1, -1), attention.float())
            value, order = padded.sort(dim=2, stable=True)
            value.masked_fill_(value.isinf(), 0)
            self.sides.append((value, order, value.sum(2)))
        self.walks: dict[float, torch.Tensor] = {}  # tolerance -> [S, L] fp64, of `kept_by_sample`

    def kept_by_sample(self, tolerance: float) -> torch.Tensor:
        """Give the [S, L] fp64 fractions of visual tokens left after each layer; each tolerance is walked once."""
        if tolerance not in self.walks:
            starts = range(0, len(self.counts), _CHUNK)
            self.walks[tolerance] = torch.cat([self._chunk(slice(s, s + _CHUNK), tolerance) for s in starts])
        return self.walks[tolerance]

    def walk(self, tolerance: float, samples: torch.Tensor) -> torch.Tensor:
        """Give the same for some samples, by index, without keeping it."""
        return torch.cat([self._chunk(rows, tolerance) for rows in torch.split(samples, _CHUNK)])

    def _chunk(self, rows: slice | torch.Tensor, tolerance: float) -> torch.Tensor:
        """Give the [chunk's samples, L] fractions left after each layer.

        The rule is that of `rules.lowest_in_both`, written a second time: there a layer sorts the tokens that are
        present, here orders are sorted once for all tolerances, and a layer costs gathers and running sums only.
        `tests/fitting/test_rules.py` checks that the two are equal.
        """
        present = self.present[rows].clone()
        original = self.counts[rows].double()
        fractions: list[torch.Tensor] = []
        for layer in range(len(self.sides[0][0])):
            if layer not in self.prunable:
                fractions.append(fractions[-1] if fractions else torch.ones_like(original))
                continue
            leaving = present
            for values, orders, totals in self.sides:
                value, order = values[layer, rows], orders[layer, rows]
                running = (value * present.gather(1, order)).cumsum(1)
                slack = running[:, -1] - (1 - tolerance) * totals[layer, rows]
                removable = running <= slack[:, None]
                leaving = leaving & torch.empty_like(removable).scatter_(1, order, removable)
            present &= ~leaving
            fractions.append(present.sum(1) / original)
        return torch.stack(fractions, 1)
