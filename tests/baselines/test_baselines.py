"""Every method against its definition, computed anew from full attention maps; and every method at the same budget."""

import dataclasses
import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fitprune import PruningRecipe, measure, prune
from fitprune.baselines.base import Sizes
from fitprune.baselines.table import BASELINES, make_method
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.fitting.budget import OutOfReach, checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.scoring import attention_scorers, diversity
from fitprune.scoring.diversity import dpp_order, least_similar_order, max_min_order
from fitprune.scoring.scorers import Scorer
from helpers.models import CACHE, IMAGE, batch_of, cache_in, prompts, replay, tiny_inputs, tiny_model

LAYERS = 8
EVERY = [*BASELINES, "fastv:k=1", "fastv:k=3", "dart:k=1", "pyramiddrop:shift=-1"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS, attention="eager")


@pytest.fixture(scope="module")
def fitter(model):
    return Fitter(measure(model, [tiny_inputs(model, seed=s) for s in range(4)]))


def method(name, fitter, reduction, seed=0):
    return make_method(name, fitter, checked_budget("flops_reduction", reduction), seed=seed)


def entering(model, used, inputs):
    """Places, among the visual tokens, of those that enter each layer; the first sample's."""
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    first = int(visual[0])
    found = kept_positions(model, used, inputs)
    return [[c - first for c in columns[0].tolist() if c in set(visual.tolist())] for columns in found]


def dense_attention(model, inputs):
    """Attention maps of the dense model, [H, N, N] for each layer."""
    with torch.no_grad():
        return [a[0] for a in model(**inputs, output_attentions=True).attentions]


def top(score, count):
    return sorted(torch.as_tensor(score).topk(count).indices.tolist())


# --- budgets


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("reduction", [0.3, 0.5, 0.7])
def test_every_method_meets_every_budget_to_within_one_token(name, reduction, fitter):
    n, decoder = fitter.visual_tokens, fitter.stats.model.decoder
    budget = checked_budget("flops_reduction", reduction)
    recipe = method(name, fitter, reduction)
    entered, kept = [round(f * n) for f in recipe.entering], recipe.kept(n)
    assert budget.met_by(budget.measured(decoder, n, kept, entered))
    assert recipe.cost().flops_reduction == pytest.approx(recipe.provenance["reached"], abs=1e-12)
    # One token more where tokens leave, there and to the end of that stage, and the budget is missed.
    steps = [n, *(count for pair in zip(entered, kept, strict=True) for count in pair)]
    ends = [i for i in range(1, len(steps)) if steps[i] < steps[i - 1]]
    start = ends[-1]
    more = [count + (place >= start) for place, count in enumerate(steps)]
    assert more[start] <= more[start - 1]
    assert not budget.met_by(budget.measured(decoder, n, more[2::2], more[1::2]))


FULL_SIZE = Sizes(PruningRecipe.published("llava-1.5-7b", 60).model, 576)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("fitprune", "random")])
@pytest.mark.parametrize("reduction", [0.4, 0.6])
def test_methods_are_solved_for_a_full_size_model(name, reduction):
    recipe = method(name, FULL_SIZE, reduction)
    assert reduction <= recipe.cost().flops_reduction < reduction + 0.003


def test_the_authors_parameters_come_back_where_the_budget_is_theirs():
    assert method("fastv", FULL_SIZE, 0.6).provenance["k"] == 2
    assert method("dart", FULL_SIZE, 0.6).provenance["k"] == 2
    drop = method("pyramiddrop", FULL_SIZE, 0.535).provenance
    assert drop["stages"] == [8, 16, 24]
    assert drop["share"] == pytest.approx(0.5, abs=0.02)


def test_fitprunes_counts_need_statistics():
    with pytest.raises(ValueError, match="fitted from statistics"):
        method("random", FULL_SIZE, 0.5)


def test_a_budget_out_of_reach_is_refused_with_the_reason(fitter):
    with pytest.raises(ValueError, match=r"fastv with k=3 reaches flops_reduction=0\.\d+ at most, not 0.9"):
        method("fastv:k=3", fitter, 0.9)
    with pytest.raises(ValueError, match="dart with k=1 reaches"):
        method("dart", fitter, 0.95)
    with pytest.raises(OutOfReach, match="pyramiddrop cannot meet"):
        method("pyramiddrop:shift=0", fitter, 0.9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastvv", "method 'fastvv': must be one of"),
        ("fastv:r=1", "no parameter 'r'"),
        ("fastv:k=x", "k='x' must be an integer"),
        ("fastv:k=0", "must be from 1 to 7"),
        ("dart:k=8", "must be from 1 to 7"),
        ("random:k=1", "no parameter 'k'; random takes none"),
        ("pyramiddrop:shift=5", "shift=5: must be from -2 to 1"),
    ],
)
def test_wrong_names_say_what_is_right(name, message, fitter):
    with pytest.raises(ValueError, match=message):
        method(name, fitter, 0.5)


# --- which tokens: against the definition


@pytest.mark.parametrize("k", [1, 2, 3])
def test_fastv_keeps_what_the_last_token_attends_to_in_the_layer_before_k(k, model, fitter):
    inputs = tiny_inputs(model, seed=9)
    used = method(f"fastv:k={k}", fitter, 0.4)
    kept = entering(model, used, inputs)
    row = dense_attention(model, inputs)[k - 1].mean(0)[-1]
    assert kept[k] == top(row[3:19], len(kept[k]))
    assert all(layer == list(range(16)) for layer in kept[:k])
    assert all(layer == kept[k] for layer in kept[k:])


def test_pyramiddrop_ranks_by_the_attention_that_the_layer_would_have(model, fitter):
    inputs = tiny_inputs(model, seed=9)
    used = method("pyramiddrop", fitter, 0.5)
    first = used.provenance["stages"][0]
    kept = entering(model, used, inputs)
    row = dense_attention(model, inputs)[first].mean(0)[-1]
    assert kept[first] == top(row[3:19], len(kept[first]))
    assert kept[first - 1] == list(range(16))


def test_visionzip_keeps_what_the_class_token_attends_to(model, fitter):
    inputs = tiny_inputs(model, seed=9)
    kept = entering(model, method("visionzip", fitter, 0.5), inputs)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    assert kept[0] == top(maps[-1][0].sum(0)[0, 1:], len(kept[0]))


def test_vtw_and_last_layer_first_take_everything_as_late_as_they_can(model, fitter):
    inputs = tiny_inputs(model, seed=9)
    for name in ("vtw", "last-layer-first"):
        used = method(name, fitter, 0.4)
        kept = [len(layer) for layer in entering(model, used, inputs)]
        k = used.provenance["k"]
        assert kept[:k] == [16] * k
        assert kept[k + 1 :] == [0] * (LAYERS - k - 1)
    assert entering(model, method("vtw", fitter, 0.4), inputs)[k] == list(range(16 - kept[k], 16))


def test_random_depends_on_seed_and_prompt_alone(model, fitter):
    inputs = [tiny_inputs(model, seed=s) for s in (1, 2)]
    drawn = {
        (seed, n): entering(model, method("random", fitter, 0.5, seed), x)[-1]
        for seed in (0, 1)
        for n, x in enumerate(inputs)
    }
    assert len({tuple(v) for v in drawn.values()}) == 4
    assert drawn[0, 0] == entering(model, method("random", fitter, 0.5, 0), inputs[0])[-1]
    with pytest.raises(ValueError, match="seed=-1: must be at least 0"):
        method("random", fitter, 0.5, -1)
    counts = np.zeros(16)
    for seed in range(300):
        counts[entering(model, method("random-input", fitter, 0.5, seed), inputs[0])[0]] += 1
    share = counts.sum() / (300 * 16)
    assert np.abs(counts / 300 - share).max() < 5 * np.sqrt(share * (1 - share) / 300)


def test_max_min_equals_the_definition():
    for seed in range(20):
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)).double()
        unit = x / x.norm(dim=1, keepdim=True)
        distance = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
        picked = [int(distance.min(1).values.argmax())]
        while len(picked) < 12:
            rest = [i for i in range(12) if i not in picked]
            picked.append(max(rest, key=lambda i: float(distance[i, picked].min())))
        assert max_min_order(x.float(), 12).tolist() == picked


def test_dpp_takes_at_each_step_what_raises_the_determinant_most():
    for seed in range(20):
        x = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)).double()
        kernel = x @ x.T
        picked = []
        for _ in range(6):
            rest = [i for i in range(10) if i not in picked]
            picked.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]]))))
        assert dpp_order(kernel, 6).tolist() == picked
    flat = torch.ones(5, 5)  # rank one: the authors' code divides by zero
    assert sorted(dpp_order(flat, 5).tolist()) == [0, 1, 2, 3, 4]


def test_duplication_picks_pivot_by_pivot_what_resembles_it_least():
    features = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
    pivots = torch.cat([features[:4], torch.randn(4, 4, generator=torch.Generator().manual_seed(1))])
    unit, own = features / features.norm(dim=1, keepdim=True), pivots / pivots.norm(dim=1, keepdim=True)
    picked = [0, 1, 2, 3]
    for number, take in enumerate([1, 1, 1, 1, 1, 0, 0, 0]):
        rest = sorted((i for i in range(14) if i not in picked), key=lambda i: float(unit[i] @ own[number]))
        picked += rest[:take]
    assert least_similar_order(features, pivots, 4, 9).tolist() == picked
    assert least_similar_order(features, pivots, 4, 3).tolist() == [0, 1, 2]


def test_dart_takes_pivots_by_their_keys_and_states_from_before_its_layer(model, fitter):
    inputs = tiny_inputs(model, seed=9)
    used = method("dart:k=2", fitter, 0.4)
    kept = entering(model, used, inputs)
    decoder, seen = model.model.language_model, {}
    handles = [
        decoder.layers[2].register_forward_pre_hook(
            lambda _, a, k: seen.update(hidden=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
        hidden = decoder.norm(seen["hidden"])[0]
    handles[0].remove()
    size = cache.layers[1].keys[0].abs().sum((0, 2))
    mine = size[3:19].topk(4).indices
    text = size[19:].topk(4).indices + 19
    pivots = torch.cat([hidden[3:19][mine], hidden[text]])
    others = [i for i in range(16) if i not in mine.tolist()]
    order = torch.tensor([*mine.tolist(), *others])
    picked = order[least_similar_order(hidden[3:19][order], pivots, 4, len(kept[2]))]
    assert kept[2] == sorted(picked.tolist())


# --- files: a recipe is all that a method is


def by_chance(seed):
    """The random controls' scores, written again."""

    def score(view):
        numbers = [zlib.crc32(i[v].numpy().tobytes()) for i, v in zip(view.prompt.ids, view.prompt.valid, strict=True)]
        drawn = np.stack([np.random.default_rng([seed, number]).random(500) for number in numbers])
        return torch.from_numpy(drawn).gather(1, view.place)

    return score


# The functions themselves, without names; and the flags that prune needs.
PLAIN = {
    "fitprune": Scorer(attention_scorers.self_times_cross),
    "random": Scorer(by_chance(7)),
    "random-input": Scorer(by_chance(7)),
    "uniform": Scorer(attention_scorers.self_times_cross),
    "last-layer-first": Scorer(attention_scorers.self_times_cross),
    "fastv": Scorer(attention_scorers.by_last_row),
    "pyramiddrop": Scorer(attention_scorers.by_last_row),
    "vtw": Scorer(attention_scorers.by_place, query_aware=False),
    "divprune": Scorer(diversity.by_max_min, query_aware=False),
    "cdpruner": Scorer(diversity.by_dpp),
    "dart": Scorer(diversity.by_duplication, reads_previous=True),
    "visionzip": Scorer(attention_scorers.by_cls, query_aware=False, reads_vision=True),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_from_its_file_keeps_what_its_methods_scores_keep(name, fitter, family, tmp_path):
    model, file = tiny_model(family, layers=LAYERS), tmp_path / "r.json"
    made = dataclasses.replace(method(name, fitter, 0.5, seed=7), model=adapt(model).fingerprint)
    made.save(file)
    assert PruningRecipe.load(file) == made
    counts, plain = dataclasses.replace(made, scorer={"name": "cross"}), PLAIN[name.partition(":")[0]]
    samples = prompts(model, [[3, 6], [5, 2, 4], [2, 9]])
    others = []
    for inputs in (batch_of(samples), batch_of(samples, "right"), *samples):
        for options in ({}, {"pool_images": True}):
            expected = kept_positions(model, counts, inputs, plain, **options)
            for recipe in (made, file):
                found = kept_positions(model, recipe, inputs, **options)
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            other = kept_positions(model, counts, inputs, "fitprune", **options)
            others.append(all(torch.equal(*pair) for pair in zip(other, expected, strict=True)))
        with torch.no_grad():
            with prune(model, counts, plain):
                expected = model(**inputs).logits
            with prune(model, file):
                assert torch.equal(model(**inputs).logits, expected)
    assert all(others) == (plain == PLAIN["fitprune"])


LEFT_OUT = [name for name in BASELINES if PLAIN[name] != PLAIN["fitprune"]]


@pytest.mark.parametrize("name", [*LEFT_OUT, "fastv:k=1"])
def test_a_file_of_a_version_that_left_the_scorer_out_is_refused_with_what_to_add(name, model, fitter, tmp_path):
    recipe, file = method(name, fitter, 0.5), tmp_path / "old.json"
    data = json.loads(recipe.to_json())
    scorer = data.pop("scorer")
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"old\.json: the recipe of method '{name}' names no scorer") as caught:
        PruningRecipe.load(file)
    with pytest.raises(ValueError, match="names no scorer"), prune(model, file):
        pass
    advised = json.loads(str(caught.value).split('add "scorer": ')[1])
    assert advised == scorer
    file.write_text(json.dumps(data | {"scorer": advised}))
    assert PruningRecipe.load(file) == recipe
    ours = dataclasses.replace(recipe, scorer={"name": "fitprune"})  # stated, it is what the file says
    assert PruningRecipe.from_json(ours.to_json()) == ours


@pytest.mark.parametrize("name", BASELINES)
def test_a_card_names_what_ranks_the_tokens_and_cites_fitprune_for_its_own_alone(name, fitter):
    recipe = method(name, fitter, 0.5, seed=7)
    card = recipe.card("lab/x")
    assert f"Tokens are ranked by `{recipe.scorer['name']}`" in card
    assert ('with parameters `{"seed": 7}`' in card) == (recipe.scorer["name"] == "random")
    assert ("The method is FitPrune" in card) == ("ye2025fitprune" in card) == (name == "fitprune")


# --- the engine: tokens that leave before a layer


def masked_dense(model, inputs, entered):
    """The dense eager model with, at each layer, all keys hidden that do not enter it: logits [B, N, vocab]."""
    length = inputs["input_ids"].shape[1]
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        there = torch.zeros(len(inputs["input_ids"]), length, dtype=torch.bool)
        for row, columns in enumerate(entered[number]):
            there[row, columns[columns >= 0]] = True

        def hide(_, args, kwargs, there=there):
            hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None] | ~there[:, None]
            kwargs["attention_mask"] = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)[:, None]
            return args, kwargs

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_a_row_equals_its_sample_alone_and_the_masked_dense_model(name, side, attention, fitter, family):
    model = tiny_model(family, layers=LAYERS, attention=attention)
    shape = adapt(model).fingerprint
    samples = prompts(model, [[3, 6], [5, 2, 4], [2, 9]])
    batch = batch_of(samples, side)
    used = method(name, fitter, 0.5)
    recipe = dataclasses.replace(used, model=shape)
    # As generate does: DART's key norms know the position, and count it from each row's first token.
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    entered = kept_positions(model, recipe, batch)
    for row, sample in enumerate(samples):
        alone = kept_positions(model, recipe, sample)
        pad = int((batch["attention_mask"][row] == 0).sum()) if side == "left" else 0
        for together, single in zip(entered, alone, strict=True):
            own = together[row][together[row] >= 0]
            valid = own[batch["attention_mask"][row, own] == 1]
            assert (valid - pad).tolist() == single[0].tolist()
    with torch.no_grad(), prune(model, recipe):
        found = model(**batch).logits
    model.set_attn_implementation("eager")
    expected = masked_dense(model, batch, entered)
    text = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()
    assert float((found - expected)[text].abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["divprune", "dart", "fastv", "pyramiddrop", "random-input", "visionzip"])
def test_decoding_goes_on_where_the_prefill_left(name, fitter):
    """Greedy with a cache against no cache at all, ragged; beams against beams alone."""
    model = tiny_model(layers=LAYERS, attention="sdpa")
    samples = prompts(model, [[3, 6], [5, 4], [2, 9]])
    batch = batch_of(samples)
    used = method(name, fitter, 0.5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for beams in (1, 3):
        with prune(model, used), torch.no_grad():
            cached = model.generate(**batch, **options, num_beams=beams)
            alone = [model.generate(**sample, **options, num_beams=beams)[0, -6:] for sample in samples]
            uncached = model.generate(**batch, **options, num_beams=beams, use_cache=False)
        assert torch.equal(cached[:, -6:], torch.stack(alone))
        assert torch.equal(cached, uncached)
    answer = torch.randint(10, 97, (3, 5), generator=torch.Generator().manual_seed(0))
    with prune(model, used):
        together = replay(model, batch, answer)
        singles = [replay(model, s, answer[i : i + 1]) for i, s in enumerate(samples)]
    assert float((together - torch.cat(singles)).abs().max()) < 1e-4


def test_the_first_layers_cache_shrinks_and_positions_go_on(fitter):
    model = tiny_model(layers=LAYERS)
    inputs = tiny_inputs(model)
    used = method("divprune", fitter, 0.5)
    with prune(model, used), torch.no_grad():
        cache = cache_in(model(**inputs, use_cache=True))
    left = used.kept(16)[0]
    assert [layer.keys.shape[2] for layer in cache.layers] == [left + 9] * LAYERS
    assert cache.get_seq_length() == 25  # of the sequence, by which the model counts positions
    cache.crop(-2)
    assert cache.get_seq_length() == 23
    assert cache.layers[0].keys.shape[2] == left + 7


def test_scorers_that_miss_what_they_read_say_so(model, fitter):
    inputs = tiny_inputs(model)
    zip_recipe = method("visionzip", fitter, 0.5)
    with (
        prune(model, zip_recipe, Scorer(lambda view: view.cls_attention)),
        pytest.raises(ValueError, match="reads_vision"),
    ):
        model(**inputs)
    used = method("visionzip", fitter, 0.5)
    with torch.no_grad():
        outside = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with prune(model, used), pytest.raises(ValueError, match="not made inside the prune block"):
        model(**rest, mm_encoder_outputs={"image": outside})
    with prune(model, used, "duplication"), pytest.raises(ValueError, match="layer before"):
        model(**inputs)
    used = method("random", fitter, 0.5)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with prune(model, used), pytest.raises(ValueError, match=r"scorer 'random' tells .* pass input_ids"):
        model(**rest, inputs_embeds=embeds)


def test_watching_the_tower_leaves_nothing_and_serves_threads(fitter):
    model = tiny_model(layers=LAYERS)
    used = method("visionzip", fitter, 0.5)
    samples = prompts(model, [[3, 6], [5, 4], [2, 9], [4, 4]])
    alone = []
    for sample in samples:
        with prune(model, used), torch.no_grad():
            alone.append(model(**sample).logits)
    with prune(model, used):
        with pytest.raises(ValueError, match="in use by fitprune"), prune(model, used, "self"):
            pass

        def call(number):
            with torch.no_grad():
                return [model(**samples[number]).logits for _ in range(5)]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(call, range(4)))
    for logits, expected in zip(found, alone, strict=True):
        assert all(torch.equal(one, expected) for one in logits)
    assert "get_image_features" not in vars(model.model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fitprunes_scores_work_before_the_first_layer_too(model, fitter):
    """Its attention is computed ahead: the same tokens as inside layer 0."""
    inputs = tiny_inputs(model, seed=9)
    recipe = method("divprune", fitter, 0.5)
    inside = dataclasses.replace(recipe, enter=())
    before = kept_positions(model, recipe, inputs, "fitprune")[0][0].tolist()
    assert before == kept_positions(model, inside, inputs, "fitprune")[1][0].tolist()


def test_a_recipe_with_removal_before_layers_survives_its_file(fitter, tmp_path):
    recipe = method("dart", fitter, 0.5)
    recipe.save(tmp_path / "r.json")
    assert PruningRecipe.load(tmp_path / "r.json") == recipe
    n = fitter.visual_tokens
    assert sum(recipe.counts(n)) + sum(recipe.counts_before(n)) == n - recipe.kept(n)[-1]
    with pytest.raises(ValueError, match=r"keep\[0\]=1.0: must not exceed enter\[0\]=0.5"):
        dataclasses.replace(recipe, enter=(0.5,) * LAYERS)
    with pytest.raises(ValueError, match="enter has 2 entries"):
        dataclasses.replace(recipe, enter=(1.0, 0.5))
