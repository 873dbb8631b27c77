"""Recipes: counts, cost, JSON, and every way to be wrong."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import re

import pytest
import torch

import fitprune
from fitprune import AttentionStats, LatencyProfile, PruningRecipe
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.recipes.rounding import keep_fractions, kept_counts

SHAPE = ModelFingerprint("llava", DecoderSizes(4, 32, 48, 4, 2, 8, 97), VisionSizes(2, 16, 24, 32, 8))


def recipe(keep=(1.0, 0.5, 0.5, 0.25), **more):
    return PruningRecipe(keep, SHAPE, 16, **more)


def test_cost_names_every_figure():
    cost = recipe().cost(visual_tokens=16, text_tokens=7, value_bytes=4)
    assert cost.kept == (16, 8, 8, 4)
    assert cost.mean_visual_tokens == (16 + 16 + 8 + 8) / 4
    assert cost.kv_cache_reduction == pytest.approx(1 - 48 / 64)
    assert cost.kv_bytes == 2 * (48 + 4 * 7) * 16 * 4
    assert cost.dense_kv_bytes == 2 * (64 + 4 * 7) * 16 * 4


@pytest.mark.parametrize("n", [1, 2, 15, 16, 576, 2880, 2881])
def test_counts_are_consistent_for_any_image_size(n):
    keep = (1.0, 0.73, 0.73, 0.01)
    made = recipe(keep=keep)
    kept, removed = made.kept(n), made.counts(n)
    assert kept == sorted(kept, reverse=True)
    assert n - sum(removed) == kept[-1]
    assert min(removed) >= 0
    assert kept_counts(keep_fractions(removed, n), n) == kept


def test_json_and_file_round_trip(tmp_path):
    made = recipe(provenance={"budget": {"flops_reduction": 0.5}})
    made.save(tmp_path / "deep" / "r.json")
    loaded = PruningRecipe.load(tmp_path / "deep" / "r.json")
    assert loaded == made
    assert loaded.provenance == made.provenance
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"provenance": {"a": [{"b": math.nan}]}}, "provenance is no JSON .*finite"),
        ({"provenance": {"a": -math.inf}}, "provenance is no JSON"),
        ({"scorer": {"name": "random", "parameters": {"seed": math.inf}}}, "scorer is no JSON"),
        *[
            ({"provenance": {"method": name}}, "names no scorer")
            for name in ("divprune", "DivPrune", "FastV:k=2", "Random_Input")
        ],
        ({"keep": [1, 0.5, 0.5]}, "3 entries: must be one for each of the model's 4 layers"),
        ({"keep": [1, 0.5, 0.6, 0.1]}, r"keep\[2\]=0.6: must not exceed"),
        ({"keep": [1, 0.5, math.nan, 0.1]}, r"keep\[2\]=nan: must be a finite number"),
        ({"keep": [1, 0.5, "0.5", 0.1]}, r"keep\[2\]='0.5': must be a finite number"),
        ({"keep": [1.5, 0.5, 0.5, 0.1]}, r"keep\[0\]=1.5: must be between 0 and 1"),
        ({"keep": [1, 0.5, 0.5, -0.1]}, r"keep\[3\]=-0.1: must be between 0 and 1"),
        ({"keep": 3}, "must be a list"),
        ({"schema": 2}, "reads schema 1"),
        ({"visual_tokens": 0}, "visual_tokens=0"),
        ({"visual_tokens": True}, "visual_tokens=True"),
        ({"visual_tokens": 10**400}, "must be an integer from 1"),
        ({"model": SHAPE.to_dict() | {"vision": []}}, "not a model's sizes"),
        (
            {"model": SHAPE.to_dict() | {"vision": SHAPE.to_dict()["vision"] | {"image_size": 1}}},
            "at least patch_size=8",
        ),
        ({"schema": True}, "reads schema 1"),
        ({"keep": [10**400, 1, 1, 1]}, "must be between 0 and 1"),
        ({"model": {"model_type": 5, "decoder": {}}}, "model_type=5"),
        *[
            (
                {"model": {"model_type": "llava", "decoder": dataclasses.asdict(SHAPE.decoder) | wrong}},
                "must be an integer",
            )
            for wrong in ({"hidden": "x"}, {"kv_heads": 0}, {"layers": 4.0}, {"layers": None}, {"vocab": -1})
        ],
        ({"model": {"model_type": "llava"}}, "not a model's sizes"),
        ({"model": {"model_type": "llava", "decoder": {}, "colour": 1}}, "not a model's sizes"),
    ],
)
def test_a_wrong_recipe_file_is_refused(tmp_path, change, message):
    data = json.loads(recipe().to_json()) | change
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        PruningRecipe.load(tmp_path / "r.json")
    assert "r.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01", "null", "[" * 100_000])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json"):
        PruningRecipe.load(tmp_path / "r.json")


def test_a_key_that_is_listed_twice_is_refused():
    with pytest.raises(ValueError, match="is listed twice"):
        PruningRecipe.from_json(recipe().to_json().replace('"schema": 1', '"schema": 1, "schema": 1'))


def test_a_byte_order_mark_is_no_harm(tmp_path):
    (tmp_path / "r.json").write_text(recipe().to_json(), encoding="utf-8-sig")
    assert PruningRecipe.load(tmp_path / "r.json") == recipe()


def test_a_missing_key_is_named(tmp_path):
    data = json.loads(recipe().to_json())
    del data["keep"]
    with pytest.raises(ValueError, match="'keep' is missing"):
        PruningRecipe.from_json(json.dumps(data))


def test_cost_refuses_impossible_counts():
    with pytest.raises(ValueError, match="visual_tokens=0"):
        recipe().cost(visual_tokens=0)
    with pytest.raises(ValueError, match="text_before=9"):
        recipe().cost(text_before=9, text_tokens=5)
    with pytest.raises(ValueError, match="visual_tokens=-1"):
        recipe().counts(-1)


def test_the_floor_holds_where_tokens_leave_between_layers_too():
    made = recipe(keep=(0.5, 0.01, 0.01, 0.0), enter=(0.9, 0.02, 0.01, 0.0))
    for n in (1, 2, 16):
        assert sum(made.counts(n)) + sum(made.counts_before(n)) == n
        assert min(made.counts(n) + made.counts_before(n)) >= 0
        assert made.kept(n)[2:] == [1, 0]


def stats_of(provenance=None, **change):
    attention = torch.rand(4, 32)
    parts = {"self_attention": attention, "cross_attention": attention + 1, "visual_tokens": (16, 16)}
    return AttentionStats(
        **(parts | change), text_tokens=(4, 4), digests=("a", "b"), model=SHAPE, provenance=provenance or {}
    )


PROFILE = LatencyProfile(SHAPE, (16, 64), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), 1.0, 16, 8, device="a <CPU>")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (stats_of({"model": "digit-scenes"}), "AttentionStats(digit-scenes: 2 samples, 16 visual tokens, 4 layers)"),
        (stats_of(visual_tokens=(4, 28)), "AttentionStats(llava: 2 samples, 4..28 visual tokens, 4 layers)"),
        (stats_of().select([0]), "AttentionStats(llava: 1 sample, 16 visual tokens, 4 layers)"),
        (stats_of().select([]), "AttentionStats(llava: 0 samples, 0 visual tokens, 4 layers)"),
        (
            recipe(scorer={"name": "<b>"}),
            "PruningRecipe(llava, visual FLOPs -38.6%, 16 -> 4 visual tokens, 4 layers, scorer <b>)",
        ),
        (
            PROFILE,
            "LatencyProfile(llava on a <CPU>, batches of 1, 16 visual and 8 text tokens, measured up to 64)",
        ),
    ],
)
def test_a_notebook_shows_one_short_line(value, shown):
    assert repr(value) == shown
    again = pickle.loads(pickle.dumps(value))
    assert repr(again) == repr(copy.deepcopy(value)) == repr(dataclasses.replace(value)) == shown
    if not isinstance(value, AttentionStats):  # which have no equality: tensors
        assert again == value


@pytest.mark.parametrize("value", [stats_of({"model": "<script>alert(1)"}), recipe(scorer={"name": "<script>x"})])
def test_a_notebook_draws_a_bar_for_each_layer_and_runs_nothing(value):
    page = value._repr_html_()
    assert page.count("<tr>") == 1 + 4
    assert page.count("<div") == 4 * (2 if isinstance(value, AttentionStats) else 1)
    assert "<script" not in page
    assert "&lt;script" in page


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitprune.fit("stats.safetensors", flops_reduction=0.5), "stats is a str: must be AttentionStats"),
        (lambda: fitprune.fit([stats_of()], flops_reduction=0.5), "stats is a list"),
        (lambda: fitprune.fit(stats_of(), flops_reduction="0.5"), "flops_reduction='0.5': must be a finite number"),
        (lambda: fitprune.fit(stats_of(), flops_reduction=10**400), "must be a finite number"),
        (lambda: fitprune.fit(stats_of(), flops_reduction=0.5, visual_tokens=1.5), "visual_tokens=1.5: must be an int"),
        (
            lambda: fitprune.fit(stats_of(), prefill_latency_reduction=0.1, profile="p"),
            "profile is a str: must be",
        ),
        (lambda: fitprune.search(None, [], "s", flops_reduction=0.5), "stats is a str: must be AttentionStats"),
        (lambda: fitprune.analyze([stats_of()]), "stats is a list: must be AttentionStats, or several by name"),
        (lambda: fitprune.analyze({"a": "b"}), "stats is a dict: must be AttentionStats, or several by name"),
        (lambda: AttentionStats.concat([stats_of(), "b"]), "parts holds a str: must be AttentionStats"),
        (lambda: AttentionStats.concat(stats_of()), "parts is AttentionStats: must be a list of them"),
        (lambda: fitprune.profile_latency(None, "inputs"), "inputs is a str: must be a processor's output"),
        (lambda: fitprune.time_recipes(None, [], {}), "inputs is a list: must be a processor's output"),
        (lambda: fitprune.time_recipes(None, {"input_ids": 1}, [recipe()]), "recipes is a list: must be a mapping"),
        (lambda: PruningRecipe((1.0,), "llava", 16), "model is a str: must be a ModelFingerprint"),
        (lambda: PruningRecipe(0.5, SHAPE, 16), "keep is a float: must be a list of numbers"),
        (lambda: recipe().kept("16"), "visual_tokens='16': must be an integer from 0"),
        (
            lambda: recipe().cost(text_tokens=10**12),
            "text_tokens=1000000000000: must be an integer from 0",
        ),
        (lambda: recipe().cost(value_bytes=0), "value_bytes=0: must be an integer from 1 to 16"),
        (lambda: recipe(provenance={"a": {1}}), "provenance is no JSON (Object of type set is not JSON"),
        (lambda: recipe(provenance="mine"), "provenance is a str: must be a mapping"),
        *[
            (lambda call=call, value=value: call(value), f"the path is a {type(value).__name__}: must be the name of a")
            for call in (
                PruningRecipe.load,
                PruningRecipe.named,
                PruningRecipe.from_pretrained,
                recipe().save,
                recipe().save_pretrained,
                stats_of().save,
            )
            for value in (None, 3, {})
        ],
        *[
            (
                lambda call=call, value=value: call(None, value),
                f"batches is a {type(value).__name__}: must be a list of",
            )
            for call in (fitprune.measure, functools.partial(fitprune.fit_sequential, flops_reduction=0.5))
            for value in (None, "digit-scenes/calibration", {"input_ids": 1}, fitprune.Sample("a", "q", "i"))
        ],
        *[
            (lambda name=name: fitprune.evaluate(None, None, [], [], **{name: -1}), f"{name}=-1: must be an integer")
            for name in ("batch_size", "max_new_tokens", "timed_batches", "examples")
        ],
        (
            lambda: fitprune.evaluate(None, None, [], [], max_new_tokens=0),
            "max_new_tokens=0: must be an integer from 1",
        ),
        (lambda: PruningRecipe.from_json(5), "text is a int: must be JSON text"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("batch", [fitprune.Sample("a", "q", "i"), {}, {"image": 1}, 3])
@pytest.mark.parametrize(
    "call", [fitprune.measure, functools.partial(fitprune.fit_sequential, flops_reduction=0.5)], ids=["measure", "fit"]
)
def test_what_is_no_batch_is_named_with_its_place(call, batch):
    model, _ = fitprune.load_model("digit-scenes")
    wanted = f"batches[0] is a {type(batch).__name__} without 'input_ids': must be a list of batches, as make_batches"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        call(model, [batch])


@pytest.mark.parametrize("load", [PruningRecipe.load, AttentionStats.load, LatencyProfile.load])
def test_a_file_that_is_not_there_is_named_with_what_makes_it(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="none: no such file; make it with 'fitprune "):
        load(tmp_path / "none")
