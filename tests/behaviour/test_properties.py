"""What must hold for any layout of tokens, any recipe and any counts. Seeded: a failure comes back on every run."""

import functools

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fitprune import PruningRecipe
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.families.images import images_of
from fitprune.fitting.rules import keep_highest
from fitprune.recipes.rounding import kept_counts
from helpers.models import IMAGE, tiny_model

LAYERS = 4
many = settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))

# A sample: text lengths with an image (its visual tokens) between each two; adjacent images where a text is empty.
texts = st.integers(0, 6)
samples = st.lists(st.tuples(texts, st.integers(1, 40)), max_size=3).flatmap(
    lambda images: st.integers(1, 6).map(lambda question: (images, question))
)
recipes = st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS).map(
    lambda keep: tuple(sorted(keep, reverse=True))
)
batches = st.lists(samples, min_size=1, max_size=4).filter(lambda batch: any(images for images, _ in batch))


@functools.cache
def model():
    return tiny_model(layers=LAYERS)


def inputs_of(batch, side, number):
    """Ids of a layout, with made-up image features, and for each image its row and columns."""
    generator = torch.Generator().manual_seed(number)
    rows, features = [], []
    for images, question in batch:
        row = []
        for text, visual in images:
            row += [10] * text + [IMAGE] * visual
            features.append(torch.randn(visual, 32, generator=generator))
        rows.append(row + [11] * question)
    length = max(map(len, rows))
    pad = [(length - len(row)) * [0] for row in rows]
    ids = torch.tensor([p + row if side == "left" else row + p for p, row in zip(pad, rows, strict=True)])
    words = torch.randint(10, 97, ids.shape, generator=generator)
    spans = []
    for number, (images, _) in enumerate(batch):
        at = len(pad[number]) if side == "left" else 0
        for text, visual in images:
            spans.append((number, at + text, at + text + visual))
            at += text + visual
    return {
        "input_ids": torch.where(ids >= 10, words, ids),
        "attention_mask": (ids > 0).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(torch.zeros(1), features)},
    }, spans


@seed(2409)
@many
@given(batches, recipes, st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 9), st.booleans())
def test_what_stays_in_any_layout(batch, keep, side, pool, number, query_aware):
    inputs, spans = inputs_of(batch, side, number)
    recipe = PruningRecipe(keep, adapt(model()).fingerprint, 100)
    scorer = "fitprune" if query_aware else "self"
    entered = kept_positions(model(), recipe, inputs, scorer, pool_images=pool)
    assert len(entered) == LAYERS
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    left_before = {span: span[2] - span[1] for span in spans}
    for layer, columns in enumerate(entered):
        for row, kept in enumerate(columns):
            kept = kept[kept >= 0]
            if layer == 0:
                assert torch.equal(kept, valid[row].nonzero()[:, 0])
                continue
            assert bool((kept[1:] > kept[:-1]).all())  # in order, none twice
            assert bool(valid[row, kept].all())
            text = (valid[row] & (ids[row] != IMAGE)).nonzero()[:, 0]
            assert bool(torch.isin(text, kept).all())  # never a text token
            assert bool(torch.isin(kept, entered[layer - 1][row]).all())  # what left stays away
            own = [span for span in spans if span[0] == row]
            sizes = [end - first for _, first, end in own]
            found = [int(((kept >= first) & (kept < end)).sum()) for _, first, end in own]
            if pool:
                assert sum(found) == kept_counts(keep, sum(sizes))[layer - 1]
            else:
                assert found == [kept_counts(keep, size)[layer - 1] for size in sizes]
            assert all(now <= left_before[span] for now, span in zip(found, own, strict=True))
            left_before.update(zip(own, found, strict=True))
        if any(left_before[s] < s[2] - s[1] for s in spans):  # packed to the right, as tightly as the longest row lets
            assert bool((columns[:, 0] >= 0).any())
            assert bool(((columns < 0).long().diff(dim=1) <= 0).all())


scores = st.sampled_from([0.0, 1.0, 2.0, -1.0, float("inf"), float("-inf")])


@seed(2409)
@many
@given(
    st.lists(st.tuples(st.integers(-1, 2), scores), min_size=1, max_size=30), st.lists(st.integers(0, 12), min_size=3)
)
def test_the_highest_scores_stay_and_of_equal_ones_the_later(tokens, left):
    image = torch.tensor([[number for number, _ in tokens]])
    score = torch.tensor([[value for _, value in tokens]])
    stays = keep_highest(score, image, torch.tensor([left]))[0].tolist()
    for number in range(3):
        member = [i for i, (owner, _) in enumerate(tokens) if owner == number]
        best = sorted(member, key=lambda i: (tokens[i][1], i))[max(0, len(member) - left[number]) :]
        assert [i for i in member if stays[i]] == sorted(best)
    assert all(stays[i] for i, (owner, _) in enumerate(tokens) if owner < 0)


@seed(2409)
@many
@given(st.lists(st.lists(st.tuples(texts, st.integers(1, 9)), max_size=3), min_size=1, max_size=4))
def test_images_are_numbered_as_features_are_dealt(batch):
    length = sum(text + visual for row in batch for text, visual in row) + 1
    visual = torch.zeros(len(batch), length, dtype=torch.bool)
    expected = torch.full((len(batch), length), -1)
    for row, images in enumerate(batch):
        at = 0
        for number, (text, size) in enumerate(images):
            visual[row, at + text : at + text + size] = True
            expected[row, at + text : at + text + size] = number
            at += text + size
    assert torch.equal(images_of(visual, [size for row in batch for _, size in row]), expected)
