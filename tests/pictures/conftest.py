"""What tests of pictures share: the bundled model, and a recipe for it that removes at most layers."""

import pytest

from fitprune import PruningRecipe, load_model, load_samples
from fitprune.families.adapter import adapt


@pytest.fixture(scope="session")
def bundled():
    return load_model("digit-scenes")


@pytest.fixture(scope="session")
def samples():
    return load_samples("digit-scenes/test")[:4]


@pytest.fixture(scope="session")
def recipe(bundled):
    keep = (0.6, 0.6, 0.5, 0.4, 0.4, 0.3, 0.2, 0.1)
    return PruningRecipe(keep, adapt(bundled[0]).fingerprint, 144)
