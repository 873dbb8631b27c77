"""Methods compared in turn: their order, and the decoding that is timed."""

import contextlib

import torch

from fitprune.speed.in_turn import decode_seconds, greedy_outputs, prefill_seconds, time_ratios
from helpers.models import tiny_inputs, tiny_model


def test_methods_take_turns_and_the_first_round_does_not_count(family):
    model, order = tiny_model(family), []

    def block(name):
        @contextlib.contextmanager
        def entered():
            order.append(name)
            yield

        return entered

    inputs = tiny_inputs(model)
    seconds = prefill_seconds(model, inputs, [block("a"), block("b")], repeats=2)
    assert order == ["a", "b"] * 3
    assert [len(rounds) for rounds in seconds] == [2, 2]
    steps = decode_seconds(model, inputs, [contextlib.nullcontext], steps=2, repeats=1)
    assert len(steps) == len(steps[0]) == 1


def test_ratios_are_taken_within_a_round():
    assert time_ratios([[1.0, 10.0, 2.0], [2.0, 5.0, 8.0]]) == [1, 2]


def test_what_is_timed_is_greedy_decoding(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2)
    with torch.no_grad():
        outputs = greedy_outputs(model, inputs)
        tokens = [next(outputs).logits[:, -1].argmax(-1) for _ in range(4)]
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.stack(tokens, 1), generated[:, inputs["input_ids"].shape[1] :])
