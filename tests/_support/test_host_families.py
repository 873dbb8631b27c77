"""Facts about transformers and accelerate that reading and loading models relies on, one line each."""

import inspect
import types

import pytest
import torch
import transformers as tf

from fitprune._support import facts, host

FACTS = {
    "crops of an image": facts.fact(
        "transformers.models.llava_next.modeling_llava_next", "image_size_to_num_patches",
        "image_size", "grid_pinpoints", "patch_size",
    ),
    "packed features": facts.fact(
        "transformers", "LlavaNextModel.pack_image_features",
        "image_features", "image_sizes", "vision_feature_select_strategy", "image_newline",
    ),
    "a model that packs none": lambda: not host.packs_features(tf.LlavaModel),
    "features by get_image_features": facts.fact("transformers", "LlavaModel.get_image_features", "pixel_values"),
    "images that generate encoded": facts.fact("transformers", "LlavaForConditionalGeneration.forward", host.ENCODED),
    "files of a repository": facts.fact("transformers.utils", "cached_file", "path_or_repo_id", "filename"),
    "an optional file": lambda: "_raise_exceptions_for_missing_entries" in inspect.getsource(tf.utils.hub.cached_files),
    "an adapter's config": facts.fact("transformers.utils", "find_adapter_config_file", "revision", "token"),
    "a commit of the hub": facts.fact("huggingface_hub", "HfApi.resolve_revision", "repo_id", "revision"),
    "a table of models that answer in text": facts.fact("transformers", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    "a config's entries": facts.fact("transformers", "PreTrainedConfig.get_config_dict"),
}  # fmt: skip


@pytest.mark.parametrize("fact", FACTS)
def test_what_families_rely_on_holds(fact):
    assert FACTS[fact]()


def test_a_token_id_has_two_names():
    assert host.token_id(types.SimpleNamespace(image_token_index=7), "image") == 7
    assert host.token_id(types.SimpleNamespace(image_token_id=8, image_token_index=None), "image") == 8
    assert host.token_id(types.SimpleNamespace(image_token_id="<image>"), "image") is None
    assert host.token_id(types.SimpleNamespace(), "video") is None


def test_windows_are_read_off_the_cache():
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8}
    assert host.layer_windows(tf.MistralConfig(**sizes, sliding_window=12), 3) == (12, 12, 12)
    assert host.layer_windows(tf.LlamaConfig(**sizes), 3) == (None, None, None)


def test_crops_are_those_of_the_best_resolution_and_one_of_the_whole():
    assert host.crops_of_size(torch.tensor([60, 30]), [[32, 64], [64, 32]], 32) == 3


def test_a_commit_stays_on_the_config():
    model = types.SimpleNamespace(config=tf.LlamaConfig())
    host.set_commit(model, "abc")
    assert model.config._commit_hash == "abc"


def test_weights_and_device_that_accelerate_keeps_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weight = model[0].weight.detach().clone()
    assert host.offloaded_weight(model, "0.weight") is None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.device.type == "meta"
    assert torch.equal(host.offloaded_weight(model, "0.weight"), weight)
    hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device("cpu"))
    model = accelerate.hooks.add_hook_to_module(torch.nn.Sequential(), hook)
    model.device = torch.device("meta")
    assert host.execution_device(model) == torch.device("cpu")


def test_a_weight_of_torchao_shows_its_tensors():
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert host.inner_tensors(linear[0].weight) == []
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    assert any(part.dtype == torch.int8 for part in host.inner_tensors(linear[0].weight))


def test_a_missing_file_of_a_folder_is_no_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert host.has_file(str(tmp_path), "config.json", revision=None, token=None)
    assert not host.has_file(str(tmp_path), "processor_config.json", revision=None, token=None)
