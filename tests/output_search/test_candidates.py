"""What the search tries: candidates scaled to a budget, and the recipes that they are."""

import itertools

import pytest

from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import checked_budget
from fitprune.output_search.candidates import (
    Removal,
    first_candidates,
    neighbours,
    recipe_of,
    scaled,
    schedule_of,
    with_scorer,
)

DECODER = DecoderSizes(5, 32, 48, 4, 2, 8)
MODEL = ModelFingerprint("llava", DECODER)
BUDGET = checked_budget("flops_reduction", 0.6)


def named(name, place, diversity):
    return {"name": name, "parameters": {"place": place}} if diversity else {"name": name}


def test_candidates_are_scaled_to_within_a_token():
    for places in ([1], [2], [1, 4], [3, 6, 9]):
        candidate = tuple(Removal(place, 1.0 / (n + 1), "last") for n, place in enumerate(places))
        counts = scaled(candidate, BUDGET, DECODER, 16)
        if counts is None:
            continue
        assert counts == sorted(counts, reverse=True)
        for n in range(len(counts)):
            more = [*counts[:n], counts[n] + 1, *counts[n + 1 :]]
            if more == sorted(more, reverse=True) and more[0] <= 16:
                kept = [16] * 5
                entering = [16] * 5
                now, at = 16, dict(zip(places, more, strict=True))
                for place in range(10):
                    now = at.get(place, now)
                    (kept if place % 2 else entering)[place // 2] = now
                ahead = [place for place in places if place % 2 == 0]
                reached = BUDGET.measured(DECODER, 16, kept, entering)
                assert reached < 0.6 or ahead


def test_a_recipe_names_one_scorer_or_one_for_each_place():
    one = recipe_of((Removal(1, 1.0, "last"), Removal(5, 0.4, "last")), BUDGET, MODEL, 16, named)
    assert one.scorer == {"name": "last"}
    assert one.enter == ()
    two = recipe_of((Removal(2, 1.0, "last"), Removal(5, 0.4, "heads", 1.0)), BUDGET, MODEL, 16, named)
    stages = {"before 1": {"name": "last"}, "2": {"name": "heads", "parameters": {"place": 5}}}
    assert two.scorer == {"name": "by-stage", "parameters": {"stages": stages}}
    assert 1 == two.entering[0] > two.entering[1] == two.keep[1] > two.keep[2]


def test_a_candidate_that_cannot_be_a_recipe_is_none():
    assert recipe_of((Removal(0, 1.0, "accumulated"),), BUDGET, MODEL, 16, named) is None  # no layer has run yet
    assert recipe_of((Removal(9, 1.0, "last"),), BUDGET, MODEL, 16, named) is None  # too late for the budget
    later = ModelFingerprint("qwen3_vl", DecoderSizes(5, 32, 48, 4, 2, 8, first_prunable=2))
    assert recipe_of((Removal(1, 1.0, "last"),), BUDGET, later, 16, named) is None  # tokens may not leave there


def test_neighbours_differ_in_one_thing_and_stay_in_order():
    candidate = (Removal(1, 1.0, "last"), Removal(4, 0.4, "heads", 1.0))
    near = neighbours(candidate, 10)
    assert len(set(near)) == len(near)
    assert candidate not in near
    for other in near:
        places = [removal.place for removal in other]
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < 10
        assert sum(a != b for a, b in itertools.zip_longest(candidate, other)) <= (2 if len(other) == 1 else 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_candidates_begin_with_what_was_good_and_the_papers_fit(seed):
    known, paper = [(Removal(7, 1.0, "value"),)], ((3, 0.9), (5, 0.2))
    first = first_candidates(known, [paper], 5, range(1, 5), seed)
    assert first == first_candidates(known, [paper], 5, range(1, 5), seed)
    assert first[0] == known[0]
    assert first[1] == with_scorer(paper, "heads", 1.0)
    assert schedule_of(first[3]) == paper
    assert all(removal.place // 2 >= 1 for candidate in first for removal in candidate)
