"""What attention looks like, against cases computed by hand."""

import math

import pytest
import torch

from fitprune.analysis import attention
from helpers.statistics import statistics_of

LAYERS = 3


def test_received_attention_is_summed_over_the_tokens_of_each_sample():
    layers = attention.attention_per_layer(statistics_of([[1, 2, 3, 10, 20]], [[1, 1, 1, 1, 1]], (3, 2)))
    assert layers.self_attention.mean.tolist() == [18]  # 6 and 30
    assert layers.self_attention.deviation.tolist() == [12]
    assert layers.self_attention.low.tolist() == pytest.approx([6 + 0.05 * 24])
    assert layers.cross_attention.mean.tolist() == [2.5]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_top_share_of_uniform_attention_is_the_fraction_itself(count):
    top = attention.top_share(statistics_of(torch.full((LAYERS, count), 0.3)))
    for fraction, row in zip(top.fractions, top.self_attention.mean.tolist(), strict=True):
        assert row == pytest.approx([fraction] * LAYERS)


def test_the_top_share_counts_the_most_attended_tokens_and_parts_of_one():
    top = attention.top_share(statistics_of([[1, 6, 3]], [[0, 0, 0]]), fractions=(1 / 3, 0.5, 1.0))
    assert top.self_attention.mean[:, 0].tolist() == pytest.approx([0.6, 0.75, 1.0])
    assert top.cross_attention.mean[:, 0].tolist() == pytest.approx([1 / 3, 0.5, 1.0])  # none received: uniform


def test_a_top_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"fractions holds 10: must be above 0 and at most 1"):
        attention.top_share(statistics_of([[1.0, 2.0]]), fractions=(10,))


def test_spearman_of_a_layer_with_itself_is_1_and_of_a_reversed_one_is_minus_1():
    ranks = attention.rank_agreement(statistics_of([[1, 2, 3, 4], [9, 5, 2, 1], [10, 200, 3000, 40000]], counts=(4,)))
    expected = [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert torch.allclose(ranks.matrix, torch.tensor(expected, dtype=torch.float64))
    assert ranks.samples == 1


def test_equal_scores_share_their_mean_rank():
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2.
    ranks = attention.rank_agreement(statistics_of([[1, 1, 2], [1, 2, 3]]))
    assert float(ranks.matrix[0, 1]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_rank_agreement_is_a_mean_over_the_samples_where_it_is_defined():
    two = statistics_of([[1, 2, 3, 1, 2, 3, 7], [1, 2, 3, 3, 2, 1, 7], [5] * 7], counts=(3, 3, 1))
    ranks = attention.rank_agreement(two)
    assert ranks.samples == 2
    assert float(ranks.matrix[0, 1]) == pytest.approx(0)
    assert math.isnan(float(ranks.matrix[0, 2]))  # nothing differs in layer 2
    assert attention.rank_agreement(statistics_of([[1.0, 2.0]], counts=(1, 1))) is None


def test_attention_that_lies_in_one_row_is_all_in_that_row():
    one_row = torch.zeros(4, 4)
    one_row[2] = 0.25
    column = one_row.T
    stats = statistics_of(torch.stack([one_row.flatten(), column.flatten()]), torch.ones(2, 16))
    position = attention.position_bias(stats)
    assert (position.side, position.samples) == (4, 1)
    assert position.by_row["self"][0].tolist() == [0, 0, 4, 0]
    assert position.by_column["self"][0].tolist() == [1, 1, 1, 1]
    assert position.by_column["score"][1].tolist() == [0, 0, 4, 0]
    assert position.by_row["cross"].unique().tolist() == [1]
    assert position.grid["self"][2].tolist() == [2, 2, 4, 2]


def test_each_sample_counts_the_same_in_position_bias():
    strong = torch.tensor([[8.0, 0, 0, 0]]) * 1000
    weak = torch.tensor([[0.0, 0, 0, 1]])
    position = attention.position_bias(statistics_of(torch.cat([strong, weak], 1), counts=(4, 4)))
    assert position.grid["self"].tolist() == [[2, 0], [0, 2]]
