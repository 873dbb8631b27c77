"""Counts of visual tokens layer by layer: what leaves, where, and back from it."""

import pytest

from fitprune import PruningRecipe
from fitprune.costs.counts import Counts, entering_counts
from helpers.statistics import SHAPE


def test_what_leaves_is_what_enters_less_what_is_kept():
    counts = Counts(16, (16, 12, 12, 4), (16, 14, 12, 8))
    assert counts.removed == [0, 2, 0, 4]
    assert counts.before == [0, 2, 0, 4]
    assert counts.removing == [1, 3]
    assert entering_counts(16, counts.removed, counts.before) == list(counts.entering)
    assert counts.fractions == ((1.0, 0.75, 0.75, 0.25), (1.0, 0.875, 0.75, 0.5))


def test_a_layer_gets_what_the_one_before_it_kept():
    counts = Counts(16, (16, 12, 12, 4))
    assert counts.entering == (16, 16, 12, 12)
    assert counts.before == [0] * 4
    assert entering_counts(16, counts.removed) == list(counts.entering)
    assert counts.fractions[1] == ()


@pytest.mark.parametrize("n", [1, 7, 144, 576, 2880])
def test_a_recipe_of_counts_has_these_counts(n):
    kept = tuple(max(n - layer * (n // 7), 0) for layer in range(8))
    entering = (n, *(max(kept[layer], kept[layer - 1] - 1) for layer in range(1, 8)))
    for counts in (Counts(n, kept), Counts(n, kept, entering)):
        recipe = PruningRecipe.from_counts(counts, SHAPE, scorer={"name": "self"})
        assert recipe.layer_counts(n) == counts
        assert recipe.keep == tuple(count / n for count in kept)
        assert recipe.scorer == {"name": "self"}
    assert PruningRecipe.from_counts(Counts(n, kept), SHAPE) == PruningRecipe(recipe.keep, SHAPE, n)
