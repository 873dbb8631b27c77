"""Bootstrap intervals."""

import numpy as np

from fitprune.evaluation import bootstrap
from fitprune.evaluation.bootstrap import interval, over_seeds, sums


def means(hits, seed=0):
    """The mean of each draw, over seeds: hits [seeds, samples]."""
    return over_seeds(list(sums(hits.T, seed).T / hits.shape[1]))


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = (rng.random((1, 200)) < 0.8).astype(np.float32)
        low, high = interval(means(hits, seed=trial))
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_seeds_widen_the_interval():
    sure = np.ones((3, 100), dtype=np.float32)
    sure[:, :20] = 0
    split = sure.copy()
    split[0], split[1] = 1, 0.6
    narrow, wide = (interval(means(hits)) for hits in (sure, split))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert interval(means(np.ones((3, 100)))) == (1, 1)


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch):
    counts = np.random.default_rng(3).random((37, 4))
    whole = sums(counts)
    monkeypatch.setattr(bootstrap, "MOST_WEIGHTS", 500)
    np.testing.assert_allclose(sums(counts), whole, rtol=1e-12)
    np.testing.assert_allclose(whole.mean(0), counts.sum(0), rtol=0.02)
