"""Scorers: what they read against naive computations, every name in a batch, and how recipes hold them."""

import dataclasses
import json

import pytest
import torch

from fitprune import PruningRecipe, prune
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.scoring import by_head, received
from fitprune.scoring.scorers import SCORERS, Scorer, get_scorer, register_scorer
from helpers.models import IMAGE, batch_of, prompts, tiny_model

TERMS = [["mean", 0, 1.0], ["max", 1, 0.5], ["last", 2, 2.0], ["self", 3, 0.25], ["mean", 3, 0.7]]
PROFILE = [0.1, 0.4, 0.2, 0.3, 0.05]
STAGES = {"before 1": {"name": "last"}, "1": {"name": "heads", "parameters": {"terms": TERMS}}, "3": {"name": "self"}}
PARAMETERS = {
    "heads": {"terms": TERMS}, "debiased": {"profile": PROFILE}, "by-stage": {"stages": STAGES}, "random": {"seed": 3}
}  # fmt: skip
ATTENTION = ("fitprune", "self", "cross", "cross-mean", "last", "value", "accumulated", "heads", "debiased")
BASELINES = ("random", "place", "cls", "max-min", "dpp", "duplication")  # tests/test_baselines.py has their definitions
INSIDE = [name for name in SCORERS if name != "duplication"]  # which works before layers alone


def spec(name, **more):
    return {"name": name, "parameters": PARAMETERS.get(name, {}) | more}


def of_terms(*terms):
    return {"name": "heads", "parameters": {"terms": list(terms)}}


def of_profile(profile):
    return {"name": "debiased", "parameters": {"profile": profile}}


def of_stage(scorer):
    return {"name": "by-stage", "parameters": {"stages": {"3": scorer}}}


def recipe_of(model, keep=(1.0, 0.6, 0.6, 0.3, 0.3), enter=(1.0, 0.8, 0.6, 0.6, 0.3), scorer=None, visual=16):
    return PruningRecipe(keep, adapt(model).fingerprint, visual, enter=enter, **({"scorer": scorer} if scorer else {}))


def kept(model, recipe, inputs, scorer=None):
    """Columns that enter each layer, row by row."""
    return [[row[row >= 0].tolist() for row in layer] for layer in kept_positions(model, recipe, inputs, scorer)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(attention="eager")


@pytest.fixture(scope="module")
def padded(model):
    return batch_of(prompts(model, [[3, 6], [5, 2, 4], [2, 9]]))


# --- every scorer


def test_every_scorer_has_a_case():
    assert set(PARAMETERS) <= set(SCORERS)
    assert {*ATTENTION, *BASELINES, "by-stage"} == set(SCORERS)


def test_a_long_batch_may_hold_a_sample_without_an_image(monkeypatch):
    """With 32 heads and more than 1024 keys, samples are taken one at a time."""
    model = tiny_model()
    samples = prompts(model, [[3, 6], [20], [2, 9]])
    recipe = recipe_of(model)
    batch = batch_of(samples)
    expected = {name: kept(model, recipe, batch, spec(name)) for name in INSIDE}
    monkeypatch.setattr(by_head, "BLOCK_BYTES", 1)
    monkeypatch.setattr(received, "BLOCK_BYTES", 1)
    monkeypatch.setattr(received, "TILE_BYTES", 1)
    for name in INSIDE:
        found = kept(model, recipe, batch, spec(name))
        assert found == expected[name]
        assert found[4][1] == list(range(7, 27))


@pytest.mark.parametrize(("family", "side"), [("llava", "right"), ("llava_next", "left")])
@pytest.mark.parametrize("diversity", [0, 0.5])
@pytest.mark.parametrize(
    "name", [name for name in INSIDE if name != "dpp"]
)  # past 32 picks, its rank, rounding decides
def test_a_row_keeps_what_its_sample_keeps_alone(name, diversity, family, side):
    model = tiny_model(family)
    samples = prompts(model, [[3, 6], [5, 2, 4], [2, 9]])
    batch = batch_of(samples, side)
    recipe = recipe_of(model, scorer=spec(name, diversity=diversity))
    together = kept(model, recipe, batch)
    for row, sample in enumerate(samples):
        pad = int((batch["attention_mask"][row] == 0).sum()) if side == "left" else 0
        end = pad + sample["input_ids"].shape[1]
        alone = kept(model, recipe, sample)
        assert [[c - pad for c in layer[row] if pad <= c < end] for layer in together] == [layer[0] for layer in alone]
        assert len(alone[4][0]) < len(alone[2][0]) < len(alone[1][0]) < len(alone[0][0])
    plain = kept(model, recipe, batch, spec(name))
    assert (together == plain) == (diversity == 0)


def test_images_that_share_a_count_compete_for_it_with_diversity_too(model):
    sample = prompts(model, [[3, 2, 6]])[0]
    recipe = recipe_of(model, (0.25,) * 5, ())
    for diversity in (0, 0.5):
        scorer = spec("last", diversity=diversity)
        visual = {c for c in range(sample["input_ids"].shape[1]) if sample["input_ids"][0, c] == IMAGE}
        own = [c for c in kept_positions(model, recipe, sample, scorer)[1][0].tolist() if c in visual]
        pooled = [
            c for c in kept_positions(model, recipe, sample, scorer, pool_images=True)[1][0].tolist() if c in visual
        ]
        assert sum(c < 19 for c in own) == 4
        assert len(own) == len(pooled) == 8
        assert sum(c < 19 for c in pooled) != 4


def observed(model, inputs, entered):
    """Attention maps [B, H, N, N] and values [B, G, N, D] of each layer, with the keys hidden that do not enter it."""
    length = inputs["input_ids"].shape[1]
    maps, values, handles = [], [], []
    for number, layer in enumerate(model.model.language_model.layers):
        there = torch.zeros(len(inputs["input_ids"]), length, dtype=torch.bool)
        for row, columns in enumerate(entered[number]):
            there[row, columns] = True

        def hide(_, args, kwargs, there=there):
            hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None] | ~there[:, None]
            kwargs["attention_mask"] = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)[:, None]
            return args, kwargs

        handles += [
            layer.register_forward_pre_hook(hide, with_kwargs=True),
            layer.self_attn.register_forward_hook(lambda _, __, output: maps.append(output[1])),
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, output: values.append(output.unflatten(2, (-1, 8)).transpose(1, 2))
            ),
        ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return maps, values


def regions(inputs, row):
    """Columns of each image of a sample, and of its question."""
    ids = inputs["input_ids"][row].tolist()
    visual = [c for c, token in enumerate(ids) if token == IMAGE]
    starts = [c for c in visual if c - 1 not in visual]
    images = [list(range(start, start + 16)) for start in starts]
    question = [c for c in range(visual[-1] + 1, len(ids)) if inputs["attention_mask"][row, c]]
    return images, question


def top(score, columns, count):
    return sorted(sorted(columns, key=lambda c: (float(score[c]), c))[len(columns) - count :])


def naive_scores(name, maps, values, images, question):
    """Score of every column of one sample; maps [layers, H, N, N], values [layers, G, N, D] up to the layer's own."""
    here, length = maps[-1], maps.shape[-1]
    mean = here[:, question].mean(1)  # [H, N]
    own = torch.zeros_like(mean)
    strongest = torch.zeros(length)
    for image in images:
        own[:, image] = here[:, image][:, :, image].mean(1)
        strongest[image] = here.amax(0)[image][:, image].mean(0)
    kinds = {"mean": mean, "max": here[:, question].amax(1), "last": here[:, question[-1]], "self": own}
    cross = here.amax(0)[question].mean(0)
    usual = torch.ones(length)
    for image in images:
        for place, column in enumerate(image):
            usual[column] = PROFILE[place * len(PROFILE) // len(image)] + sum(PROFILE) / len(PROFILE) / 10
    return {
        "fitprune": strongest * cross,
        "self": strongest,
        "cross": cross,
        "cross-mean": mean.mean(0),
        "last": here[:, question[-1]].mean(0),
        "value": (mean * values[-1].norm(dim=-1).repeat_interleave(2, 0)).amax(0),
        "accumulated": maps[:, :, question].mean((1, 2)).sum(0),
        "heads": sum(weight * kinds[kind][head] for kind, head, weight in TERMS),
        "debiased": mean.mean(0) / usual,
    }[name]


@pytest.mark.parametrize("name", ATTENTION)
def test_a_scorer_keeps_what_its_definition_keeps(name, model, padded):
    """Tokens leave inside layers 2 and 3; at the second, those that are gone receive nothing."""
    entered = kept(model, recipe_of(model, (1.0, 1.0, 0.6, 0.25, 0.25), (), spec(name)), padded)
    maps, values = observed(model, padded, entered)
    for row in range(3):
        images, question = regions(padded, row)
        for layer, count in ((2, 10), (3, 4)):
            there = [[c for c in image if c in entered[layer][row]] for image in images]
            seen = torch.stack([m[row] for m in maps[: layer + 1]]), torch.stack([v[row] for v in values[: layer + 1]])
            if name == "debiased":  # places count those that left
                score = naive_scores(name, *seen, images, question)
            else:
                score = naive_scores(name, *seen, there, question)
            for image in there:
                expected = top(score, image, count)
                assert [c for c in entered[layer + 1][row] if c in image] == expected


def test_accumulated_before_a_layer_sums_the_layers_before_it(model, padded):
    entered = kept(
        model, recipe_of(model, (1.0, 1.0, 0.5, 0.5, 0.5), (1.0, 1.0, 0.5, 0.5, 0.5), spec("accumulated")), padded
    )
    maps, values = observed(model, padded, entered)
    for row in range(3):
        images, question = regions(padded, row)
        score = naive_scores(
            "accumulated", *(torch.stack([m[row] for m in x[:2]]) for x in (maps, values)), images, question
        )
        assert [c for image in images for c in image if c in entered[2][row]] == [
            c for i in images for c in top(score, i, 8)
        ]


def test_equal_weights_on_the_mean_of_all_heads_keep_what_cross_mean_keeps(model, padded):
    equal = {"name": "heads", "parameters": {"terms": [["mean", head, 2.5] for head in range(4)]}}
    recipe = recipe_of(model)
    assert kept(model, recipe, padded, equal) == kept(model, recipe, padded, "cross-mean")
    assert kept(model, recipe, padded, equal) != kept(model, recipe, padded, "cross")


def test_weights_of_one_head_add_up(model, padded):
    twice = {"name": "heads", "parameters": {"terms": [["mean", 0, 1.0], ["last", 1, 1.0], ["mean", 0, 2.0]]}}
    once = {"name": "heads", "parameters": {"terms": [["mean", 0, 3.0], ["last", 1, 1.0]]}}
    assert kept(model, recipe_of(model), padded, twice) == kept(model, recipe_of(model), padded, once)


def test_a_flat_profile_keeps_what_cross_mean_keeps(model, padded):
    recipe = recipe_of(model)
    for profile in ([0.3], [0.02] * 7, [1.0] * 99):
        assert kept(model, recipe, padded, of_profile(profile)) == kept(model, recipe, padded, "cross-mean")


def test_by_stage_scores_each_place_with_its_own(model, padded):
    recipe = recipe_of(model, scorer=spec("by-stage"))
    found = kept(model, recipe, padded)
    calls = []

    def one_after_the_other(view):
        calls.append((view.layer, view.before))
        return get_scorer(list(STAGES.values())[len(calls) - 1]).score(view)

    assert kept(model, recipe, padded, one_after_the_other) == found
    assert calls == [(1, True), (1, False), (3, False)]
    assert found[:2] == kept(model, recipe, padded, "last")[:2]
    assert all(found != kept(model, recipe, padded, one) for one in STAGES.values())


def test_by_stage_reads_what_its_scorers_read():
    def by_stage(*names):
        return get_scorer(
            {"name": "by-stage", "parameters": {"stages": {str(i): name for i, name in enumerate(names)}}}
        )

    assert not by_stage("self", "self").query_aware
    assert by_stage("self", "last").query_aware
    assert by_stage("self", "accumulated").accumulates
    assert not by_stage("self", "last").accumulates


def test_accumulated_is_refused_before_the_first_layer(model, padded):
    recipe = recipe_of(model, (0.5,) * 5, (0.5,) * 5)
    with pytest.raises(ValueError, match="before layer 0: with 'accumulated', remove inside it or later"):
        kept(model, recipe, padded, "accumulated")


# --- recipes with a scorer


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("diversity", [{}, {"diversity": 0.5}])
def test_a_recipe_with_a_scorer_survives_its_file(name, diversity, model, padded, tmp_path):
    recipe = recipe_of(model, scorer=spec(name, **diversity))
    assert PruningRecipe.from_json(recipe.to_json()) == recipe
    recipe.save(tmp_path / "r.json")
    loaded = PruningRecipe.load(tmp_path / "r.json")
    assert loaded == recipe
    assert loaded.scorer == spec(name, **diversity)
    assert kept(model, loaded, padded) == kept(model, recipe, padded)


def test_a_recipe_without_a_scorer_is_as_before(model, padded):
    recipe = recipe_of(model)
    assert "scorer" not in json.loads(recipe.to_json())
    assert recipe.scorer == {"name": "fitprune"}
    assert recipe == PruningRecipe.from_json(recipe.to_json()) == recipe_of(model, scorer={"name": "fitprune"})
    assert recipe != recipe_of(model, scorer={"name": "self"})
    assert kept(model, recipe, padded) == kept(model, recipe, padded, "fitprune")


def test_prune_obeys_the_recipes_scorer_unless_told_another(model, padded):
    plain, own = recipe_of(model), recipe_of(model, scorer=spec("heads", diversity=0.5))

    def logits(*arguments):
        with prune(model, *arguments), torch.no_grad():
            return model(**padded).logits

    assert torch.equal(logits(own), logits(plain, own.scorer))
    assert torch.equal(logits(own, "self"), logits(plain, "self"))
    assert torch.equal(logits(own, Scorer(lambda view: -view.column)), logits(plain, lambda view: -view.column))
    assert not torch.equal(logits(own), logits(plain))


def test_an_entry_in_the_registry_gives_a_scorer_of_ones_own_a_name(model, padded, registry, tmp_path):
    register_scorer("late", lambda *, power: Scorer(lambda view: view.place.float() ** power))
    recipe_of(model, scorer={"name": "late", "parameters": {"power": 2}}).save(tmp_path / "r.json")
    assert kept(model, tmp_path / "r.json", padded) == kept(model, recipe_of(model), padded, "place")
    with pytest.raises(ValueError, match="scorer 'late': missing parameter 'power'"):
        get_scorer("late")


def test_a_recipe_can_be_the_key_of_a_dict(model):
    assert {recipe_of(model): 1}[recipe_of(model)] == 1


# --- what is refused


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("fitprun", "scorer='fitprun': must be one of accumulated, .*, value; install the package .* register_scorer"),
        ({"name": "randm"}, "scorer='randm': must be one of accumulated, by-stage"),
        ({"parameters": {}}, "scorer=.*: must be an object with a 'name'"),
        ({"name": "random"}, "scorer 'random': missing parameter 'seed'"),
        *[
            ({"name": "random", "parameters": {"seed": wrong}}, "scorer 'random': seed=.*: must be at least 0, a whole")
            for wrong in (-1, 1.0, "1", True, None, [0])
        ],
        ({"name": "last", "parameters": {"k": 2}}, "scorer 'last': .*'k'"),
        ({"name": "heads", "parameters": {"terms": TERMS, "k": 2}}, "scorer 'heads': .*'k'"),
        ({"name": "heads"}, "scorer 'heads': .*missing.*'terms'"),
        ({"name": "debiased", "parameters": {"diversity": 1}}, "scorer 'debiased': .*missing.*'profile'"),
        ({"name": "by-stage"}, "scorer 'by-stage': .*missing.*'stages'"),
        (
            {"name": "heads", "parameters": {"terms": []}},
            "scorer 'heads': terms is empty: at least one head must count",
        ),
        *[
            (
                {"name": "heads", "parameters": {"terms": [["mean", 0, 1.0], term]}},
                r"scorer 'heads': terms=\[.*\]: must be a kind of \['mean', 'max', 'last', 'self'\], a head's number",
            )
            for term in (
                ["mean", 0],
                ["men", 0, 1.0],
                ["mean", 0.0, 1.0],
                ["mean", True, 1.0],
                ["mean", 0, float("nan")],
            )
        ],
        ({"name": "debiased", "parameters": {"profile": []}}, "scorer 'debiased': profile.* must hold .* at least one"),
        (
            {"name": "debiased", "parameters": {"profile": [1, -1]}},
            "scorer 'debiased': profile.* must hold .* 0 or more",
        ),
        ({"name": "by-stage", "parameters": {"stages": {}}}, r"scorer 'by-stage': stages=\{\}: must name a scorer"),
        (
            {"name": "by-stage", "parameters": {"stages": ["last"]}},
            r"stages=\['last'\]: must name a scorer .* 'before 3'",
        ),
        (
            {"name": "by-stage", "parameters": {"stages": {"3": "lst"}}},
            "scorer 'by-stage': scorer='lst': must be one of",
        ),
        *[
            ({"name": "last", "parameters": {"diversity": wrong}}, "scorer 'last': diversity=.* a number of at least 0")
            for wrong in (-0.5, float("nan"), float("inf"), "1", True, None)
        ],
    ],
)
def test_a_wrong_scorer_is_refused_with_the_rule(scorer, message, model):
    with pytest.raises(ValueError, match=message):
        get_scorer(scorer)
    with pytest.raises(ValueError, match=message), prune(model, recipe_of(model), scorer):
        pass
    if isinstance(scorer, dict) and "name" in scorer:
        with pytest.raises(ValueError, match=f"{message}|scorer is no JSON"):  # no recipe can hold NaN
            prune(model, recipe_of(model, scorer=scorer))


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (5, "scorer=5: must be"),
        ({"name": ["last"]}, r"scorer=\{'name': \['last'\]\}: must be an object with a 'name'"),
        ({"name": "last", "parameters": [1]}, "scorer=.*: must be .* 'parameters'"),
        ({"name": "last", "parameter": {}}, "scorer=.*: must be .* 'parameters'"),
        *[
            (
                {"name": "fitprune", "parameters": {field: False}},
                f"scorer 'fitprune': no parameter '{field}'.*'diversity'",
            )
            for field in ("query_aware", "accumulates", "reads_vision", "spec", "score")
        ],
        ({"name": "heads", "parameters": {"terms": 5}}, "terms=5: must"),
        (of_terms(5), "terms=.*5.*: must be a kind"),
        (of_terms({"kind": "mean", "head": 0, "weight": 1.0}), "terms=.*: must be a kind"),
        (of_terms(["mean", 0, "x"]), "terms=.*'x'.*: must be a kind"),
        (of_terms(["mean", 0, 10**400]), "terms=.*: must be a kind"),
        *[
            (of_profile(profile), "profile=.*: must hold a mean attention, 0 or more")
            for profile in (0.5, ["x"], {"a": 1.0}, [[1.0]], [1.0, float("nan")], [float("inf")], [10**400], [0.0, 0.0])
        ],
        (of_stage(5), "scorer 'by-stage': scorer=5: must be"),
        (of_stage({"name": ["last"]}), r"scorer 'by-stage': scorer=.*\['last'\].*: must be an object with a 'name'"),
        (of_stage(spec("by-stage")), "scorer 'by-stage': a stage names 'by-stage' again"),
        (of_stage({"name": "last", "parameters": [1]}), "scorer 'by-stage': scorer=.*: must be .* 'parameters'"),
        (of_stage({"name": "last", "parameter": {}}), "scorer 'by-stage': scorer=.*: must be .* 'parameters'"),
        ({"name": "last", "parameters": {"diversity": 10**400}}, "diversity=.* a number of at least 0"),
    ],
)
def test_a_scorer_of_a_wrong_form_is_refused_with_the_rule(scorer, message):
    with pytest.raises(ValueError, match=message):
        get_scorer(scorer)


@pytest.mark.parametrize(
    "scorer",
    [
        {"name": "x" * 10**6},
        {"name": "last", "x" * 10**6: 1},
        {"name": "last", "parameters": {str(n): n for n in range(1000)}},
        {"name": "last", "parameters": {"diversity": list(range(1000))}},
        {"name": "last", "parameters": [[0] * 1000] * 1000},
        of_terms(["mean", 0, "x" * 10**6]),
        of_terms(*[[[0] * 1000] * 1000]),
        {"name": "heads", "parameters": {"terms": {str(n): n for n in range(1000)}}},
        of_profile([-1] * 10**6),
        of_stage({"name": "y" * 10**6}),
        {"name": "by-stage", "parameters": {"stages": [{}] * 1000}},
        {"name": "random", "parameters": {"seed": [0] * 1000}},
    ],
)
def test_a_scorer_of_any_size_is_refused_in_one_short_line(scorer):
    with pytest.raises(ValueError, match="scorer") as caught:
        get_scorer(scorer)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_a_profile_may_hold_integers(model, padded):
    assert kept(model, recipe_of(model), padded, of_profile([1, 1])) == kept(
        model, recipe_of(model), padded, "cross-mean"
    )


def test_a_weight_may_be_a_large_integer(model, padded):
    found = kept(model, recipe_of(model), padded, of_terms(["mean", 0, 10**20]))
    assert found == kept(model, recipe_of(model), padded, of_terms(["mean", 0, 1.0]))


@pytest.mark.parametrize("diversity", [0, 0.5])
def test_scores_that_are_no_numbers_are_refused(diversity, padded):
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.q_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the scorer returned NaN for a visual token"):
        kept(model, recipe_of(model, (1.0, 1.0, 0.5, 0.5, 0.5), ()), padded, spec("cross-mean", diversity=diversity))


@pytest.mark.parametrize("head", [4, -1])
def test_a_head_beyond_the_model_is_refused(head, model, padded):
    with pytest.raises(ValueError, match=f"terms name head {head}: the model has heads 0 to 3"):
        kept(model, recipe_of(model), padded, {"name": "heads", "parameters": {"terms": [["mean", head, 1.0]]}})


def test_a_stage_without_a_scorer_is_refused(model, padded):
    for place in STAGES:
        stages = {"stages": {other: one for other, one in STAGES.items() if other != place}}
        with pytest.raises(
            ValueError, match=f"tokens leave at '{place}', for which the recipe names no scorer: fit it"
        ):
            kept(model, recipe_of(model, scorer={"name": "by-stage", "parameters": stages}), padded)


@pytest.mark.parametrize(
    "scorer",
    [None, 5, "last", [], ["last"], {}, {"name": 5}, {"name": None}, {"parameters": {}}, {"name": "last", "k": 1},
     {"name": "last", "parameters": None}, {"name": "last", "parameters": [1]}],
)  # fmt: skip
def test_a_recipe_file_with_a_scorer_of_another_form_is_refused(scorer, model, tmp_path):
    data = json.loads(recipe_of(model).to_json()) | {"scorer": scorer}
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r\.json: scorer=.*: must be an object with a 'name' and perhaps 'param"):
        PruningRecipe.load(tmp_path / "r.json")
    with pytest.raises(ValueError, match="must be an object with a 'name' and perhaps 'parameters'"):
        dataclasses.replace(recipe_of(model), scorer=scorer)
