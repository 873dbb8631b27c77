"""From fractions to counts."""

import pytest

from fitprune.recipes.rounding import kept_counts


@pytest.mark.parametrize(
    ("keep", "n", "kept"),
    [
        ((1.0, 0.4, 0.3), 1, [1, 1, 1]),
        ((1.0, 0.4, 0.2), 2, [2, 1, 1]),
        ((0.5, 0.0, 0.0), 1, [1, 0, 0]),  # none, as VTW has it, stays none
        ((0.5, 1e-7, 1e-7), 144, [72, 1, 1]),
        ((0.5, 1 - 10 * 0.1 + 1e-16, 0.0), 144, [72, 0, 0]),  # the noise of a sum is none
        ((0.4, 0.3), 0, [0, 0]),
    ],
)
def test_a_share_that_rounds_to_nothing_is_one_token_and_none_is_none(keep, n, kept):
    assert kept_counts(keep, n) == kept
