"""The bundled model, served without a page."""

import pytest

import fitprune
from fitprune.app.recipes import Recipes
from fitprune.app.served import ServedModel
from fitprune.families.adapter import adapt

LINES = (
    'samples = fitprune.load_samples("digit-scenes/calibration", samples=8)\n'
    "stats = fitprune.measure(model, fitprune.make_batches(samples, processor, batch_size=8))"
)


@pytest.fixture(scope="session")
def bundled():
    return fitprune.load_model("digit-scenes")


@pytest.fixture(scope="session")
def stats(bundled):
    samples = fitprune.load_samples("digit-scenes/calibration", samples=8)
    return fitprune.measure(bundled[0], fitprune.make_batches(samples, bundled[1], batch_size=8))


@pytest.fixture
def served(bundled, stats):
    model, processor = bundled
    recipes = Recipes(adapt(model).fingerprint)
    recipes.use(fitprune.Fitter(stats), LINES)
    return ServedModel(model, processor, recipes)


@pytest.fixture(scope="session")
def sample():
    return fitprune.load_samples("digit-details/test")[0]
