"""Heads that are divided among ranks: each rank scores as one device with all heads does."""

import contextlib
import dataclasses

import pytest
import torch

from fitprune.families.images import images_of
from fitprune.integrations.vllm.ranks import TensorRanks
from fitprune.scoring.by_head import HEAD_KINDS
from fitprune.scoring.received import Attention, Sums, text_after
from fitprune.scoring.scorers import SCORERS, get_scorer
from fitprune.scoring.softmax import Softmax
from fitprune.scoring.view import LayerView, Prompt, Quotas

LENGTH = 200  # some blocks of rows
PARAMETERS = {
    "heads": {"terms": [["mean", 0, 1.0], ["max", 5, 0.5], ["last", 6, 2.0], ["self", 7, 0.25]]},
    "debiased": {"profile": [0.1, 0.4, 0.2]},
    "by-stage": {"stages": {"0": {"name": "value"}}},
    "random": {"seed": 3},
}
ELSEWHERE = {"accumulated", "cls", "duplication"}  # need more than a layer's own attention: vLLM's plug-in refuses them
SERVED = sorted(set(SCORERS) - ELSEWHERE)


class Waits(BaseException):
    """A rank needs what another has not sent yet."""


class Group:
    """What is used of vLLM's group of ranks, whose work is done in turn.

    Threads would wait for each other: before Python 3.12 two of them cannot compute one cached property at a time.
    """

    def __init__(self, rank_in_group, sent):
        self.rank_in_group, self.world_size, self.sent, self.exchanges = rank_in_group, len(sent), sent, 0

    def exchanged(self, part):
        number, own = self.exchanges, self.sent[self.rank_in_group]
        self.exchanges += 1
        if number == len(own):
            own.append(part.clone())
        if any(len(parts) <= number for parts in self.sent):
            raise Waits
        return [parts[number] for parts in self.sent]

    def all_gather(self, part, dim):
        return torch.cat(self.exchanged(part), dim)

    def all_reduce(self, part):
        return torch.stack(self.exchanged(part)).sum(0)

    def broadcast(self, part, src):
        return self.exchanged(part)[src].clone()


def by_ranks(count, work, kv_heads):
    """What each of some ranks returns. One that has to wait begins again when the others have had their turn."""
    sent, results = [[] for _ in range(count)], {}
    while len(results) < count:
        for rank in range(count):
            with contextlib.suppress(Waits):
                results[rank] = work(TensorRanks(Group(rank, sent), kv_heads))
    return [results[rank] for rank in range(count)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's attention, and the rows of its images (first, end)."""

    ranks: int = 2
    kv_heads: int = 4
    images: tuple = ((5, 170),)
    past: int = 0
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None


CASES = {
    "causal": Case(),
    "four ranks": Case(ranks=4),
    "a key head for each query head": Case(kv_heads=8),
    "fewer key heads than ranks": Case(ranks=4, kv_heads=2),
    "several images": Case(images=((3, 60), (62, 100), (101, 160))),
    "a past": Case(past=37),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True),
    "softcap, sinks, window": Case(softcap=5.0, sinks=True, window=90, images=((3, 60), (62, 150))),
    "ranks without rows": Case(ranks=4, images=((0, 60),)),
}


def attention_of(case):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 8, LENGTH, 16, generator=generator) * 2
    key, value = torch.randn(2, 1, case.kv_heads, case.past + LENGTH, 16, generator=generator) * 2
    sinks = torch.linspace(-1, 2, 8) if case.sinks else None
    return Attention(query, key, value, Softmax(0.3, softcap=case.softcap, sinks=sinks, window=case.window))


def heads_of(attention, ranks):
    """What one rank has: its query heads, and the key heads that these look at."""
    every = attention.query.shape[1] // attention.key.shape[1]
    own = torch.arange(8).chunk(ranks.count)[ranks.number]
    theirs = (own // every).unique()
    sinks = attention.softmax.sinks
    softmax = dataclasses.replace(attention.softmax, sinks=None if sinks is None else sinks[own])
    return Attention(attention.query[:, own], attention.key[:, theirs], attention.value[:, theirs], softmax)


def view_of(case, attention):
    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    for first, end in case.images:
        visual[:, first:end] = True
    image, valid = images_of(visual), torch.ones(1, LENGTH, dtype=torch.bool)
    sizes = torch.tensor([[end - first for first, end in case.images]])
    prompt = Prompt(
        torch.arange(LENGTH)[None], valid, lambda: None, image, lambda hidden: hidden,
        Quotas(torch.stack([sizes, sizes, sizes // 3])),
    )  # fmt: skip
    hidden = torch.randn(1, LENGTH, 24, generator=torch.Generator().manual_seed(1))
    question = text_after(visual, valid)
    return LayerView(0, False, image, question, torch.arange(LENGTH)[None], hidden, prompt, lambda: attention)


def close(found, expected):
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_sees_what_one_device_would(name):
    case = CASES[name]
    attention = attention_of(case)
    expected = view_of(case, attention)

    def work(ranks):
        view = view_of(case, ranks.whole(heads_of(attention, ranks)))
        return view, view.received, view.by_head(*HEAD_KINDS), view.value_norms, view.keys

    for view, received, by_head, value_norms, keys in by_ranks(case.ranks, work, case.kv_heads):
        for part in ("query", "key", "value"):
            assert torch.equal(getattr(view.states, part), getattr(attention, part))
        assert close(received.self_attention, expected.self_attention)
        assert close(received.cross_attention, expected.cross_attention)
        for kind, weights in expected.by_head(*HEAD_KINDS).items():
            assert close(by_head[kind], weights)
        assert close(value_norms, expected.value_norms)
        assert close(keys, expected.keys)


@pytest.mark.parametrize("name", SERVED)
def test_each_rank_scores_as_one_device_would(name):
    scorer, case = get_scorer({"name": name, "parameters": PARAMETERS.get(name, {})}), CASES["several images"]
    attention = attention_of(case)
    expected = scorer(view_of(case, attention))

    def work(ranks):
        return scorer(view_of(case, ranks.whole(heads_of(attention, ranks))))

    for score in by_ranks(case.ranks, work, case.kv_heads):
        assert close(score, expected)


@pytest.mark.parametrize("name", ["fitprune", "cross-mean", "last", "value"])
def test_of_its_own_heads_each_rank_would_score_otherwise(name):
    scorer, case = get_scorer(name), CASES["causal"]
    attention = attention_of(case)
    expected = scorer(view_of(case, attention))
    first, second = by_ranks(2, lambda ranks: scorer(view_of(case, heads_of(attention, ranks))), case.kv_heads)
    assert not close(first, expected)
    assert not close(second, expected)
    assert not close(first, second)


def test_ranks_share_the_rows():
    image, question = view_of(CASES["causal"], None).image, view_of(CASES["causal"], None).question
    shares = [Sums(image, question, TensorRanks(Group(rank, [[], []]), 4))._row_weight > 0 for rank in range(2)]
    assert not (shares[0] & shares[1]).any()
    assert torch.equal(shares[0] | shares[1], Sums(image, question)._row_weight > 0)


def test_all_ranks_take_the_first_ones_choice():
    choices = torch.tensor([[True, False, True], [False, False, True]])
    agreed = by_ranks(2, lambda ranks: ranks.agreed(choices[ranks.number]), 4)
    assert all(torch.equal(each, choices[0]) for each in agreed)


def test_a_rank_alone_exchanges_nothing():
    attention = attention_of(CASES["causal"])
    (alone,) = by_ranks(1, lambda ranks: ranks.whole(attention), 4)
    assert alone is attention
