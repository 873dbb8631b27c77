"""Fixtures of the scorers' tests."""

import pytest

from fitprune.scoring.scorers import SCORERS


@pytest.fixture
def registry(monkeypatch):
    """The scorers' registry, in which what a test registers is gone afterwards."""
    monkeypatch.setattr(SCORERS, "_added", {})
    return SCORERS
