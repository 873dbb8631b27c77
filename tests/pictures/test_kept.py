"""Which visual tokens stay, with scores, and the share of a box."""

import dataclasses

import pytest
import torch

from fitprune import Grid, KeptImage, PruningRecipe, attach, kept_positions, kept_tokens, make_batches
from fitprune.families.adapter import adapt
from fitprune.families.images import visual_mask

WHOLE = (0.0, 0.0, 1.0, 1.0)


def square(side, entered, *, layers=4, box=WHOLE, scores=None):
    grid = Grid(torch.arange(side * side).view(side, side), box, "whole picture")
    return KeptImage((grid,), torch.tensor(entered), layers, scores)


@pytest.fixture
def batch(bundled, samples):
    return next(make_batches(samples, bundled[1], batch_size=4))


def test_it_says_what_kept_positions_says(bundled, recipe, batch, samples):
    model, processor = bundled
    pictures = [sample.load_image() for sample in samples]
    kept = kept_tokens(model, recipe, batch, processor=processor, pictures=pictures)
    columns = kept_positions(model, recipe, batch)
    visual = visual_mask(adapt(model), batch["input_ids"])
    for row, (image,) in enumerate(kept):
        own = visual[row].nonzero()[:, 0]
        for layer in range(image.layers):
            assert torch.equal(image.present(layer), torch.isin(own, columns[layer][row]))
        assert image.counts == [144, *recipe.kept(144)[:-1]]
        assert image.grid(0)[0].shape == (12, 12)
        assert repr(image) == f"KeptImage(144 visual tokens in 12x12, {image.counts[-1]} enter the last layer)"


def test_pictures_are_encoded_once(bundled, recipe, batch, samples):
    model, processor = bundled
    calls = []
    tower = adapt(model).model.model.vision_tower
    with tower.register_forward_hook(lambda *_: calls.append(1)):
        kept_tokens(model, recipe, batch, processor=processor, pictures=[sample.load_image() for sample in samples])
    assert len(calls) == 1


def test_pixels_of_0_to_255_in_half_precision_are_known_again(bundled, recipe, samples, monkeypatch):
    model, processor = bundled
    for step in ("do_rescale", "do_normalize"):
        monkeypatch.setattr(processor.image_processor, step, False)
    inputs = dict(next(make_batches(samples[:1], processor)))
    assert inputs["pixel_values"].max() > 100
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    ((kept,),) = kept_tokens(model, recipe, inputs, processor=processor, pictures=[samples[0].load_image()])
    assert kept.grids[0].box == pytest.approx(WHOLE, abs=0.02)
    with pytest.raises(ValueError, match="the processor makes other pixels of it than the inputs have"):
        kept_tokens(model, recipe, inputs, processor=processor, pictures=[samples[1].load_image()])


def test_asking_for_scores_changes_nothing_and_the_lowest_leave(bundled, recipe, batch):
    model, _ = bundled
    plain = kept_tokens(model, recipe, batch)
    for (one,), (other,) in zip(kept_tokens(model, recipe, batch, scores=True), plain, strict=True):
        assert torch.equal(one.entered, other.entered)
        assert other.scores is None
        assert one.scores.shape == (8, 144)
        for layer in range(8):
            present = one.present(layer)
            assert torch.equal(~one.scores[layer].isnan(), present)
            left = present & ~(one.entered > layer + 1) if layer < 7 else torch.zeros(144).bool()
            if left.any():
                assert one.scores[layer][left].max() <= one.scores[layer][present & ~left].min()


def test_a_scorer_that_works_at_some_places_alone_has_no_scores_elsewhere(bundled, recipe, batch):
    stages = {"name": "by-stage", "parameters": {"stages": {"before 2": {"name": "self"}}}}
    enter = (1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    half = PruningRecipe(enter, recipe.model, 144, enter=enter, scorer=stages)
    ((image,), *_) = kept_tokens(bundled[0], half, batch, scores=True)
    assert image.counts == [144, 144, *[72] * 6]
    assert [not row.isnan().all() for row in image.scores] == [layer == 2 for layer in range(8)]
    assert not image.scores[2].isnan().any()  # of all that could leave there


def test_accumulated_scores_end_where_nothing_is_accumulated_any_more(bundled, recipe, batch):
    early = dataclasses.replace(recipe, keep=(1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    ((image,), *_) = kept_tokens(bundled[0], early, batch, scorer="accumulated", scores=True)
    assert [not row.isnan().all() for row in image.scores] == [True, True, *[False] * 6]


def test_it_works_beside_an_attached_pruner_of_the_same_recipe(bundled, recipe, batch):
    pruner = attach(bundled[0], recipe)
    try:
        assert kept_tokens(bundled[0], recipe, batch)[0][0].counts[-1] == recipe.kept(144)[-2]
        with pytest.raises(ValueError, match="in use by fitprune"):
            kept_tokens(bundled[0], recipe, batch, scores=True)
    finally:
        pruner.detach()


def test_what_has_left_before_the_first_layer_enters_none():
    image = square(2, [0, 1, 4, 4])
    assert image.counts == [3, 2, 2, 2]
    assert image.present(0).tolist() == [False, True, True, True]
    assert image.grid(1)[0].tolist() == [[False, False], [True, True]]


def test_the_share_of_a_box_counts_cells_whose_middle_lies_in_it():
    image = square(4, [4] * 8 + [1] * 8)
    assert image.share(WHOLE, 0) == 1
    assert image.share(WHOLE, 3) == 0.5
    assert image.share((0, 0, 1, 0.5), 3) == 1
    assert image.share((0.3, 0.3, 0.7, 0.7), 3) == 0.5
    assert int(image.inside((0.3, 0.3, 0.7, 0.7)).sum()) == 4
    assert image.inside((0.01, 0.01, 0.02, 0.02)).nonzero().tolist() == [[0]]  # smaller than a cell


def test_a_token_without_a_cell_is_in_no_box():
    grid = Grid(torch.tensor([[0, 1], [2, 3]]), WHOLE, "whole picture")
    image = KeptImage((grid,), torch.tensor([2, 2, 2, 1, 2]), 2)  # the last is a newline
    assert image.inside(WHOLE).tolist() == [True, True, True, True, False]
    assert image.share(WHOLE, 1) == 0.75


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0, 0.5, 1), "must be left, top, right, bottom"),
        ((1.2, 0, 1.4, 1), "no visual token lies in it"),
        ((0, 0, 96, 96), r"box=\(0, 0, 96, 96\): must be fractions .* divide pixels by the picture's width and height"),
        ((0, 0, 1), r"box=\(0, 0, 1\): must be four numbers"),
        ("0,0,1,1", "box='0,0,1,1': must be four numbers"),
        (None, "box=None: must be four numbers"),
    ],
)
def test_a_box_that_is_none_is_refused(box, message):
    with pytest.raises(ValueError, match=message):
        square(2, [1] * 4).share(box, 0)


def test_a_layer_that_is_none_and_a_place_that_is_unknown():
    with pytest.raises(ValueError, match="layer=4: must be an integer from 0 to 3"):
        square(2, [1] * 4).present(4)
    with pytest.raises(ValueError, match="pass processor and pictures"):
        square(2, [1] * 4, box=None).inside(WHOLE)


def test_one_picture_is_no_list_of_pictures(bundled, recipe, batch, samples):
    for picture in (samples[0].load_image(), "a.jpg", torch.zeros(8, 8, 3).numpy()):
        with pytest.raises(ValueError, match=r"must be a list of pictures; pass \[picture\]"):
            kept_tokens(bundled[0], recipe, batch, processor=bundled[1], pictures=picture)
