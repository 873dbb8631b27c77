"""Parameters of scorers, fitted on calibration data: which heads matter, and what places receive anyway.

A head of a layer matters as far as its attention predicts what later layers will read. So the weights of a place's
heads are those non-negative ones with which their attention comes closest, in least squares, to the attention that the
dense model's later layers pay. One dense pass gives all that is needed; no gradient is taken.

Legend: B samples, Q columns, H query heads; place 2 * layer is before that layer, 2 * layer + 1 inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fitprune.output_search.divergence import Heads
from fitprune.scoring.by_head import HEAD_KINDS

PROFILE = 64  # entries at most of the usual attention along an image
_SMALLEST = 0.01  # weights below this share of the largest are left out


class HeadChoice:
    """Gathers what the dense model's heads receive, batch by batch, and fits scorers' parameters to it.

    Args:
        visual_tokens: of a usual image.

    Attributes:
        samples: how many were added.
    """

    def __init__(self, visual_tokens: int) -> None:
        self.samples = 0
        self.places = min(visual_tokens, PROFILE)
        # By place: Gram matrix of the heads' attention, its products with the target. By layer: sums and counts.
        self._gram: dict[int, torch.Tensor] = {}
        self._product: dict[int, torch.Tensor] = {}
        self._profile: dict[int, torch.Tensor] = {}

    def add(self, batch: Iterable[tuple[int, Heads]]) -> None:
        """Add one batch, as `Judge.watch` gives it."""
        layers = list(batch)
        self.samples += len(layers[0][1].used)
        later = torch.zeros_like(layers[0][1].used)
        for layer, heads in reversed(layers):
            for place in (2 * layer + 1, 2 * layer):  # inside the layer only later ones still read
                if place % 2 == 0:
                    later = later + heads.used
                self._add(place, heads, later)
            self._count(layer, heads)

    def _add(self, place: int, heads: Heads, later: torch.Tensor) -> None:
        for received, target, image in zip(heads.received, later, heads.image, strict=True):
            member = image >= 0
            x, y = received[member].double(), target[member].double()
            y = y / y.mean().clamp(min=1e-12)  # each sample counts alike
            gram, product = (x.T @ x).cpu(), (x.T @ y).cpu()
            self._gram[place] = self._gram.get(place, 0) + gram
            self._product[place] = self._product.get(place, 0) + product

    def _count(self, layer: int, heads: Heads) -> None:
        """Add up the question's mean attention by place in the image."""
        width = heads.received.shape[2] // len(HEAD_KINDS)
        mean = heads.received[..., HEAD_KINDS.index("mean") * width :][..., :width].mean(2)
        sums, counts = self._profile.get(layer, torch.zeros(2, self.places, dtype=torch.float64))
        for row, image in zip(mean, heads.image, strict=True):
            for number in range(int(image.max()) + 1):
                values = row[image == number].double().cpu()
                place = torch.arange(len(values)) * self.places // max(len(values), 1)
                sums = sums.index_add(0, place, values)
                counts = counts.index_add(0, place, torch.ones_like(values))
        self._profile[layer] = torch.stack([sums, counts])

    def terms(self, place: int) -> list[list[Any]]:
        """Weigh the heads for a place: (kind, head, weight) as the scorer "heads" takes them, heaviest first."""
        gram, product = self._gram[place], self._product[place]
        scale = gram.diagonal().sqrt().clamp(min=1e-12)
        weight = non_negative_least_squares(gram / scale[:, None] / scale, product / scale)
        share = weight / weight.max().clamp(min=1e-12)
        width = len(weight) // len(HEAD_KINDS)
        terms = [
            [HEAD_KINDS[i // width], i % width, float(f"{weight[i] / scale[i]:.4g}")]
            for i in share.argsort(descending=True).tolist()
            if share[i] >= _SMALLEST
        ]
        return terms or [["mean", head, 1.0] for head in range(width)]

    def profile(self, layer: int) -> list[float]:
        """The question's mean attention along an image's tokens in a layer, as the scorer "debiased" takes it."""
        sums, counts = self._profile[layer]
        return [float(f"{value:.4g}") for value in sums / counts.clamp(min=1)]


def non_negative_least_squares(gram: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """Minimise w G w / 2 - b w over w >= 0.

    Args:
        gram: G, [n, n] fp64, positive semidefinite, its diagonal 1 (or 0).
        product: b, [n] fp64.

    Returns:
        w, [n] fp64.

    Source: the active-set method of Lawson and Hanson (1974), on the Gram matrix (Bro and de Jong, 1997).
    """
    matrix, target = gram.numpy(), product.numpy()
    weight, free = np.zeros_like(target), np.zeros(len(target), dtype=bool)
    enough = 1e-10 * max(1e-12, float(np.abs(target).max(initial=0)))
    for _ in range(3 * len(target)):
        slope = np.where(free, -np.inf, target - matrix @ weight)
        if not slope.max(initial=-np.inf) > enough:
            break
        free[slope.argmax()] = True
        while True:
            solved = np.zeros_like(target)
            solved[free] = np.linalg.lstsq(matrix[np.ix_(free, free)], target[free], rcond=None)[0]
            below = free & (solved <= 0)
            if not below.any():
                break
            # As far towards it as all stay above zero; what reaches zero stays there.
            reach = weight[below] / np.maximum(weight[below] - solved[below], 1e-300)
            weight += reach.min() * (solved - weight)
            free[np.flatnonzero(below)[reach == reach.min()]] = False
            weight[~free] = 0
        weight = solved
    return torch.from_numpy(weight)


def specs(choice: HeadChoice, name: str, place: int, diversity: float) -> Mapping[str, Any]:
    """Make a scorer for a place, as a recipe holds it, with the parameters fitted to that place.

    Args:
        choice: with all batches added.
        name: of the scorer.
        place: where tokens leave.
        diversity: see `fitprune.scoring.scorers`.
    """
    parameters: dict[str, Any] = {}
    if name == "heads":
        parameters["terms"] = choice.terms(place)
    elif name == "debiased":
        parameters["profile"] = choice.profile(place // 2)
    if diversity:
        parameters["diversity"] = diversity
    return {"name": name, "parameters": parameters} if parameters else {"name": name}
