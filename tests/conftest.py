"""Fixtures that tests of several packages share."""

import sys

import pytest

REGISTRIES = {"scoring.scorers": "SCORERS", "baselines.table": "BASELINES", "families.table": "FAMILIES"}


@pytest.fixture(autouse=True)
def what_a_test_registers_ends_with_it():
    """Whatever the order of tests, none sees another's scorers, baselines and families."""
    modules = {name: sys.modules.get(f"fitprune.{name}") for name in REGISTRIES}
    before = {name: dict(getattr(module, REGISTRIES[name])._added) for name, module in modules.items() if module}
    yield
    for name, registry in REGISTRIES.items():
        if module := sys.modules.get(f"fitprune.{name}"):
            added = getattr(module, registry)._added
            added.clear()
            added.update(before.get(name, {}))


@pytest.fixture(params=["llava", "llava_next"])
def family(request):
    return request.param


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, with a cache of its own."""
    from huggingface_hub import constants

    from helpers.fake_hub import FakeHub

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one that other tests made would ask the real hub
    yield fake
    fake.close()
