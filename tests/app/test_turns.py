import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fitprune.app.turns import in_turn


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def counting(ids, seen, name, running):
    """A stand-in for `generate`, which notes when it runs."""

    def generate(streamer):
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            assert running.acquire(blocking=False), "two passes at a time"
            seen.append((name, token))
            running.release()
            streamer.put(torch.tensor([token]))
        streamer.end()

    return generate


def test_two_answers_grow_in_turn_a_token_each(threads):
    seen, running = [], threading.Lock()
    turns = in_turn([counting([5, 6, 7], seen, "a", running), counting([8], seen, "b", running)], threads)
    lengths = [tuple(len(answer.ids) for answer in answers) for answers in turns]
    assert lengths[:4] == [(1, 0), (1, 1), (2, 1), (2, 1)]
    assert seen == [("a", 5), ("b", 8), ("a", 6), ("a", 7)]


def test_an_answer_has_its_tokens_and_the_time_of_each(threads):
    *_, (answer,) = in_turn([counting([5, 6, 7], [], "a", threading.Lock())], threads)
    assert answer.ids == [5, 6, 7]
    assert answer.done
    assert len(answer.seconds) == 3
    assert answer.first_seconds == answer.seconds[0]
    assert answer.tokens_per_second == 2 / sum(answer.seconds[1:])


def test_who_leaves_in_the_middle_frees_the_threads(threads):
    seen = []
    for _ in range(5):
        turns = in_turn([counting(range(100), seen, name, threading.Lock()) for name in "ab"], threads)
        next(turns)
        next(turns)
        turns.close()
    assert len(seen) < 20
    assert threads.submit(lambda: "free").result(5) == "free"


def test_an_error_of_one_ends_both_and_is_raised(threads):
    def broken(streamer):
        streamer.put(torch.tensor([[1]]))
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        list(in_turn([counting(range(100), [], "a", threading.Lock()), broken], threads))
    assert threads.submit(lambda: "free").result(5) == "free"
