"""Rows that leave and come back, and masks that are cut to them: pure tensors."""

import pytest
import torch

from fitprune.engine.masks import cut_mask
from fitprune.engine.rows import pack, take, take_positions, to_columns, untake

COLUMNS = torch.tensor([[0, 1, 2, 3], [-1, 1, 2, 3]])
STAYS = torch.tensor([[True, False, True, True], [False, True, False, False]])


def test_rows_are_packed_to_the_right_in_order():
    index, columns = pack(COLUMNS, STAYS)
    assert columns.tolist() == [[0, 2, 3], [-1, -1, 1]]
    assert COLUMNS.gather(1, index)[0].tolist() == [0, 2, 3]
    assert index[1, -1] == 1


def test_rows_that_stay_come_back_to_their_places():
    rows = torch.randn(2, 4, 3)
    index, _ = pack(COLUMNS, STAYS)
    back = untake(take(rows, index), index, 4)
    assert torch.equal(back[STAYS], rows[STAYS])


def test_a_token_that_left_is_zero_and_padding_repeats_the_token_before_it():
    hidden = torch.arange(1.0, 7).view(2, 3, 1)
    kept = torch.tensor([[0, 2, 3], [-1, 0, 1]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert to_columns(hidden, kept, valid, 4)[..., 0].tolist() == [[1, 0, 2, 3], [5, 6, 6, 6]]
    whole = torch.randn(1, 4, 2)
    assert to_columns(whole, None, None, 4) is whole


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_are_taken_by_sample_also_where_all_share_them(batch):
    whole = torch.randn(3, batch, 4, 5)
    kept = torch.tensor([[0, 2], [1, 3]])
    cut = take_positions(whole, kept)
    assert cut.shape == (3, 2, 2, 5)
    assert all(torch.equal(cut[:, b], whole[:, b % batch, kept[b]]) for b in range(2))


@pytest.mark.parametrize("numbers", [False, True])
def test_a_mask_is_cut_to_rows_and_keys_and_hides_padding(numbers):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    if numbers:
        mask = torch.zeros(1, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
    cut = cut_mask(mask, torch.tensor([[1, 3]]), torch.tensor([[-1, 1, 3]]))
    visible = cut == 0 if numbers else cut
    assert visible[0, 0].tolist() == [[False, True, False], [False, True, True]]
