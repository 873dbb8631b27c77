"""The table of random models. tests/behaviour/test_full_sizes.py compares its rows with the published figures."""

import pytest

from fitprune.speed.random_models import RANDOM_MODELS, get_model_row


def test_every_random_model_has_an_image_of_its_size():
    assert all(row.side > 0 and row.pixels()["pixel_values"].numel() for row in RANDOM_MODELS.values())


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match=r"random model .gpt-5.: must be one of llava-1\.5-7b, "):
        get_model_row("gpt-5")
