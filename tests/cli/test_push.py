"""`fitprune push`, against a hub on this machine."""

import pytest

from fitprune import PruningRecipe
from fitprune.cli.main import main


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def test_a_recipe_and_its_card_are_pushed(made, hub, capsys):
    path = str(made / "recipes" / "flops_reduction-0.5.json")
    assert main(["push", path, "lab/scenes-50", "--private"]) == 0
    assert "lab/scenes-50" in capsys.readouterr().out
    assert hub.text("lab/scenes-50", "fitprune_recipe.json") == PruningRecipe.load(path).to_json()
    assert "lab/scenes-50" in hub.text("lab/scenes-50", "README.md")
    assert PruningRecipe.named("lab/scenes-50") == PruningRecipe.load(path)


def test_a_branch_a_message_and_a_base_model(made, hub, capsys):
    path = str(made / "recipes" / "flops_reduction-0.5.json")
    more = ["--revision", "half", "--message", "Half of the work", "--base-model", "lab/digits"]
    assert main(["push", path, "lab/scenes", *more]) == 0
    assert "base_model: lab/digits" in hub.text("lab/scenes", "README.md", "half")
    capsys.readouterr()


def test_what_is_no_recipe_is_not_pushed(hub, tmp_path, capsys):
    assert main(["push", f"{tmp_path}/none.json", "lab/none"]) == 1
    assert main(["push", "llava-1.5-7b", "lab/none"]) == 2
    assert "lab/none" not in hub.repositories
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lab/x/y"], "'lab/x/y': must be a hub name, owner/name, or your own repository's name"),
        (["a b"], "'a b': must be a hub name"),
        (["lab/x@v1"], "'lab/x@v1': must be a hub name"),
        (["lab/x", "--revision", ""], "revision='': must be the name of a branch"),
    ],
)
def test_names_that_no_repository_or_branch_has(hub, capsys, arguments, message):
    assert main(["push", "llava-1.5-7b:60", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not hub.requests


def test_the_arguments_go_on_as_push_to_hub_takes_them(made, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        PruningRecipe, "push_to_hub", lambda self, repo, **options: calls.append((repo, options)) or "address"
    )
    path = str(made / "recipes" / "flops_reduction-0.5.json")
    assert main(["push", path, "me/x"]) == 0
    assert main(["push", path, "me/x", "--public", "--create-pr"]) == 0
    plain = dict.fromkeys(["base_model", "private", "commit_message", "revision"])
    assert calls == [
        ("me/x", {**plain, "create_pr": False}),
        ("me/x", {**plain, "private": False, "create_pr": True}),
    ]
    assert capsys.readouterr().out == "address\naddress\n"
