"""How candidates are compared: luck is smoothed out, and a neighbour must be clearly better."""

import numpy as np

from fitprune.output_search.budget_search import clearly_less, smoothed
from fitprune.output_search.candidates import Removal


def test_luck_on_few_samples_weighs_less_than_what_candidates_share():
    rng = np.random.default_rng(0)
    quality = {"heads": 0.02, "last": 0.08}
    scores = {}
    for place in range(1, 9):
        for name, mean in quality.items():
            scores[Removal(place, 1.0, name),] = list(rng.exponential(mean, 20))
    lucky = (Removal(5, 1.0, "last"),)
    scores[lucky] = [0.012] * 20
    ranks = smoothed(scores)
    assert min(ranks, key=ranks.get) != lucky
    assert min(ranks, key=ranks.get)[0].scorer == "heads"


def test_a_neighbour_must_be_better_by_more_than_chance():
    assert clearly_less([0.1, 0.1, 0.1], [0.2, 0.2, 0.2])
    assert not clearly_less([0.2, 0.2], [0.2, 0.2])
    assert not clearly_less([0.0, 0.5, 0.1], [0.5, 0.0, 0.2])
