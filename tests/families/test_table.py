"""The door for families: a row from another package is checked, found by its name, and rules what it says."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from fitprune import PruningRecipe, kept_positions, load_model, measure, prune
from fitprune._support import assets
from fitprune.costs.sizes import VisionSizes
from fitprune.families import table
from fitprune.families.adapter import adapt
from fitprune.families.config import fingerprint_of
from fitprune.families.images import read_images
from fitprune.families.sizes import clip_tower, decoder_sizes
from fitprune.families.table import GENERIC, Family, find_family, register_family
from helpers.models import IMAGE, tiny_inputs, tiny_model


class OwnConfig(tf.LlavaConfig):
    model_type = "own_vlm"


@pytest.fixture
def inputs():
    return tiny_inputs(tiny_model(), images=2)


@pytest.fixture
def model():
    """A LLaVA under a name that fitprune does not know."""
    model = tiny_model()
    model.config.__class__ = OwnConfig
    return model


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": "tile"}, "family 'own': images='tile': must be one of .*'tiles'.*, or a function of visual tokens"),
        ({"images": ["tiles"]}, r"images=\['tiles'\]: must be one of"),
        ({"images": None}, "images=None: must be one of"),
        ({"video": "frames"}, r"video='frames': must be one of \('', 'features', 'runs', 'pooled', 'grid'\)"),
        ({"video": lambda *_: None}, "video=<function .*: must be one of"),
        ({"parts": {"attention": "attn"}}, "parts={'attention': 'attn'}: must be names by 'decoder' or 'mlp'"),
        ({"parts": {"mlp": 3}}, "must be names by"),
        ({"parts": {"mlp": "layers.0"}}, "must be names by"),
        ({"parts": "mlp"}, "parts='mlp': must be names by"),
        ({"token_ids": {"audio": "audio_id"}}, "must be names by 'image' or 'video'"),
        ({"token_ids": {"image": 7}}, r"token_ids=\{'image': 7\}: must be names by"),
        ({"sizes": {"hidden": 3}}, r"sizes=\{'hidden': 3\}: must be a function of the config"),
        ({"tower": None}, "tower=None: must be a function of the config"),
        ({"architecture": "depth"}, "architecture='depth': must be a tuple of names"),
        ({"bidirectional": 1}, "bidirectional=1: must be true or false"),
        ({"answer_type": -1}, "answer_type=-1: must be 0 or more"),
        ({"register": "own.register"}, "register='own.register': must be a function of no argument"),
        ({"refused": True}, "refused=True: must be a text"),
        ({"model_type": None}, "family None: model_type=None: must be a text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_when_it_is_made(row, message):
    with pytest.raises(ValueError, match=message) as caught:
        Family(**{"model_type": "own", "models": "Own", **row})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("own", "family is a str: must be a fitprune.families.table.Family"),
        (GENERIC, "family name '': must be letters"),
        (Family("own vlm", "Own"), "family name 'own vlm': must be letters"),
        (Family("llava", "mine"), "family 'llava': is one of fitprune's own"),
    ],
)
def test_what_cannot_be_registered(family, message):
    with pytest.raises(ValueError, match=message):
        register_family(family)


def test_a_name_is_taken_once():
    first, second = Family("own_vlm", "Own"), Family("own_vlm", "Another")
    register_family(first)
    with pytest.raises(ValueError, match=r"family 'own_vlm': is registered already; .* replace=True"):
        register_family(second)
    assert find_family("own_vlm") is first
    register_family(second, replace=True)
    assert find_family("own_vlm") is second
    assert "| `own_vlm` | Another | registered | in every layer | what its encoder gives |  |" in table.table()
    assert "own_vlm" in table.served()
    assert "mllama" not in table.served()


# -- rules ---------------------------------------------------------------------------------------------------------


def test_parts_under_other_names_are_found(model, inputs):
    """Refused without a row, served by one, and the results are those of the usual names."""
    expected = measure(tiny_model(), [inputs])
    decoder = model.model.language_model

    class Layer(type(decoder.layers[0])):
        def forward(self, hidden_states, **kwargs):
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
            return hidden_states + self.ff_block(self.post_attention_layernorm(hidden_states))

    for layer in decoder.layers:
        layer.__class__ = Layer
        layer.ff_block = layer._modules.pop("mlp")
    with pytest.raises(ValueError, match=r"lacks an mlp in every layer, .* register a family .*docs/extending.md"):
        adapt(model)
    register_family(Family("own_vlm", "Own", parts={"mlp": "ff_block", "norm": "norm", "decoder": "language_model"}))
    stats = measure(model, [inputs])
    assert adapt(model).mlps == tuple(layer.ff_block for layer in decoder.layers)
    assert torch.equal(stats.self_attention, expected.self_attention)
    assert torch.equal(stats.cross_attention, expected.cross_attention)
    recipe = PruningRecipe((1.0, 0.5, 0.5, 0.25, 0.25), adapt(model).fingerprint, 16)
    with prune(model, recipe) as pruner, torch.no_grad():
        model(**inputs)
    assert [layer[0] for layer in pruner.last.kept] == [[16, 16], [8, 8], [8, 8], [4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("part", "owner", "there"),
    [("mlp", "LlamaDecoderLayer", "mlp"), ("norm", "LlamaModel", "norm"), ("decoder", "LlavaModel", "language_model")],
)
def test_a_wrong_name_of_a_part_is_named_when_a_model_is_adapted(model, part, owner, there):
    register_family(Family("own_vlm", "Own", parts={part: "ff_block"}))
    message = rf"family 'own_vlm': parts\['{part}'\]='ff_block': {owner} has no such module; must be one of .*'{there}'"
    with pytest.raises(ValueError, match=message + ".*mend the family's row"):
        adapt(model)


def halves(visual, ids):
    """Cut each image of 16 tokens into two of 8."""
    assert ids is None or torch.equal(ids == IMAGE, visual)
    return ((visual.long().cumsum(1) - 1) // 8).masked_fill(~visual, -1)


def test_a_function_numbers_the_images(model, inputs):
    register_family(Family("own_vlm", "Own", images=halves))
    assert "| Own | registered | in every layer | by a rule of its own |" in table.table()
    adapted = adapt(model)
    with torch.no_grad():
        image = read_images(adapted, inputs).image[0]
        recipe = PruningRecipe((1.0, 0.5, 0.5, 0.25, 0.25), adapted.fingerprint, 8)
        columns = kept_positions(model, recipe, inputs)[-1][0]
    assert torch.bincount(image[image >= 0]).tolist() == [8, 8, 8, 8]
    assert torch.bincount(image[columns][image[columns] >= 0]).tolist() == [2, 2, 2, 2]
    assert measure(model, [inputs]).self_attention.shape == measure(tiny_model(), [inputs]).self_attention.shape


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda visual, ids: None, "returned <class 'NoneType'>: must be int64 of shape"),
        (lambda visual, ids: visual, "returned torch.bool of shape .*: must be int64 of shape"),
        (lambda visual, ids: halves(visual, ids)[:, 1:], "must be int64 of shape"),
        (lambda visual, ids: halves(visual, ids).clamp(min=0), r"numbers \d+ tokens where there are 32 visual ones"),
        (lambda visual, ids: torch.full_like(halves(visual, ids), -1), "numbers 0 tokens where there are 32"),
    ],
)
def test_a_function_that_numbers_other_tokens_is_refused(model, inputs, rule, message):
    register_family(Family("own_vlm", "Own", images=rule))
    with pytest.raises(ValueError, match="family 'own_vlm': its rule for images .*" + message), torch.no_grad():
        read_images(adapt(model), inputs)


def test_a_family_without_a_rule_for_videos_refuses_them(model, inputs):
    register_family(Family("own_vlm", "Own"))
    call = {**inputs, "pixel_values_videos": inputs["pixel_values"]}
    del call["pixel_values"]
    with pytest.raises(
        ValueError, match="pixel_values_videos is passed, and model_type='own_vlm' has no get_video_feat"
    ):
        read_images(adapt(model), call)
    type(model.model).get_video_features = lambda self, pixel_values_videos, return_dict=None: self.get_image_features(
        pixel_values_videos, return_dict=True
    )
    try:
        with pytest.raises(ValueError, match=r"family 'own_vlm' has no rule for videos: .*register"), torch.no_grad():
            read_images(adapt(model), call)
    finally:
        del type(model.model).get_video_features


def test_sizes_tower_and_token_ids_are_read_by_the_row(model):
    config = model.config
    usual = fingerprint_of(tiny_model().config)
    config.patch_id = config.image_token_index
    register_family(
        Family(
            "own_vlm", "Own", token_ids={"image": "patch_id"}, tower=clip_tower, bidirectional=True,
            sizes=lambda config: dataclasses.replace(decoder_sizes(config), first_prunable=2),
        )
    )  # fmt: skip
    adapted = adapt(model)
    assert adapted.token_ids == {"image": IMAGE}
    assert adapted.fingerprint.image_token_id == IMAGE
    assert adapted.fingerprint.vision == usual.vision
    assert isinstance(usual.vision, VisionSizes)
    assert adapted.fingerprint.decoder == dataclasses.replace(usual.decoder, first_prunable=2, bidirectional=True)
    register_family(Family("own_vlm", "Own", token_ids={"image": "blob_id"}), replace=True)
    with pytest.raises(
        ValueError, match="not supported, because it has no blob_id, as a multimodal model's config has"
    ):
        adapt(model)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sizes": lambda config: {"hidden": 32}}, "its rule sizes returned a dict: must return DecoderSizes"),
        ({"tower": lambda config: 3}, "its rule tower returned a int: must return VisionSizes or None"),
        ({"sizes": lambda config: config.depth}, "no attribute 'depth'"),
    ],
)
def test_a_rule_that_returns_other_sizes_is_refused(model, row, message):
    register_family(Family("own_vlm", "Own", **row))
    with pytest.raises(ValueError, match=message):
        adapt(model)


def test_an_entry_of_the_architecture_tells_models_apart(model):
    register_family(Family("own_vlm", "Own", architecture=("mixer_depth",)))
    digests = []
    for depth in (None, 2, 3):
        if depth:
            model.config.mixer_depth = depth
        digests.append(fingerprint_of(model.config).config_hash)
    assert len(set(digests)) == 3


# -- packages ------------------------------------------------------------------------------------------------------

OWN = """
import transformers as tf
from fitprune.families.table import Family

class OwnConfig(tf.LlavaConfig):
    model_type = "own_vlm"

class OwnModel(tf.LlavaForConditionalGeneration):
    config_class = OwnConfig

def register():
    tf.AutoConfig.register("own_vlm", OwnConfig, exist_ok=True)
    tf.AutoModelForImageTextToText.register(OwnConfig, OwnModel, exist_ok=True)

FAMILY = Family("own_vlm", "Own VLM", register=register)
"""


def installed(folder, entry="own_vlm = own_package:FAMILY", code=OWN):
    """A package with an entry point, on the path of a process."""
    info = folder / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fitprune.families]\n{entry}\n")
    (folder / "own_package.py").write_text(code)
    return folder


def run(folder, code):
    """Run code in a process that has the package."""
    before = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=300)


def test_an_installed_packages_family_is_loaded_pruned_and_listed(tmp_path):
    model = shutil.copytree(assets.folder("model"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    weights = {name: weight.clone() for name, weight in load_model(assets.MODEL)[0].state_dict().items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})  # under the modules' names, not those of LLaVA
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own_vlm", "architectures": ["OwnModel"]}))
    result = run(
        installed(tmp_path),
        "from fitprune import PruningRecipe, load_model, load_samples, make_batches, prune\n"
        "from fitprune._support import assets\n"
        "from fitprune.cli.main import main\n"
        "from fitprune.families.adapter import adapt\n"
        "assert 'own_package' not in sys.modules\n"
        f"model, processor = load_model({str(model)!r})\n"
        "print(type(model).__name__, adapt(model).family.models)\n"
        "recipe = PruningRecipe.dense(adapt(model).fingerprint, 16)\n"
        "batch = next(make_batches(load_samples(assets.folder('test'))[:1], processor))\n"
        "with prune(model, recipe): model(**batch)\n"
        "main(['families'])\n",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("OwnModel Own VLM\n")
    assert "| `own_vlm` | Own VLM | registered |" in result.stdout


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ("own_vlm = own_package:FAMILY", OWN.replace('Family("own_vlm"', 'Family("other"'),
         "family 'own_vlm': its entry point has a row with model_type='other': must be the same"),
        ("own_vlm = own_package:FAMILY", OWN.replace("FAMILY =", "ROW ="), "point 'own_package:FAMILY' cannot be"),
        ("own_vlm = own_package:register", OWN, "as function, must be Family"),
    ],
)  # fmt: skip
def test_a_packages_broken_row_is_named(tmp_path, entry, code, message):
    installed(tmp_path, entry, code)
    result = run(
        tmp_path,
        "from fitprune.families.table import find_family, served\n"
        "assert 'own_vlm' in served()\n"
        "try: find_family('own_vlm')\n"
        "except ValueError as error: print(error)\n",
    )
    assert message in result.stdout, result.stderr
