"""What the tests of the analysis share."""

import pytest

from helpers.statistics import synthetic


@pytest.fixture(scope="module")
def ragged():
    return synthetic(samples=18, counts=(25, 16, 25))
