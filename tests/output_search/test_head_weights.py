"""Parameters of scorers, fitted to what the dense model's heads receive."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.optimize
import torch

from fitprune import PruningRecipe
from fitprune.families.adapter import adapt
from fitprune.output_search.divergence import Heads, Judge, reference
from fitprune.output_search.head_weights import HeadChoice, non_negative_least_squares, specs
from fitprune.scoring.by_head import HEAD_KINDS
from fitprune.scoring.scorers import get_scorer
from helpers.models import batch_of, prompts, tiny_model


@pytest.mark.parametrize(
    ("features", "alike"),
    [
        (8, 0.0),
        (8, 2.0),
        (48, 2.0),
    ],
)
def test_non_negative_least_squares_equals_scipys(features, alike):
    """Heads resemble each other, so the features do."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        columns = rng.random((200, features)) + alike * rng.random((200, 1))
        columns /= np.linalg.norm(columns, axis=0)
        target = columns @ rng.normal(size=features) + 0.1 * rng.normal(size=200)
        expected, residual = scipy.optimize.nnls(columns, target)
        gram, product = (torch.from_numpy(x) for x in (columns.T @ columns, columns.T @ target))
        found = non_negative_least_squares(gram, product).numpy()
        assert (found >= 0).all()
        assert (expected == 0).any()
        assert np.linalg.norm(columns @ found - target) == pytest.approx(residual, rel=1e-6)
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_feature_that_is_nowhere_gets_no_weight():
    gram, product = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([0.5, 0.0]).double()
    assert non_negative_least_squares(gram, product).tolist() == [0.5, 0.0]


LAYERS, HEADS_PER_LAYER = 4, 3


def made_up(seed=0):
    """Heads of two samples, the second with images of 5 and 9 tokens; nothing is used yet."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((2, 24), -1)
    image[0, 3:15] = 0
    image[1, 2:7], image[1, 7:16] = 0, 1
    made = []
    for _ in range(LAYERS):
        received = torch.rand(2, 24, len(HEAD_KINDS) * HEADS_PER_LAYER, generator=generator)
        for row in range(2):
            received[row] /= received[row, image[row] >= 0].mean(0)
        made.append(Heads(received * (image >= 0)[..., None], torch.zeros(2, 24), image))
    return made


def used(heads, target):
    return dataclasses.replace(heads, used=target)


@pytest.mark.parametrize("feature", range(len(HEAD_KINDS) * HEADS_PER_LAYER))
def test_the_one_head_that_matters_is_found(feature):
    """Layer 2 uses what one head of layer 1 receives: that head matters inside layer 1 and nowhere after layer 2."""
    choice = HeadChoice(12)
    for seed in range(2):
        made = made_up(seed)
        made[2] = used(made[2], 7 * made[1].received[..., feature])  # the scale does not matter
        choice.add(list(enumerate(made)))
    kind, head = HEAD_KINDS[feature // HEADS_PER_LAYER], feature % HEADS_PER_LAYER
    assert choice.terms(3) == [[kind, head, pytest.approx(1.0, rel=1e-3)]]
    everything = [["mean", head, 1.0] for head in range(HEADS_PER_LAYER)]
    assert choice.terms(5) == choice.terms(6) == choice.terms(7) == everything


def test_a_layers_own_use_counts_before_it_but_not_inside():
    made = made_up()
    made[1] = used(made[1], made[1].received[..., 4])
    made[3] = used(made[3], made[1].received[..., 7])
    choice = HeadChoice(12)
    choice.add(enumerate(made))
    assert choice.terms(3) == [["last", 1, pytest.approx(1.0, rel=1e-3)]]
    assert sorted(choice.terms(2)) == [
        ["last", 1, pytest.approx(0.5, rel=1e-3)],
        ["max", 1, pytest.approx(0.5, rel=1e-3)],
    ]


def test_the_profile_is_the_mean_along_images_of_any_size():
    made = made_up()
    choice = HeadChoice(6)
    choice.add(enumerate(made))
    for layer, heads in enumerate(made):
        values = [[] for _ in range(6)]
        for row, number in ((0, 0), (1, 0), (1, 1)):
            member = heads.image[row] == number
            mean = heads.received[row, member, :HEADS_PER_LAYER].mean(1)
            for place, value in enumerate(mean.tolist()):
                values[place * 6 // len(mean)].append(value)
        expected = [np.mean(of) if of else 0.0 for of in values]
        assert choice.profile(layer) == pytest.approx(expected, rel=1e-3)


def test_fitted_scorers_are_data_that_prune_takes():
    model = tiny_model()
    inputs = batch_of(prompts(model, [[3, 6], [5, 2, 4], [2, 9]]))
    judge = Judge(model, [reference(model, inputs, max_new_tokens=5)])
    choice = HeadChoice(16)
    choice.add(judge.watch(0))
    assert specs(choice, "last", 3, 0.0) == {"name": "last"}
    assert specs(choice, "last", 3, 0.5) == {"name": "last", "parameters": {"diversity": 0.5}}
    for name in ("heads", "debiased"):
        for place in range(10):
            spec = specs(choice, name, place, 0.5)
            assert json.loads(json.dumps(spec)) == spec
            assert get_scorer(spec).query_aware
            recipe = PruningRecipe((1.0, 1.0, 0.3, 0.3, 0.1), adapt(model).fingerprint, 16, scorer=spec)
            assert all(0 < value < 10 for value in judge.divergences(0, [recipe])[0])
