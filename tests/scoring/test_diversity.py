"""The choice of relevant and different tokens against the definition."""

import pytest
import torch

from fitprune.fitting.rules import keep_highest
from fitprune.scoring.diversity import relevant_and_different


def naive_picks(relevance, features, member, count, weight):
    """The tokens of one sample, in the order in which they are picked."""
    own = [i for i in range(len(member)) if member[i]]
    rank = {i: (place + 1) / len(own) for place, i in enumerate(sorted(own, key=lambda i: (float(relevance[i]), i)))}
    centred = features.double() - features[own].double().mean(0)
    picked = []
    while len(picked) < count:
        worth = {}
        for i in own:
            likeness = [float(torch.cosine_similarity(centred[i], centred[j], dim=0)) for j in picked]
            worth[i] = rank[i] - weight * max([0.0, *likeness])
        picked.append(max((i for i in own if i not in picked), key=worth.get))
    return picked


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
def test_relevant_and_different_equals_the_definition(weight, kind):
    for seed in range(5):
        torch.manual_seed(seed)
        relevance, features = torch.randn(4, 11), torch.randn(4, 11, 3) + 2
        if kind == "ties":
            relevance = relevance.round()
            features[:, 7] = features[:, 2]  # alike in all
        if kind == "infinite":
            relevance[:, ::3] = -torch.inf
        member = torch.rand(4, 11) < 0.8
        member[0] = True
        relevance = torch.where(member, relevance, 9.0)  # what does not take part may be of any relevance
        features = torch.where(member[..., None], features, 1e4)
        counts = torch.tensor([5, 0, 1, int(member[3].sum())])
        found = relevant_and_different(relevance, features, member, counts, weight)
        assert found.dtype == torch.float32
        for row in range(4):
            picked = naive_picks(relevance[row], features[row], member[row], int(counts[row]), weight)
            expected = torch.zeros(11)
            expected[picked] = torch.arange(len(picked), 0, -1.0)
            assert found[row].tolist() == expected.tolist()
        none = relevant_and_different(relevance, features, member, torch.zeros_like(counts), weight)
        assert not none.any()


def test_what_does_not_take_part_may_be_no_number():
    torch.manual_seed(0)
    relevance, features = torch.randn(2, 11), torch.randn(2, 11, 3)
    member, counts = torch.arange(11).expand(2, -1) < 8, torch.tensor([4, 2])
    expected = relevant_and_different(relevance, features, member, counts, 0.5)
    features[:, 8:] = torch.nan
    assert torch.equal(relevant_and_different(relevance, features, member, counts, 0.5), expected)


def test_without_weight_the_highest_are_picked():
    torch.manual_seed(0)
    relevance, features = torch.randn(3, 20).mul(2).round(), torch.randn(3, 20, 4)
    image = torch.randint(-1, 1, (3, 20))
    counts = torch.tensor([4, 0, 6])
    found = relevant_and_different(relevance, features, image == 0, counts, 0.0)
    assert torch.equal((found > 0) | (image < 0), keep_highest(relevance, image, counts[:, None]))


def test_a_likeness_to_what_was_picked_costs_rank():
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, 0.3], [-0.9, -0.4]]])
    relevance, member, counts = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool), [2]

    def pick(weight):
        return relevant_and_different(relevance, features, member, torch.tensor(counts), weight)[0].tolist()

    assert pick(0.0) == [2, 1, 0, 0]
    assert pick(1.0) == [2, 0, 1, 0]
