"""The rule of the fit, which stands in two places, and the rule of inference."""

import pytest
import torch

from fitprune.fitting.fit import Fitter
from fitprune.fitting.rules import keep_highest, lowest_in_both
from helpers.statistics import synthetic


@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.6])
def test_the_vectorised_walk_equals_the_rule_step_by_step(tolerance):
    ragged = synthetic(samples=7, counts=(10, 25, 16))
    expected = [0.0] * 8
    for sample in range(7):
        one = ragged.select([sample])
        n = one.visual_tokens[0]
        present = torch.ones(1, n, dtype=torch.bool)
        for layer in range(8):
            own, cross = one.self_attention[layer][None], one.cross_attention[layer][None]
            leave = lowest_in_both(own, cross, present, (1 - tolerance) * own.sum(1), (1 - tolerance) * cross.sum(1))
            present = present & ~leave
            expected[layer] += int(present.sum()) / n / 7
    assert Fitter(ragged).kept_fractions(tolerance) == pytest.approx(expected)


def test_the_lowest_scores_leave_each_image_by_its_own_share():
    image = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]])
    score = torch.tensor([[0.0, 3, 1, 2, 0, 5, 4, 0]])
    stays = keep_highest(score, image, torch.tensor([[1, 1]]))
    assert stays.tolist() == [[True, True, False, False, True, True, False, True]]


def test_scores_of_minus_infinity_still_leave_the_right_number():
    image = torch.tensor([[-1, 0, 0, 0, -1]])
    score = torch.tensor([[0.0, float("-inf"), float("-inf"), 1.0, 0.0]])
    assert keep_highest(score, image, torch.tensor([[2]])).tolist() == [[True, False, True, True, True]]


def test_of_equal_scores_the_later_token_stays():
    image = torch.zeros(1, 6, dtype=torch.long)
    assert keep_highest(torch.ones(1, 6), image, torch.tensor([[2]])).tolist() == [[False] * 4 + [True] * 2]
