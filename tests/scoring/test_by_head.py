"""Attention by head against the definition."""

import pytest
import torch

from fitprune.costs.flops import SCORE_BLOCK
from fitprune.families.images import images_of
from fitprune.scoring import by_head
from fitprune.scoring.by_head import HEAD_KINDS, head_attention
from fitprune.scoring.received import text_after
from fitprune.scoring.softmax import Softmax


def naive_head_attention(query, key, image, question, scaling, valid):
    """The definition, sample by sample and head by head, from whole maps."""
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    found = {kind: torch.zeros(batch, heads, length, dtype=torch.float64) for kind in HEAD_KINDS}
    for row in range(batch):
        for head in range(heads):
            products = scaling * query[row, head].double() @ key[row, head * key.shape[1] // heads].double().T
            hidden = torch.triu(torch.ones(length, past + length, dtype=torch.bool), past + 1) | ~valid[row]
            weights = products.masked_fill(hidden, -1e300).softmax(-1)[:, past:]
            visual = image[row] >= 0
            if question[row].any():
                asked = weights[question[row]]
                found["mean"][row, head] = asked.mean(0) * visual
                found["max"][row, head] = asked.amax(0) * visual
                found["last"][row, head] = asked[-1] * visual
            for number in range(int(image[row].max()) + 1):
                member = image[row] == number
                found["self"][row, head] += weights[member].mean(0) * member
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [12, 70, 201])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 37])
def test_attention_by_head_equals_the_full_map(groups, length, padded, past, monkeypatch):
    torch.manual_seed(length + groups)
    query, key = torch.randn(4, 4, length, 8) * 2, torch.randn(4, groups, past + length, 8) * 2
    visual = torch.zeros(4, length, dtype=torch.bool)  # the last sample has no image
    for row, (first, last) in enumerate([(2, length - 3), (3, length // 2 + 2), (4, length - 2)]):
        visual[row, first:last] = True
    visual[1, 5] = False  # text between images
    valid = torch.ones(4, past + length, dtype=torch.bool)
    if padded:
        valid[:3, :past] = torch.tensor([True, False, True])[:, None]
        valid[0, past : past + 2] = valid[1, past : past + 3] = valid[2, past : past + 1] = False
    image, question = images_of(visual), text_after(visual, valid[:, past:])
    question[2] = False  # an image, but no question
    given = {"softmax": Softmax(0.3, valid if padded else None)}
    found = head_attention(query, key, image, question, **given)
    expected = naive_head_attention(query, key, image, question, 0.3, valid)
    assert set(found) == set(HEAD_KINDS)
    for kind in HEAD_KINDS:
        assert found[kind].dtype == torch.float32
        assert torch.allclose(found[kind].double(), expected[kind], rtol=1e-5, atol=1e-7)
        alone = head_attention(query, key, image, question, kinds=(kind,), **given)
        assert list(alone) == [kind]
        assert torch.allclose(alone[kind], found[kind], rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(by_head, "BLOCK_BYTES", 2 * 4 * SCORE_BLOCK * (past + length) * 4)  # two samples at a time
    for kind, one in head_attention(query, key, image, question, **given).items():
        assert torch.allclose(one, found[kind], rtol=1e-5, atol=1e-7)
