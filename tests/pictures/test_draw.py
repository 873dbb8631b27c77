"""Pictures of a layer, pixel by pixel; and how grids are sorted into views."""

import numpy as np
import pytest
import torch
from PIL import Image

from fitprune import Grid, KeptImage, draw_kept
from fitprune.pictures.draw import GAP, OUTLINE, PAPER
from fitprune.pictures.player import veil
from fitprune.pictures.views import chosen_layers, ranks, views_of

GREEN = (40, 160, 60)


def image_of(*grids, entered, layers=2, scores=None):
    return KeptImage(tuple(grids), torch.tensor(entered), layers, scores)


def grid(rows, columns, box=(0.0, 0.0, 1.0, 1.0), first=0, name="whole picture"):
    return Grid(torch.arange(first, first + rows * columns).view(rows, columns), box, name)


def pixels(picture):
    return np.asarray(picture).astype(int)


def middle(drawn, x, y):
    return tuple(pixels(drawn)[round(y * drawn.height), round(x * drawn.width)])


@pytest.mark.parametrize("size", [(96, 96), (640, 480), (50, 301)])
def test_what_has_left_is_dark_and_what_stays_is_as_it_was(size):
    kept = image_of(grid(2, 3), entered=[2, 1, 2, 1, 2, 1])
    drawn = draw_kept(Image.new("RGB", size, GREEN), kept, 1)
    assert max(drawn.size) == 480
    for token, stays in enumerate([True, False, True, False, True, False]):
        x, y = (token % 3 + 0.5) / 3, (token // 3 + 0.5) / 2
        assert (middle(drawn, x, y) == GREEN) is stays
        assert (max(middle(drawn, x, y)) < 40) is not stays
    assert (pixels(drawn) == OUTLINE).all(2).any()


def test_with_all_tokens_there_is_no_line():
    drawn = draw_kept(Image.new("RGB", (96, 96), GREEN), image_of(grid(2, 2), entered=[2] * 4), 1)
    assert (pixels(drawn) == GREEN).all()


def test_what_is_cropped_is_pale_and_what_is_padded_is_paper():
    kept = image_of(grid(1, 1, (-0.5, 0.25, 1.0, 0.75)), entered=[2])
    drawn = draw_kept(Image.new("RGB", (200, 200), GREEN), kept, 0, size=200)
    assert drawn.size == (300, 200)
    assert middle(drawn, 0.1, 0.5) == PAPER
    assert middle(drawn, 0.6, 0.5) == GREEN
    assert min(middle(drawn, 0.6, 0.1)) > 170


def test_grids_that_cover_each_other_are_drawn_side_by_side_and_tiles_together():
    whole, left, right = grid(1, 1), grid(1, 1, (0, 0, 0.5, 1), 1, "tile 1"), grid(1, 1, (0.5, 0, 1, 1), 2, "tile 2")
    kept = image_of(whole, left, right, entered=[2, 1, 2])
    assert [view.name for view in views_of(kept, 100, 100)] == ["whole picture", "2 tiles"]
    drawn = draw_kept(Image.new("RGB", (100, 100), GREEN), kept, 1, size=100)
    assert drawn.size == (200 + GAP, 100)
    assert [middle(drawn, x / drawn.width, 0.5) == GREEN for x in (50, 137, 187)] == [True, False, True]


def test_scores_are_coloured_by_rank_from_blue_to_yellow():
    scores = torch.tensor([[1e-9, 5.0], [1e-9, torch.nan]])
    kept = image_of(grid(1, 2), entered=[2, 2], scores=scores)
    drawn = draw_kept(Image.new("RGB", (96, 96), "grey"), kept, 0, scores=True)
    low, high = middle(drawn, 0.25, 0.5), middle(drawn, 0.75, 0.5)
    assert low[2] > low[0]
    assert high[0] > high[2]
    with pytest.raises(ValueError, match="pass scores=True to kept_tokens"):
        draw_kept(Image.new("RGB", (96, 96)), image_of(grid(1, 2), entered=[2, 2]), 0, scores=True)


def test_a_grid_without_a_place_is_refused():
    with pytest.raises(ValueError, match="pass processor and pictures to kept_tokens"):
        draw_kept(Image.new("RGB", (8, 8)), image_of(grid(1, 1, None), entered=[1]), 0)


def test_ranks_of_equal_scores_are_equal_and_of_none_are_none():
    given_ranks = ranks(torch.tensor([3.0, torch.nan, 1.0, 3.0, torch.inf]))
    assert given_ranks[[0, 2, 3, 4]].tolist() == [0.5, 0.0, 0.5, 1.0]
    assert given_ranks[1].isnan()


def test_layers_of_a_strip_are_where_tokens_leave():
    kept = image_of(grid(1, 10), entered=[1] * 3 + [5] * 3 + [9] * 3 + [32], layers=32)
    assert chosen_layers(kept, 4) == [0, 1, 5, 31]
    assert chosen_layers(image_of(grid(1, 1), entered=[4], layers=4), 4) == [0, 3]


def test_a_token_without_a_score_is_not_coloured():
    kept = image_of(grid(1, 2), entered=[2, 2], scores=torch.tensor([[1.0, torch.nan]] * 2))
    drawn = draw_kept(Image.new("RGB", (96, 96), GREEN), kept, 0, scores=True)
    assert [middle(drawn, x, 0.5) == GREEN for x in (0.25, 0.75)] == [False, True]


def test_what_is_drawn_may_be_an_array_and_other_things_are_refused(tmp_path):
    kept, array = image_of(grid(1, 2), entered=[2, 1]), np.full((8, 8, 3), 99, np.uint8)
    assert pixels(draw_kept(array, kept, 1)).shape == (480, 480, 3)
    for words, message in [
        ((tmp_path, kept, 1), "picture is a PosixPath"),
        (([array, array], kept, 1), "picture is several"),
        ((array, [[kept]], 1), r"kept is a list: must be one KeptImage, such as kept_tokens\(\.\.\.\)\[0\]\[0\]"),
        ((array, kept, 1.5), "layer=1.5: must be an integer from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_kept(*words)
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"size={size}: must be an integer from 1"):
            draw_kept(array, kept, 1, size=size)


def test_a_line_lies_between_tiles_too():
    tiles = grid(2, 2, (0, 0, 0.5, 1)), grid(2, 2, (0.504, 0, 1, 1), 4)  # as measured: not quite side by side
    (view,) = views_of(image_of(*tiles, entered=[2, 2, 2, 2, 1, 1, 1, 1]), 100, 100)
    assert veil(view, torch.tensor([True] * 4 + [False] * 4))[1] == "M50.4 0v50M50.4 50v50"
    (one,) = views_of(image_of(grid(2, 2), entered=[2] * 4), 100, 100)
    edge = veil(one, torch.tensor([True, False, False, False]))[1]
    assert sorted(edge.split("M")[1:]) == ["0 50h50", "50 0v50"]
