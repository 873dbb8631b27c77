"""Bootstrap intervals."""

import numpy as np

from fitprune.evaluation.bootstrap import Bootstrap, interval


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = (rng.random((1, 200)) < 0.8).astype(np.float32)
        low, high = interval(Bootstrap(200, seed=trial).means(hits))
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_seeds_widen_the_interval():
    sure = np.ones((3, 100), dtype=np.float32)
    sure[:, :20] = 0
    split = sure.copy()
    split[0], split[1] = 1, 0.6
    narrow, wide = (interval(Bootstrap(100).means(hits)) for hits in (sure, split))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert interval(Bootstrap(100).means(np.ones((3, 100)))) == (1, 1)
