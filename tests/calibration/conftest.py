"""Fixtures of the calibration tests."""

import pytest
from PIL import Image
from transformers import AutoProcessor

from fitprune._support import assets
from fitprune.calibration.samples import Sample


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (30, 40), (30, 30, 200)).save(tmp_path / "blue.jpg")
    return tmp_path


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(assets.folder("model"))


@pytest.fixture
def red():
    return Sample("7", "what?", Image.new("RGB", (40, 30), "red"), where="q.jsonl:7")
