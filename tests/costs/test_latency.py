"""Latency profiles and budgets in seconds: arithmetic and refusals; the commands that measure and use them."""

import json

import pytest
import torch

from fitprune import AttentionStats, PruningRecipe, fit
from fitprune.cli import main as cli
from fitprune.costs.latency import LatencyProfile, interpolated, token_grid
from fitprune.families.adapter import adapt
from helpers.models import tiny_model


def made_up(model, **changes):
    """Attention takes 1 ms a token and MLPs 2, with a floor below 10 tokens; a removal 5 ms; 100 ms lie outside."""
    counts = (10, 20, 40, 400)
    given = {
        "model": model,
        "tokens": counts,
        "mixer_seconds": tuple(n / 1000 for n in counts),
        "mlp_seconds": tuple(2 * n / 1000 for n in counts),
        "removal_seconds": (0.005,) * 4,
        "outside_seconds": 0.1,
        "visual_tokens": 100,
        "text_tokens": 20,
    }
    return LatencyProfile(**{**given, **changes})


@pytest.fixture
def stats():
    torch.manual_seed(0)
    model = adapt(tiny_model("llava")).fingerprint
    attention = torch.rand(2, 5, 300).pow(3)
    return AttentionStats(attention[0], attention[1], (100,) * 3, (20,) * 3, ("a", "b", "c"), model)


def test_a_prefill_is_the_sum_of_its_parts(stats):
    profile = made_up(stats.model)
    assert profile.dense_seconds(100) == pytest.approx(0.1 + 5 * 0.36)
    # 100 tokens enter two layers, of which the second removes 70; and the text is in each.
    kept = [100, 30, 30, 30, 30]
    expected = 0.1 + 0.36 + (0.12 + 0.1 + 0.005) + 3 * 0.15
    assert profile.prefill_seconds(100, kept) == pytest.approx(expected)
    assert profile.prefill_seconds(100, kept, scoring=False) == pytest.approx(expected - 0.005)
    assert profile.prefill_seconds(0, [0] * 5, text_tokens=2) == pytest.approx(0.1 + 5 * 0.03)  # the floor
    with pytest.raises(ValueError, match="a prompt of 520 tokens: the profile was measured up to 400"):
        profile.prefill_seconds(500, [500] * 5)


@pytest.mark.parametrize("at_most", [None, 1, 2])
@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_a_latency_budget_is_met_with_scoring_counted(stats, reduction, at_most):
    profile = made_up(stats.model)
    recipe = fit(stats, prefill_latency_reduction=reduction, profile=profile, max_removal_layers=at_most)
    assert len(recipe.removing) <= (at_most or 5)
    reached = 1 - profile.prefill_seconds(100, recipe.kept(100)) / profile.dense_seconds(100)
    assert reached >= reduction - 1e-12
    assert reached < reduction + 0.02  # a token less in all layers, or a removal that rounding has ended
    assert recipe.provenance["reached"] == pytest.approx(reached)
    assert recipe.provenance["profile"]["text_tokens"] == 20


def test_latency_budgets_that_make_no_sense_are_refused(stats):
    profile = made_up(stats.model)
    with pytest.raises(ValueError, match="needs a profile: make it with 'fitprune profile'"):
        fit(stats, prefill_latency_reduction=0.4)
    with pytest.raises(ValueError, match="needs no profile"):
        fit(stats, flops_reduction=0.4, profile=profile)
    with pytest.raises(ValueError, match=r"cannot be met even with all visual tokens removed.*ask for at most 0.73"):
        fit(stats, prefill_latency_reduction=0.9, profile=profile)
    other = adapt(tiny_model("llava_next")).fingerprint
    with pytest.raises(ValueError, match=r"latency profile.*of another model"):
        fit(stats, prefill_latency_reduction=0.4, profile=made_up(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (10, 20, 20, 40)}, "must be ascending"),
        ({"tokens": ()}, "at least one"),
        ({"mlp_seconds": (1.0, 2.0)}, "mlp_seconds has 2 entries"),
        ({"mixer_seconds": (1.0, 2.0, 0.0, 1.0)}, "mixer_seconds holds 0.0"),
        ({"outside_seconds": float("nan")}, "outside_seconds holds nan"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_a_damaged_profile_is_refused(stats, changes, message):
    with pytest.raises(ValueError, match=message):
        made_up(stats.model, **changes)


def test_a_profile_comes_back_from_its_file(stats, tmp_path):
    profile = made_up(stats.model, device="here", provenance={"torch": "2"})
    profile.save(tmp_path / "p.json")
    assert LatencyProfile.load(tmp_path / "p.json") == profile
    (tmp_path / "p.json").write_text((tmp_path / "p.json").read_text()[:200])
    with pytest.raises(ValueError, match="not readable as a latency profile"):
        LatencyProfile.load(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError, match="make it with 'fitprune profile'"):
        LatencyProfile.load(tmp_path / "none.json")


def test_between_points_values_lie_on_a_line_and_beyond_them_stay():
    points, values = [10, 20, 40], [1.0, 3.0, 2.0]
    assert [interpolated(points, values, at) for at in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 2, 3, 2.5, 2, 2]
    assert interpolated([7], [5.0], 3) == interpolated([7], [5.0], 8) == 5


def test_the_grid_ends_at_the_prompt():
    assert token_grid(640)[-4:] == [481, 512, 513, 640]
    assert token_grid(5) == [5]


def test_the_commands_on_the_embedded_model(tmp_path, capsys):
    profile = str(tmp_path / "profile.json")
    shared = ["digit-scenes", "--image-size", "96", "--text-tokens", "12"]
    assert cli.main(["profile", *shared, "-o", profile, "--rounds", "1"]) == 0
    more = ["--flops-reduction", "0.6", "--rounds", "1", "--new-tokens", "2", "--profile", profile]
    capsys.readouterr()
    assert cli.main(["time", *shared, *more, "-o", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    document = json.loads(lines[-1])
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in document["timings"]] == ["dense", "60%"]
    assert 12 <= document["timings"][0]["text_tokens"] <= 20  # as many as asked for, and the rest of a word
    stats = str(tmp_path / "stats.safetensors")
    assert (
        cli.main(["measure", "digit-scenes", "--data", "digit-scenes/calibration", "--samples", "2", "-o", stats]) == 0
    )
    recipe = str(tmp_path / "recipe.json")
    made_up(AttentionStats.load(stats).model, visual_tokens=144).save(profile)  # in which removal is worth it
    latency = ["fit", stats, "--prefill-latency-reduction", "0.1", "--profile", profile, "-o", recipe]
    assert cli.main(latency) == 0
    assert PruningRecipe.load(recipe).provenance["budget"] == {"prefill_latency_reduction": 0.1}
