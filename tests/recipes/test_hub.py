"""Recipes by name: folders, a hub, the one beside a model's weights, and loading the model itself from there."""

import json
import os
import shutil

import pytest
import torch

from fitprune import PruningRecipe, load_model, prune
from fitprune._support import assets
from fitprune.cli.main import main
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.recipes.rounding import keep_fractions
from helpers.models import tiny_inputs, tiny_model

FILE = "fitprune_recipe.json"


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def recipe_for(model, name="lab/tiny"):
    provenance = {
        "source": "fitprune.fit",
        "budget": {"flops_reduction": 0.6},
        "tolerance": 0.1234,
        "samples": 64,
        "measured": {"model": name, "dtype": "bfloat16", "weights": "abc"},
    }
    return PruningRecipe(keep_fractions([4, 0, 4, 0, 0], 16), adapt(model).fingerprint, 16, provenance)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def recipe(model):
    return recipe_for(model)


def metadata(text):
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_holds_recipe_and_card(recipe, tmp_path):
    assert recipe.save_pretrained(tmp_path / "tiny-60") is None
    assert sorted(os.listdir(tmp_path / "tiny-60")) == ["README.md", FILE]
    for found in (PruningRecipe.from_pretrained(tmp_path / "tiny-60"), PruningRecipe.named(str(tmp_path / "tiny-60"))):
        assert found == recipe
        assert found.provenance == recipe.provenance
    card = (tmp_path / "tiny-60" / "README.md").read_text()
    assert metadata(card) == {
        "base_model": "lab/tiny",
        "library_name": "fitprune",
        "pipeline_tag": "image-text-to-text",
        "tags": ["fitprune", "visual-token-pruning", "llava"],
    }
    cost = recipe.cost()
    for said in [
        "| budget | flops_reduction 0.6 |",
        "layer may lose | 0.1234 |",
        f"| {100 * cost.flops_reduction:.2f}% |",
        f"| {100 * cost.kv_cache_reduction:.2f}% |",
        "| 4 0 4 0 0 |",
        "| calibration samples | 64 |",
        "| its dtype | bfloat16 |",
        "arXiv:2409.10197",
        "load_model('lab/tiny')",
        "prune(model, 'tiny-60')",
    ]:
        assert said in card, said


def test_a_card_says_what_else_a_recipe_knows(model, tmp_path):
    more = {
        "samples": {"search": 32, "validation": 32},
        "divergence": {"validation": {"found": 0.1, "paper": 0.25}},
        "evaluation": {"accuracy, digit | scenes": 0.93},
        "method": "fastv:k=1",
    }
    base = recipe_for(model, "folders/of/someone/tiny-model")
    enter = (1.0, 0.75, 0.5, 0.5, 0.5)
    scorer = {"name": "self", "parameters": {"x": 1}}
    made = PruningRecipe(base.keep, base.model, 16, {**base.provenance, **more}, enter, scorer)
    made.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in [
        "search 32, validation 32",
        "found 0.1000, paper 0.2500",
        "| evaluation: accuracy, digit \\| scenes | 0.93 |",
        "removed before each layer | 0 0 4 0 0 |",
        "Schedule by `fastv:k=1`",
        "| model | tiny-model |",
        "ranked by `self` with parameters",
    ]:
        assert said in card, said
    assert "someone" not in card
    assert "base_model" not in metadata(card)
    made.save_pretrained(tmp_path, base_model="lab/other")  # our own card is written again
    assert metadata((tmp_path / "README.md").read_text())["base_model"] == "lab/other"


@pytest.mark.parametrize("there", ["README.md", "config.json"])
def test_a_folder_that_is_not_the_recipes_keeps_its_card(recipe, tmp_path, there):
    (tmp_path / there).write_text("theirs")
    recipe.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([there, FILE])
    assert (tmp_path / there).read_text() == "theirs"


def test_names_that_are_no_recipe_say_what_was_looked_for(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_text("{")
    recipe.save_pretrained("good")
    for name, error, message in [
        ("empty", FileNotFoundError, f"folder empty has no {FILE}"),
        ("bad", ValueError, f"bad/{FILE}: recipe is not JSON"),
        ("none", FileNotFoundError, "none: no such file or folder, no published recipe .* and no hub name"),
        ("recipes/none.json", FileNotFoundError, "no such file or folder"),
        ("qwen:60", FileNotFoundError, "named like llava-1.5-7b:60"),
    ]:
        with pytest.raises(error, match=message):
            PruningRecipe.named(name)
    with pytest.raises(ValueError, match="revision='v1': good is a folder, which has none"):
        PruningRecipe.from_pretrained("good", revision="v1")
    with pytest.raises(FileNotFoundError, match="/x/y/z: no such folder, and no hub name"):
        PruningRecipe.from_pretrained("/x/y/z")
    for argument in ({"repo_id": "lab/x"}, {"private": False}, {"create_pr": True}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}: is for the hub; pass push_to_hub=True"):
            recipe.save_pretrained("good", **argument)


# -- the hub -------------------------------------------------------------------------------------------------------


def test_a_recipe_goes_to_the_hub_and_comes_back(hub, recipe, model):
    address = recipe.push_to_hub("lab/tiny-60", private=True, token="t")
    assert address.startswith(f"{hub.url}/lab/tiny-60/commit/")
    assert hub.repositories["lab/tiny-60"]["private"]
    assert "prune(model, 'lab/tiny-60')" in hub.text("lab/tiny-60", "README.md")
    found = PruningRecipe.from_pretrained("lab/tiny-60")
    assert found == recipe
    assert found.provenance == recipe.provenance
    assert PruningRecipe.named("lab/tiny-60") == recipe
    inputs = tiny_inputs(model)
    for given in ("lab/tiny-60", recipe):
        assert [p.shape[1] for p in kept_positions(model, given, inputs)][:2] == [25, 21]
    other = PruningRecipe.dense(recipe.model, 16)
    other.push_to_hub("lab/tiny-60", token="t")
    assert "0.0% of its visual FLOPs" in hub.text("lab/tiny-60", "README.md")
    assert PruningRecipe.from_pretrained("lab/tiny-60") == other
    commits = sum(request.startswith("POST /api/models/lab/tiny-60/commit") for request in hub.requests)
    assert commits == 2


def test_budgets_live_on_branches(hub, recipe, tmp_path):
    dense = PruningRecipe.dense(recipe.model, 16)
    dense.push_to_hub("lab/tiny")
    recipe.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="lab/tiny", revision="60")
    assert PruningRecipe.from_pretrained("lab/tiny") == dense
    assert PruningRecipe.from_pretrained("lab/tiny", revision="60") == recipe
    assert PruningRecipe.named("lab/tiny@60") == recipe
    assert "prune(model, 'lab/tiny@60')" in hub.text("lab/tiny", "README.md", "60")
    assert recipe.save_pretrained(tmp_path / "own", push_to_hub=True).startswith(f"{hub.url}/me/own/commit/")


def test_a_models_repository_keeps_its_card(hub, recipe):
    hub.create("lab/model")
    hub.put("lab/model", {"README.md": b"theirs", "config.json": b"{}"})
    assert recipe.push_to_hub("lab/model", create_pr=True) == f"{hub.url}/lab/model/discussions/1"
    with pytest.raises(FileNotFoundError, match=f"lab/model on the hub has no {FILE}$"):
        PruningRecipe.from_pretrained("lab/model")
    recipe.push_to_hub("lab/model")
    assert PruningRecipe.from_pretrained("lab/model") == recipe
    assert hub.text("lab/model", "README.md") == "theirs"


def test_what_the_hub_refuses_is_said(hub, recipe, tmp_path):
    hub.create("lab/empty")
    hub.create("lab/bad")
    hub.put("lab/bad", {FILE: b"[1]"})
    hub.create("lab/gated")
    hub.gated.add("lab/gated")
    for name, more, error, message in [
        ("lab/none", {}, FileNotFoundError, "lab/none: no such folder here and no such repository on the hub"),
        ("lab/empty", {}, FileNotFoundError, f"lab/empty on the hub has no {FILE}$"),
        ("lab/empty", {"revision": "v1"}, FileNotFoundError, "has no revision 'v1'"),
        ("lab/bad", {}, ValueError, f"{FILE} of lab/bad on the hub: recipe is a JSON list"),
        ("lab/gated", {}, PermissionError, "ask for access on its page"),
        ("lab/new", {"local_files_only": True}, ConnectionError, "local_files_only=True, and the cache has no"),
    ]:
        with pytest.raises(error, match=message):
            PruningRecipe.from_pretrained(name, cache_dir=tmp_path / "another", **more)
    hub.token = "right"
    with pytest.raises(PermissionError, match=r"the hub refuses: .*401.*hf auth login"):
        recipe.push_to_hub("lab/new", token="wrong")


def test_without_a_hub_the_cache_serves_and_the_rest_says_so(hub, recipe, monkeypatch, capsys):
    from huggingface_hub import constants

    recipe.push_to_hub("lab/tiny-60")
    PruningRecipe.from_pretrained("lab/tiny-60")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert PruningRecipe.from_pretrained("lab/tiny-60") == recipe
    with pytest.raises(ConnectionError, match=r"offline mode \(HF_HUB_OFFLINE\), and the cache has no .* unset it"):
        PruningRecipe.from_pretrained("lab/other")
    with pytest.raises(ConnectionError, match=r"cannot be written to: offline mode .* or save to a folder"):
        recipe.push_to_hub("lab/tiny-60")
    assert main(["cost", "lab/other"]) == 1
    assert "offline mode" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nobody = "http://127.0.0.1:9"
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)  # huggingface_hub would try again for 20 seconds
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    assert PruningRecipe.from_pretrained("lab/tiny-60") == recipe
    with pytest.raises(ConnectionError, match="cannot be asked: no connection to the hub"):
        PruningRecipe.from_pretrained("lab/other")
    assert not waits
    with pytest.raises(ConnectionError, match="cannot be written to: no connection to the hub"):
        recipe.push_to_hub("lab/tiny-60")


# -- beside the model ----------------------------------------------------------------------------------------------


def test_a_recipe_beside_the_weights_is_taken(recipe, tmp_path):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    recipe.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path).eval()
    inputs = tiny_inputs(loaded)
    expected = kept_positions(loaded, recipe, inputs)
    for given in (None, tmp_path, str(tmp_path / FILE)):
        found = kept_positions(loaded, given, inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with prune(loaded), torch.no_grad():
        pruned = loaded(**inputs).logits
    with prune(loaded, recipe), torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, pruned)


def test_without_a_recipe_beside_it_a_model_says_where_it_looked(hub, recipe, tmp_path, offline):
    nowhere = tiny_model()
    with pytest.raises(
        ValueError, match=r"no recipe is passed, and this model was loaded from no folder or hub name; pass a recipe"
    ):
        prune(nowhere).__enter__()
    nowhere.name_or_path = str(tmp_path)
    with pytest.raises(
        ValueError, match=rf"looked for {FILE} beside the model, but folder .* has no .*save_pretrained"
    ):
        prune(nowhere).__enter__()
    nowhere.name_or_path = "lab/model"
    with pytest.raises(ConnectionError, match=r"beside the model, but lab/model on the hub cannot be asked: offline"):
        prune(nowhere).__enter__()
    (tmp_path / FILE).write_text(PruningRecipe.published("llava-1.5-7b", 60).to_json())
    nowhere.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="recipe is of another model"):
        prune(nowhere).__enter__()
    assert not any(layer._forward_hooks for layer in nowhere.model.language_model.layers)


def test_force_takes_a_recipe_of_another_model_with_as_many_layers(recipe):
    other = tiny_model(kv_heads=4)
    inputs = tiny_inputs(other)
    with pytest.raises(ValueError, match="kv_heads 2 there, 4 here"):
        prune(other, recipe).__enter__()
    assert len(kept_positions(other, recipe, inputs, force=True)) == 5
    with prune(other, recipe, force=True), torch.no_grad():
        other(**inputs)
    with pytest.raises(ValueError, match="recipe has 5 layers, the model 4: force=True cannot help"):
        prune(tiny_model(layers=4), recipe, force=True).__enter__()


# -- models --------------------------------------------------------------------------------------------------------


def test_model_processor_and_recipe_come_from_one_commit(hub, monkeypatch):
    """`main` moves on after the model was loaded, and the recipe of its own commit is used."""
    hub.create("lab/digits")
    source = assets.folder("model")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    model, _ = load_model("digit-scenes")
    fingerprint = adapt(model).fingerprint
    first = PruningRecipe((1.0,) + (0.5,) * (fingerprint.decoder.layers - 1), fingerprint, 144)
    commit = hub.put("lab/digits", {**files, FILE: first.to_json().encode()})
    loaded, processor = load_model("lab/digits", revision="main", dtype="bfloat16", attn_implementation="eager")
    assert loaded.config._commit_hash == commit
    assert (loaded.name_or_path, loaded.dtype) == ("lab/digits", torch.bfloat16)
    assert loaded.config.text_config._attn_implementation == "eager"
    assert processor.image_token
    hub.put("lab/digits", {FILE: PruningRecipe.published("llava-1.5-7b", 60).to_json().encode()})
    with prune(loaded):
        pass
    del hub.repositories["lab/digits"]["commits"][commit][FILE]
    with prune(loaded):  # from the cache
        pass


def test_what_load_model_cannot_do_is_said(tmp_path):
    for arguments, message in [
        ({"device": "cpu", "device_map": "auto"}, "pass one"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto, float32"),
        ({"device": "foo"}, "device foo: unknown"),
        ({"quantization": "gguf"}, "quantization='gguf': must be one of bnb-4bit"),
        ({"revision": "v1"}, "revision='v1': digit-scenes is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model("digit-scenes", **arguments)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type='llama': not supported"):
        load_model(tmp_path)


def test_a_device_map_says_where_a_model_goes():
    model, _ = load_model("digit-scenes", device_map={"": "meta"})
    assert model.device.type == "meta"


def test_the_command_line_finds_the_recipe_beside_the_model(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(assets.folder("model"), folder)
    image = str(assets.folder("test") / "images" / "0000.jpg")
    command = ["generate", str(folder), "--image", image, "--question", "How many digits are there?"]
    assert main(command) == 2
    assert f"has no {FILE}" in capsys.readouterr().err
    fingerprint = adapt(load_model(folder)[0]).fingerprint
    other = PruningRecipe(
        (0.9,) * fingerprint.decoder.layers,
        type(fingerprint)("llava_next", fingerprint.decoder, fingerprint.vision),
        144,
    )
    other.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == sorted([*os.listdir(assets.folder("model")), FILE])
    assert main(command) == 2
    assert "model_type llava_next there, llava here" in capsys.readouterr().err
    assert main([*command, "--force", "--attn-implementation", "eager"]) == 0
    options = ["--data", "digit-scenes/test", "--samples", "4", "--recipe", str(folder), "-o", str(tmp_path / "r.json")]
    assert main(["evaluate", "digit-scenes", *options]) == 2
    assert "another model" in capsys.readouterr().err
    assert main(["evaluate", "digit-scenes", *options, "--force", "--timed-batches", "0"]) == 0
    assert [row["method"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["dense", "model"]
    with pytest.raises(SystemExit):
        main([*command, "--device", "cpu", "--device-map", "auto"])
