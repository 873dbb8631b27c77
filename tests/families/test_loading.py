"""What `load_model` says before the weights: names, files, families, processors and adapters."""

import importlib.util
import json
import re
import shutil
import time

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from fitprune import load_model, load_samples, make_batches
from fitprune._support import assets
from fitprune.cli.main import main
from fitprune.families import loading
from helpers import families as F

TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture
def weights(monkeypatch):
    """The calls that load weights; they fail."""
    calls = []

    def spy(*args, **_):
        calls.append(args)
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(tf.AutoModelForImageTextToText, "from_pretrained", spy)
    return calls


@pytest.fixture
def no_network(monkeypatch):
    """Every request to the hub fails."""

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", refuse)


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model."""
    return shutil.copytree(assets.folder("model"), tmp_path / "model")


def expect_refusal(name, message, kind, **options):
    with pytest.raises(kind, match=message) as caught:
        load_model(name, **options)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit-scene", "digit-scene: no such file or folder; did you mean digit-scenes?"),
        ("Digit_Scenes", "did you mean digit-scenes?"),
        ("digit-scenes/model", r"did you mean digit-scenes\? It is the one bundled model"),
        ("digit-details", r"did you mean digit-scenes\? It is the one bundled model"),
        ("gpt2", "gpt2: no such folder, and no hub name, which is owner/name; the bundled model is digit-scenes"),
        ("/nowhere/model", "no such folder"),
        ("./llava", "no such folder"),
        ("models/llava/7b", "no such folder"),
        ("models/llava/", "no such folder"),
        ("~/llava", "no such folder"),
        ("", "no such folder"),
        ("lab/tiny.json", "no such folder"),
        ("digit-scenes/calibration", "is bundled data, not a model: the bundled model is digit-scenes"),
        ("digit-details/test", "is bundled data, not a model: the bundled model is digit-scenes"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_without_the_hub(weights, no_network, name, message):
    expect_refusal(name, message, FileNotFoundError)


@pytest.mark.parametrize(("name", "kind"), [(None, "NoneType"), (3, "int"), (("a",), "tuple"), (b"a", "bytes")])
def test_a_name_of_another_type_is_refused(weights, no_network, name, kind):
    expect_refusal(name, f"name is a {kind}: must be a model's folder or hub name", ValueError)


def test_a_revision_within_the_name_is_named(weights, no_network):
    expect_refusal("lab/tiny@v1", "lab/tiny with revision='v1'", ValueError)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "config.json"])
def test_a_file_is_no_model(weights, no_network, tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    expect_refusal(tmp_path / name, "is a file: must be a model's folder or a hub name", ValueError)


def test_a_typo_on_the_command_line_is_said_in_one_line(weights, no_network, capsys, tmp_path):
    options = ["--data", "digit-scenes/calibration", "-o", str(tmp_path / "s.safetensors")]
    assert main(["measure", "digit-scene", *options]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("fitprune: error: digit-scene: no such file or folder; did you mean digit-scenes?")


def test_a_hub_out_of_reach_is_asked_once(weights, monkeypatch, tmp_path, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    expect_refusal("lab/tiny", "lab/tiny on the hub cannot be asked: no connection to the hub", ConnectionError)
    assert time.monotonic() - started < 5
    assert not caplog.records


def test_what_the_hub_has_not_is_named(weights, hub):
    expect_refusal("lab/none", "lab/none: no such folder here and no such repository on the hub", FileNotFoundError)
    hub.create("lab/data")
    expect_refusal("lab/data", "lab/data has no config.json with a model_type", ValueError)
    expect_refusal("lab/data", "has no revision 'v2'", FileNotFoundError, revision="v2")


# -- folders and families ------------------------------------------------------------------------------------------


def test_a_folder_without_a_config(weights, tmp_path):
    expect_refusal(tmp_path, "has no config.json: must be a folder that save_pretrained wrote", FileNotFoundError)


def test_a_folder_of_checkpoints_names_them(weights, folder, tmp_path):
    folder.rename(tmp_path / "checkpoint-10")
    expect_refusal(tmp_path, "has no config.json: .*; name a folder in it: checkpoint-10$", FileNotFoundError)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", POINTER, "model.safetensors is a git-LFS pointer, not the file itself: run git lfs pull"),
        ("model.safetensors", b"", "model.safetensors is empty: download it again"),
        ("model.safetensors", b"x" * 5000, "model.safetensors is truncated or broken"),
        ("model.safetensors", None, "model.safetensors is truncated or broken .*: download it again"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-LFS pointer"),
        ("config.json", POINTER, "config.json is a git-LFS pointer"),
        ("processor_config.json", b"", "processor_config.json is empty"),
        ("pytorch_model.bin", POINTER, "pytorch_model.bin is a git-LFS pointer"),
    ],
)
def test_a_broken_file_is_named(folder, file, content, message):
    content = (folder / file).read_bytes()[:50_000] if content is None else content
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    expect_refusal(folder, f"model: {message}", OSError)


LAYER = "language_model.model.layers.3."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER: None}, "9 of its weights are missing: model.language_model.layers.3.input_layernorm.weight, "),
        ({"lm_head": None}, "1 of its weights are missing: lm_head.weight; random ones would stand there"),
        (
            {f"{LAYER}mlp.down_proj": 4},
            r"1 .* have another shape .*3.mlp.down_proj.weight \(4, 512\), not \(192, 512\)",
        ),
    ],
)
def test_a_checkpoint_without_all_its_weights_is_refused(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    for part, rows in change.items():
        for name in [name for name in tensors if part in name]:
            whole = tensors.pop(name)
            if rows:
                tensors[name] = whole[:rows].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expect_refusal(folder, message, ValueError)


def test_a_head_that_is_tied_to_the_embeddings_may_be_left_out(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, _ = load_model(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "its config.json cannot be read"),
        ("{}", "has no config.json with a model_type"),
        ('{"model_type": "new_vl"}', "model_type='new_vl' is unknown to transformers"),
        ('{"model_type": "llama"}', "model_type='llama': not supported"),
        ('{"model_type": "clip"}', "model_type='clip': not supported"),
        ('{"model_type": "siglip"}', "model_type='siglip': not supported"),
        ('{"model_type": "whisper"}', "model_type='whisper': not supported"),
        ('{"model_type": "mllama"}', "model_type='mllama': refused"),
        ('{"model_type": "llava_llama", "mm_vision_tower": "x"}', "in the layout of LLaVA's authors"),
    ],
)
def test_a_config_that_is_no_supported_models(weights, folder, config, message):
    (folder / "config.json").write_text(config)
    expect_refusal(folder, message, (OSError, ValueError))


# -- processors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json tokenizer_config.json", "everything"])
def test_missing_files_of_the_processor(weights, folder, lost):
    kept = {"config.json", "model.safetensors"}
    names = [path.name for path in folder.iterdir() if path.name not in kept] if lost == "everything" else lost.split()
    for name in names:
        (folder / name).unlink()
    expect_refusal(
        folder, "processor .*; copy the processor's files from the model that this one was tuned from", OSError
    )


@pytest.mark.skipif(TORCHVISION, reason="is about what happens without torchvision, which is there")
@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "llava_onevision", "smolvlm", "llava_next_video"],
)
def test_torchvision_is_named_where_a_family_needs_it(weights, tmp_path, name):
    row = next(row for row in F.ROWS if row.name == name)
    row.make_model().config.save_pretrained(tmp_path)
    row.processor().tokenizer.save_pretrained(tmp_path)
    row.processor().image_processor.save_pretrained(tmp_path)
    build = re.escape(torch.__version__)
    message = f"the processor of {name} needs torchvision, in a build for torch {build}: pip install torchv"
    expect_refusal(tmp_path, message, ImportError)


def test_without_a_chat_template_or_a_padding_token_a_model_loads(folder):
    (folder / "chat_template.jinja").unlink()
    said = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "chat_template"):
        said.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    _, processor = load_model(folder)
    assert processor.chat_template is None
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    samples = load_samples(assets.folder("calibration"))[:24]
    (batch,) = make_batches(samples, processor, batch_size=24, prompt_template="USER: <image>\n{question} ASSISTANT:")
    (usual,) = make_batches(samples, load_model("digit-scenes")[1], batch_size=24)
    assert torch.equal(batch["attention_mask"], usual["attention_mask"])
    real = usual["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][real], usual["input_ids"][real])


# -- adapters ------------------------------------------------------------------------------------------------------


def adapter(folder, base, **said):
    folder.mkdir(exist_ok=True)
    said = {"base_model_name_or_path": str(base), "peft_type": "LORA", **said}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_an_adapter_without_peft_is_named_as_what_it_is(weights, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    message = "is a PEFT adapter of lab/base: pip install peft, or merge it .merge_and_unload. and save that model"
    expect_refusal(adapter(tmp_path / "a", "lab/base"), message, ImportError)
    monkeypatch.setattr(loading, "require_quantizer", lambda name: None)
    expect_refusal(adapter(tmp_path / "b", ""), "names no base model", ValueError)
    expect_refusal(
        adapter(tmp_path / "c", "lab/base"), "PEFT adapter, which is merged", ValueError, quantization="torchao-int8"
    )


def test_an_adapter_on_the_hub_is_named_as_what_it_is(weights, hub, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    hub.create("lab/lora")
    hub.put("lab/lora", {"adapter_config.json": b'{"base_model_name_or_path": "lab/base"}'})
    expect_refusal("lab/lora", "lab/lora is a PEFT adapter of lab/base: pip install peft", ImportError)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_an_adapter_is_merged_into_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = load_model("digit-scenes")
    inputs = next(make_batches(load_samples(assets.folder("test"))[:2], processor, batch_size=2))
    with torch.no_grad():
        plain = model(**inputs).logits
    how = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, how).eval()
    with torch.no_grad():
        expected = tuned(**inputs).logits
    tuned.save_pretrained(tmp_path / "lora", save_embedding_layers=False)  # else it looks at the hub
    loaded, _ = load_model(tmp_path / "lora")
    assert loaded.name_or_path == str(tmp_path / "lora")
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    with torch.no_grad():
        logits = loaded(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_half_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(load_model("digit-scenes")[0], how)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)  # else it looks at the hub
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.3." not in k}, tmp_path / "adapter_model.safetensors")
    expect_refusal(tmp_path, "is a PEFT adapter of .*missing adapter keys", ValueError)
    (tmp_path / "adapter_model.safetensors").write_bytes(POINTER)
    expect_refusal(tmp_path, "adapter_model.safetensors is a git-LFS pointer", OSError)


def test_a_bases_fault_names_the_adapter_too(weights, no_network, tmp_path):
    pytest.importorskip("peft")
    expect_refusal(
        adapter(tmp_path / "a", "/nowhere/base"), "is a PEFT adapter of /nowhere/base, which does not load", OSError
    )
    said = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    expect_refusal(adapter(tmp_path / "b", "digit-scenes", **said), "only adds tokens .PROMPT_TUNING.", ValueError)
