"""Whose call is running: threads, calls inside calls, pauses, and decoding without a cache."""

import collections
import threading

import pytest
import torch

from fitprune import PruningRecipe
from fitprune.engine.calls import Calls, paused
from fitprune.engine.choose import choose_by, quotas_by
from fitprune.engine.remover import removing
from fitprune.families.adapter import adapt
from fitprune.scoring.scorers import get_scorer
from helpers.models import tiny_inputs, tiny_model


@pytest.fixture
def adapted():
    return adapt(tiny_model())


def in_another_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_each_thread_has_its_own_calls_innermost_last(adapted):
    calls = Calls(adapted)
    assert not calls.inside
    calls.enter()
    calls.begin("outer")
    assert calls.is_only_one()
    calls.enter()
    assert (calls.inside, calls.current, calls.is_only_one()) == (True, None, False)
    calls.leave()
    assert calls.current == "outer"
    in_another_thread(calls.enter)
    assert not calls.is_only_one()
    with pytest.raises(ValueError, match=r"1 other thread\(s\) are inside a call"):
        calls.require_no_others()
    calls.leave()
    calls.leave()  # as after a call that failed before it entered
    assert not calls.inside


def test_the_last_record_is_the_threads_own_or_anyones(adapted):
    calls = Calls(adapted)
    in_another_thread(lambda: calls.finish("other"))
    assert calls.last == "other"
    calls.finish("own")
    in_another_thread(lambda: calls.finish("other"))
    assert calls.last == "own"


def test_a_pause_is_of_one_decoder_and_one_thread(adapted):
    calls, other, elsewhere = Calls(adapted), Calls(adapt(tiny_model())), []
    with paused(adapted):
        in_another_thread(lambda: elsewhere.append(calls.paused))
        assert (calls.paused, other.paused, elsewhere) == (True, False, [False])
    assert not calls.paused


def test_steps_without_a_cache_are_known_by_their_images(adapted):
    calls, images = Calls(adapted), torch.zeros(1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert [calls.prompt_length(images, ids[:, :n]) for n in (3, 4, 5)] == [3, 3, 3]
    assert calls.prompt_length(images, ids) == 5  # the same length again: a new prompt
    assert calls.prompt_length(torch.zeros(1), ids[:, :4]) == 4
    assert calls.prompt_length(images, ids[:, :3]) == 3
    assert len(calls._uncached) == 1  # the other images are gone


def test_who_observes_sees_each_function_in_each_layer(adapted):
    seen = collections.Counter()

    def observe(name, function):
        def call(*args):
            seen[name] += 1
            return function(*args)

        return call

    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.5, 0.5), adapted.fingerprint, 16)
    with removing(adapted, choose_by(get_scorer("fitprune")), quotas_by(recipe), observe=observe):
        adapted.model(**tiny_inputs(adapted.model))
    names = ("before_layer", "after_attention", "before_mlp", "after_mlp", "after_layer")
    assert seen == dict.fromkeys(names, 5)
