"""Recipes: the published ones to the digit, the cost model, JSON, and every way to be wrong."""

import dataclasses
import importlib.resources
import json
import math

import pytest

from fitprune import PruningRecipe
from fitprune.flops import DecoderShape, ModelShape, VisionShape, prefill_flops, visual_macs
from fitprune.tokens import keep_fractions, kept_counts

PUBLISHED = json.loads(importlib.resources.files("fitprune").joinpath("data/published_recipes.json").read_text())[
    "models"
]
CASES = [(name, int(p)) for name, entry in PUBLISHED.items() for p in entry["removals"]]
SHAPE = ModelShape("llava", DecoderShape(4, 32, 48, 4, 2, 8, 97), VisionShape(2, 16, 24, 32, 8))


def recipe(keep=(1.0, 0.5, 0.5, 0.25), **more):
    return PruningRecipe(keep, SHAPE, 16, **more)


@pytest.mark.parametrize(("name", "percent"), CASES)
def test_published_counts_and_reductions_come_back(name, percent):
    entry = PUBLISHED[name]
    published = PruningRecipe.published(name.split(" (")[0], percent)
    counts = published.counts(entry["visual_tokens"])
    assert counts == entry["removals"][str(percent)]
    reduction = published.cost().flops_reduction
    assert reduction == pytest.approx(entry["visual_flops_reduction"][str(percent)], abs=1e-4)


def test_the_paper_formula_by_hand():
    shape = DecoderShape(layers=1, hidden=3, intermediate=5, heads=1, kv_heads=1, head_dim=3)
    n, k, d, m = 7, 2, 3, 5
    expected = 3 * n * d * d + 2 * n * n * d + (n - k) * d * d + 3 * (n - k) * d * m
    assert visual_macs(shape, n, [k]) == expected


def test_prefill_flops_by_parts():
    parts = prefill_flops(SHAPE, 16, [0, 8, 0, 4], text_before=2, text_after=5, logits=1)
    assert parts.head == 2 * 32 * 97
    width = 4 * 32  # heads of 8 columns, with 3 of their log-sum-exp behind them, and up to 32
    assert parts.scoring == 2 * width * (16 + 5) * 16 + 2 * width * (8 + 5) * 8  # rows after the text, visual keys
    assert parts.total == parts.vision + parts.decoder + parts.scoring + parts.head


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
        ({"model": SHAPE.to_dict() | {"vision": []}}, "not a model shape"),
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
        ({"model": {"model_type": "llava"}}, "not a model shape"),
        ({"model": {"model_type": "llava", "decoder": {}, "colour": 1}}, "not a model shape"),
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


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="stands twice"):
        PruningRecipe.from_json(recipe().to_json().replace('"schema": 1', '"schema": 1, "schema": 1'))


def test_a_byte_order_mark_is_no_harm(tmp_path):
    (tmp_path / "r.json").write_text(recipe().to_json(), encoding="utf-8-sig")
    assert PruningRecipe.load(tmp_path / "r.json") == recipe()


def test_a_missing_key_is_named(tmp_path):
    data = json.loads(recipe().to_json())
    del data["keep"]
    with pytest.raises(ValueError, match="'keep' is missing"):
        PruningRecipe.from_json(json.dumps(data))


@pytest.mark.parametrize(("name", "percent"), [("llava-1.5-7b", 61), ("qwen", 60), ("llava-1.5-7b", "60%")])
def test_an_unpublished_recipe_names_those_there_are(name, percent):
    with pytest.raises(ValueError, match="must be one of"):
        PruningRecipe.published(name, percent)


def test_cost_refuses_impossible_counts():
    with pytest.raises(ValueError, match="visual_tokens=0"):
        recipe().cost(visual_tokens=0)
    with pytest.raises(ValueError, match="text_before=9"):
        recipe().cost(text_before=9, text_tokens=5)
    with pytest.raises(ValueError, match="visual_tokens=-1"):
        recipe().counts(-1)
