"""The clocks inside a model: every layer once, nothing left in the model. Times themselves are not tested."""

import pytest
import torch

from fitprune.families.adapter import adapt
from fitprune.speed.clocks import Stopwatch, medians, timed_layers
from helpers.families import ROWS
from helpers.models import tiny_inputs, tiny_model


def test_timing_counts_each_layer_once(family):
    model = tiny_model(family)
    with torch.no_grad(), timed_layers(adapt(model)) as found:
        model(**tiny_inputs(model))
        model(**tiny_inputs(model))
    assert [len(times.layers) for times in found] == [5, 5]
    assert all(mlp < layer for times in found for mlp, layer in zip(times.mlps, times.layers, strict=True))
    assert all(0 < times.ahead < times.outside < times.total for times in found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_decoder_of_its_first_layers_runs_in_every_family(row):
    model = row.make_model()
    adapted, ids = adapt(model), torch.full((2, 9), 3)
    with torch.no_grad(), timed_layers(adapted, 2) as times:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert [(len(time.layers), len(time.mlps)) for time in times] == [(2, 2)]
    assert logits.shape[:2] == ids.shape
    assert len(adapted.decoder.layers) == len(adapted.layers) > 2
    assert adapted.decoder.layers is adapted.layers
    with torch.no_grad():
        model(input_ids=ids)
    assert len(times) == 1


def test_a_call_that_fails_leaves_the_model_whole(family):
    model = tiny_model(family)
    adapted = adapt(model)
    with pytest.raises(RuntimeError), timed_layers(adapted, 1):
        model(input_ids=torch.zeros(1, 2, 3, 4, dtype=torch.long))
    assert adapted.decoder.layers is adapted.layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_stopwatch_times_each_run_once():
    watch = Stopwatch(tiny_model())
    double = watch.timed(lambda n: 2 * n)
    assert [double(1), double(2)] == [2, 4]
    assert len(watch.seconds()) == 2
    assert watch.seconds() == []


def test_medians_are_of_each_key():
    assert medians([{1: 3.0, 2: 1.0}, {1: 5.0, 2: 9.0}, {1: 4.0, 2: 2.0}]) == {1: 4, 2: 2}
