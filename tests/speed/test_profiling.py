"""What cannot be profiled is refused."""

import pytest

from fitprune.speed.profiling import profile_latency
from helpers.models import tiny_inputs, tiny_model


def test_prompts_that_differ_are_not_profiled(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match="give equal prompts with an image"):
        profile_latency(model, tiny_inputs(model, batch=2, pad=(1,)))
    with pytest.raises(ValueError, match="reach the prompt's"):
        profile_latency(model, tiny_inputs(model), tokens=[4])
