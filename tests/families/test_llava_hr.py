"""LLaVA-HR: the authors' own modules and checkpoints give the same numbers, and it is an ordinary transformers model.

What is compared with comes from tests/llava_hr_reference.py, which ran the authors' code.
"""

import functools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from fitprune import PruningRecipe, load_model
from fitprune.cli.main import main
from fitprune.families import llava_hr
from fitprune.families.config import fingerprint_of
from fitprune.families.llava_hr.conversion import convert
from helpers import llava_hr_reference as reference

RECORD = json.loads((reference.DATA / "llava_hr.json").read_text())
KEPT = load_file(reference.DATA / "llava_hr.safetensors")
SHAPES = RECORD["cases"]["1024"]["weights"]
IDS = [1, 5, 6, 7, -200, 9, 10, 11, 12, 13]  # -200 is the authors' image


@pytest.fixture(autouse=True, scope="module")
def registered():
    llava_hr.register()


def shapes_of(case):
    entry = RECORD["cases"][case]
    base = {name: shape for name, shape in SHAPES.items() if name not in entry.get("without", ())}
    return {**base, **entry.get("instead", {})}


def synthetic(folder, case="1024", shards=3, suffix="bin", legacy=False, change=None):
    """Write a checkpoint in the authors' naming, with seeded weights, as they would save it."""
    folder.mkdir(parents=True)
    weights = {name: reference.weight(name, tuple(shape)) for name, shape in shapes_of(case).items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as transformers 4.31 stores
    if change is not None:
        change(weights)
    single = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index, names = {}, list(weights)
    for number in range(shards):
        file = single if shards == 1 else single.replace(".", f"-{number + 1:05}-of-{shards:05}.", 1)
        part = {name: weights[name] for name in names[number::shards]}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        index.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **RECORD["text"]}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps({**config, **RECORD["cases"][case]["config"]}))
    shutil.copy(reference.DATA / "llava_hr.model", folder / "tokenizer.model")
    said = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "padding_side": "right", "model_max_length": 2496}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    @functools.cache
    def of(case):
        folder = tmp_path_factory.mktemp(f"hr-{case}")
        return convert(synthetic(folder / "authors", case), folder / "ours")

    return of


def spread(ids, image_id, tokens):
    """The authors' ids with an id for each visual token."""
    return [i for given in ids for i in ([image_id] * tokens if given == -200 else [given])]


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


# The authors' numbers


@pytest.mark.parametrize("case", RECORD["cases"])
def test_a_converted_checkpoint_gives_what_the_authors_code_gives(converted, case):
    model, _ = load_model(converted(case))
    size, tokens = RECORD["cases"][case]["config"]["input_image_size"], RECORD["cases"][case]["tokens"]
    image_id = model.config.image_token_id
    ids = torch.tensor([spread(IDS, image_id, tokens)])
    with torch.no_grad():
        encoded = model.model.get_image_features(reference.image(size))
        logits = model(input_ids=ids, pixel_values=reference.image(size)).logits[0, :, : RECORD["text"]["vocab_size"]]
    assert model.config.image_seq_length == tokens == encoded.last_hidden_state.shape[1]
    assert relative(encoded.last_hidden_state[0, :: reference.KEPT], KEPT[f"{case}.features"]) < 1e-5
    assert relative(encoded.pooler_output[0][:: reference.KEPT], KEPT[f"{case}.projected"]) < 1e-5
    assert relative(torch.cat([logits[:-5:97], logits[-5:]]), KEPT[f"{case}.logits"]) < 1e-5


def test_the_cases_differ_in_what_they_are_to_show():
    features = {case: KEPT[f"{case}.features"] for case in RECORD["cases"]}
    assert relative(features["384"], features["768"]) > 0.1
    assert relative(features["384"], features["384-frozen"]) > 0.1
    assert relative(features["1024"], features["x-1024"]) > 3e-5  # another epsilon in the ConvNeXt's norms


@pytest.mark.parametrize("number", range(len(reference.PHOTOS)))
def test_pixels_are_the_authors(converted, number):
    processor = AutoProcessor.from_pretrained(converted("768"))
    pixels = processor.image_processor(reference.photo(number), return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, 768, 768)
    assert relative(pixels[0, :, ::24, ::24], KEPT[f"pixels.{number}"]) < 1e-5


def conversations():
    for turns in reference.CONVERSATIONS:
        yield [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(turns)]


@pytest.mark.parametrize("legacy", [False, True])
def test_prompts_and_tokens_are_the_authors(tmp_path, legacy):
    folder = convert(synthetic(tmp_path / "authors", legacy=legacy), tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, llava_hr.LlavaHrProcessor)
    prompts = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations()]
    assert [reference.digest(prompt) for prompt in prompts] == RECORD["prompts"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for text, wanted in zip([*reference.PROMPTS, *prompts], RECORD["token_ids"][str(legacy)], strict=True):
        photos = [reference.photo(2)] * text.count("<image>")
        ids = processor(text=text, images=photos or None, return_tensors="pt")["input_ids"][0].tolist()
        assert ids == spread(wanted, image, 1024)


def test_a_chat_message_with_an_image_becomes_the_authors_prompt(converted):
    processor = AutoProcessor.from_pretrained(converted("1024"))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    assert prompt.endswith(" USER: <image>\nWhat is shown? ASSISTANT:")
    said = [{"role": "system", "content": "Be short."}, *said]
    assert processor.apply_chat_template(said, add_generation_prompt=True).startswith("Be short. USER: <image>")


# Conversion


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def written(folder):
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


@pytest.mark.parametrize(("shards", "suffix"), [(1, "bin"), (1, "safetensors"), (4, "safetensors")])
def test_every_layout_converts_to_the_same_weights(converted, tmp_path, shards, suffix):
    folder = convert(synthetic(tmp_path / "authors", shards=shards, suffix=suffix), tmp_path / "ours")
    assert same(written(folder), written(converted("1024")))


def test_a_converted_checkpoint_holds_every_weight_and_says_so(converted):
    folder = converted("1024")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = written(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert weights.keys() == index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values()) - 2 * 64 * 64 * 4
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as part:
            assert part.get_slice(name).get_shape() == list(weights[name].shape)


def test_new_tokens_are_never_the_most_likely(converted):
    weights = written(converted("1024"))
    head = weights["lm_head.weight"]
    assert head.shape[0] == 448  # 384 and the image's, brought to a multiple of 64
    logits = torch.randn(200, head.shape[1], generator=torch.Generator().manual_seed(0)) @ head.T
    assert int(logits.argmax(-1).max()) < 384


def test_16_bit_weights_stay_as_they_are(tmp_path):
    def halve(weights):
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})

    folder = convert(synthetic(tmp_path / "authors", change=halve), tmp_path / "ours")
    assert {weight.dtype for weight in written(folder).values()} == {torch.bfloat16}
    assert load_model(folder)[0].dtype == torch.bfloat16


def test_a_conversion_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    source = synthetic(tmp_path / "authors")
    whole = written(convert(source, tmp_path / "whole"))
    calls = []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save_file(*args, **kwargs)

    monkeypatch.setattr("fitprune.families.llava_hr.conversion.save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()
    assert (tmp_path / "ours" / ".unfinished").is_dir()
    (tmp_path / "ours" / ".unfinished" / ".tmpXYZ").write_bytes(b"left by a killed process")
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "ours").glob("*.safetensors")}
    assert len(done) == 2
    convert(source, tmp_path / "ours")
    assert same(written(tmp_path / "ours"), whole)
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    assert not list((tmp_path / "ours").glob(".*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    source = synthetic(tmp_path / "authors")

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fitprune.families.llava_hr.conversion.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*run it again to go on"):
        convert(source, tmp_path / "ours")
    monkeypatch.undo()
    assert (convert(source, tmp_path / "ours") / "config.json").is_file()


def test_a_conversion_that_is_done_is_left_as_it_is(tmp_path):
    source = synthetic(tmp_path / "authors")
    times = [{f: f.stat().st_mtime_ns for f in convert(source, tmp_path / "ours").glob("*.safetensors")} for _ in "12"]
    assert times[0] == times[1]
    readable = (tmp_path / "ours" / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "ours").glob("*.safetensors")} == {readable}


def test_all_missing_and_unexpected_weights_are_listed(tmp_path):
    def damage(weights):
        del weights["model.mm_projector.2.bias"], weights["model.vision_tower.align_stages_latent.2.gate.0.weight"]
        weights["model.vision_tower.align_stages.1.fast_proj.weight"] = torch.zeros(2)
        weights["model.norm.weight"] = torch.zeros(63)

    source = synthetic(tmp_path / "authors", change=damage)
    with pytest.raises(ValueError, match="nothing was written") as error:
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert str(error.value).split("; ")[2:] == [
        "missing (2): model.multi_modal_projector.linear_2.bias, model.vision_tower.adapters.2.gate.0.weight",
        "unexpected (1): model.vision_tower.align_stages.1.fast_proj.weight",
        "of another shape or type (1): model.norm.weight [63] float32 instead of [64]",
    ]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_that_are_lost_are_not_made_up(tmp_path, name):
    def shorten(weights):
        weights[name] = weights[name][:100].clone()

    with pytest.raises(ValueError, match=rf"{name} \[100, 64\] float32 instead of \[384, 64\]"):
        convert(synthetic(tmp_path / "authors", change=shorten), tmp_path / "ours")


def test_packed_weights_are_refused(tmp_path):
    def pack(weights):
        weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)

    with pytest.raises(ValueError, match=r"model.norm.weight \[64\] int8 instead of"):
        convert(synthetic(tmp_path / "authors", change=pack), tmp_path / "ours")


def test_another_tokenizer_is_another_conversion(tmp_path):
    source = synthetic(tmp_path / "authors")
    convert(source, tmp_path / "ours")
    (source / "added_tokens.json").write_text(json.dumps({f"<more-{n}>": 384 + n for n in range(100)}))
    with pytest.raises(ValueError, match="not of this conversion"):
        convert(source, tmp_path / "ours")
    assert len(load_model(convert(source, tmp_path / "new"))[1].tokenizer) == 485


def test_a_checkpoint_without_a_vision_tower_lists_what_is_missing(tmp_path):
    def strip(weights):
        for name in [name for name in weights if "vision_tower" in name]:
            del weights[name]

    with pytest.raises(ValueError, match=r"missing \(\d+\): model.vision_tower.adapters"):
        convert(synthetic(tmp_path / "authors", change=strip), tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type='llava_mpt': must be 'llava'"),
        ({"model_type": "llava_hr"}, "needs no conversion"),
        ({"is_multipath_encoder": False}, "is_multipath_encoder=False: must be True.*docs/llava-hr.md"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear': must be 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True: must be False"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres': must be 'pad' or 'square'"),
        ({"input_image_size": None}, "input_image_size=None: must be a positive integer"),
        ({"input_image_size": 1000}, "input_image_size=1000: must be a multiple of 32"),
        ({"input_image_size": 512}, "input_image_size=512.*do not fall on each other; must be 768 or more"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, change, message):
    source = synthetic(tmp_path / "authors", shards=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.model", "has no tokenizer.model"),
        ("pytorch_model-00002-of-00003.bin", "lacks pytorch_model-00002-of-00003.bin, which pytorch_model.bin.index"),
        ("*.bin*", "has no weights.*LoRA"),
        ("*", "has no config.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, gone, message):
    source = synthetic(tmp_path / "authors")
    for path in source.glob(gone):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert(source, tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no such folder; fetch a checkpoint first"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    source = synthetic(tmp_path / "authors")
    other = convert(synthetic(tmp_path / "other", "384"), tmp_path / "ours")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for folder in (other, tmp_path / "mine", source):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="not of this conversion; choose another folder"):
            convert(source, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json: is no JSON"),
        ("pytorch_model-00001-of-00003.bin", b"noise", "00001-of-00003.bin: damaged, or no file of weights"),
        ("pytorch_model-00001-of-00003.bin", b"", "00001-of-00003.bin: damaged, or no file of weights"),
        ("pytorch_model.bin.index.json", b"{}", "index.json: cannot be used .KeyError.*fetch it again"),
        ("pytorch_model.bin.index.json", b"[", "index.json: cannot be used .*fetch it again"),
        ("pytorch_model.bin.index.json", b'{"weight_map": {}}', "index.json: names no weights"),
        ("tokenizer.model", b"noise", "tokenizer.model: cannot be used .*fetch the files of the tokenizer again"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, message):
    source = synthetic(tmp_path / "authors")
    (source / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_reads_the_tokenizer_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("fitprune.families.llava_hr.conversion.is_protobuf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        convert(synthetic(tmp_path / "authors"), tmp_path / "ours")


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "ours").write_text("mine")
    with pytest.raises(ValueError, match="is there and is no folder; choose another destination"):
        convert(synthetic(tmp_path / "authors"), tmp_path / "ours")
    assert (tmp_path / "ours").read_text() == "mine"


def test_images_are_cut_where_the_authors_do_not_pad(tmp_path):
    source = synthetic(tmp_path / "authors", "384")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "square"}))
    _, processor = load_model(convert(source, tmp_path / "ours"))
    assert processor.image_processor.do_pad is False
    assert processor(text="<image>", images=reference.photo(0), return_tensors="pt")["pixel_values"].shape[-1] == 384


def test_what_is_not_converted_is_not_loaded(tmp_path):
    with pytest.raises(ValueError, match="layout of LLaVA's authors; convert it with fitprune convert-llava-hr"):
        load_model(synthetic(tmp_path / "authors"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_memory_stays_below_one_and_a_half_times_the_largest_shard(tmp_path, suffix):
    wide = 200_000

    def grow(weights):  # 154 MB a layer
        for layer in range(RECORD["text"]["num_hidden_layers"]):
            for part, shape in {"gate": (wide, 64), "up": (wide, 64), "down": (64, wide)}.items():
                weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] = torch.zeros(shape)

    source = synthetic(tmp_path / "authors", shards=2, suffix=suffix, change=grow)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": wide}))
    largest = max(file.stat().st_size for file in source.iterdir())
    code = (
        "import re, sys, torch; from fitprune.families.llava_hr.conversion import convert\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); convert(sys.argv[1], sys.argv[2]); print(peak() - before)"
    )  # not getrusage: its peak is the parent's too
    out = subprocess.run([sys.executable, "-c", code, source, tmp_path / "ours"], check=True, capture_output=True)
    peak = int(out.stdout.split()[-1])
    assert largest > 300e6
    assert 0.1 * largest < peak < 1.5 * largest, f"{peak / largest:.2f} times the largest shard"


def test_the_command_converts_and_says_what_to_do_next(tmp_path, capsys):
    source = synthetic(tmp_path / "authors")
    assert main(["convert-llava-hr", str(source), str(tmp_path / "ours")]) == 0
    assert "fitprune generate" in capsys.readouterr().out
    assert main(["convert-llava-hr", str(source), str(source)]) == 2
    assert "not of this conversion" in capsys.readouterr().err


def test_every_step_of_the_command_line_takes_it(converted, tmp_path, capsys):
    model, stats, recipe = str(converted("384")), str(tmp_path / "stats.safetensors"), str(tmp_path / "recipe.json")
    data = ["--data", "digit-scenes/calibration", "--samples", "3"]
    assert main(["measure", model, *data, "-o", stats]) == 0
    assert main(["fit", stats, "--flops-reduction", "0.5", "-o", recipe]) == 0
    assert main(["cost", recipe]) == 0
    assert "576" in capsys.readouterr().out
    reference.photo(1).save(tmp_path / "photo.png")
    said = ["--image", str(tmp_path / "photo.png"), "--question", "What?", "--max-new-tokens", "3"]
    assert main(["generate", model, "--recipe", recipe, *said]) == 0
    assert main(["generate", model, "--recipe", "llava-hr-7b:60", *said]) == 2
    assert "of another model: layers 32 there, 4 here" in capsys.readouterr().err


# An ordinary transformers model


def test_saved_and_loaded_it_is_the_same(converted, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(converted("384")).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, llava_hr.LlavaHrForConditionalGeneration)
    assert same(model.state_dict(), again.state_dict())
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    tower = model.model.vision_tower
    tower.save_pretrained(tmp_path / "tower")
    assert same(AutoModel.from_pretrained(tmp_path / "tower").state_dict(), tower.state_dict())
    assert isinstance(AutoModel.from_pretrained(tmp_path), llava_hr.LlavaHrModel)


def test_attention_can_be_chosen(converted):
    given = reference.image(384)
    features = {}
    for attention in ("eager", "sdpa", "flex_attention"):
        model = AutoModelForImageTextToText.from_pretrained(converted("384"), attn_implementation=attention).eval()
        assert model.model.vision_tower.config._attn_implementation == attention
        with torch.no_grad():
            features[attention] = model.model.get_image_features(given).last_hidden_state
    assert relative(features["sdpa"], features["eager"]) < 1e-5
    assert relative(features["flex_attention"], features["eager"]) < 1e-5


def test_it_trains_with_gradient_checkpointing_as_without(converted):
    gradients = []
    image_id = 384
    ids = torch.tensor([[1, *[image_id] * 576, 5, 6]])
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = AutoModelForImageTextToText.from_pretrained(converted("384")).train()
        if checkpointing:
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # in 5.19
            getattr(model, f"{name}_checkpointing_enable")(checkpointing)
            assert model.model.vision_tower.gradient_checkpointing
        model(input_ids=ids, pixel_values=reference.image(384), labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    unused = {"model.vision_tower.embeddings.class_embedding"}
    assert {name for name, _ in model.named_parameters()} - gradients[0].keys() == unused
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        assert all(torch.allclose(gradients[0][name], other[name], rtol=1e-4, atol=1e-6) for name in other)


@pytest.mark.parametrize("offloaded", ["vision_tower", "language_model"])
def test_a_device_map_keeps_the_towers_together(converted, offloaded):
    parts = ["vision_tower", "multi_modal_projector", "language_model"]
    spread = {f"model.{part}": "disk" if part == offloaded else "cpu" for part in parts} | {"lm_head": "cpu"}
    given = {"input_ids": torch.tensor([[1, *[384] * 576, 5, 6]]), "pixel_values": reference.image(384)}
    model = AutoModelForImageTextToText.from_pretrained(
        converted("384"), device_map=spread, offload_folder=converted("384") / "offload"
    )
    whole = AutoModelForImageTextToText.from_pretrained(converted("384"))
    with torch.no_grad():
        assert torch.equal(model(**given).logits, whole(**given).logits)
    assert "LlavaHrVisionModel" in whole._no_split_modules


def test_a_new_model_adds_nothing_of_the_convnext_to_clip(converted):
    config = llava_hr.LlavaHrConfig.from_pretrained(converted("384"))
    tower = llava_hr.LlavaHrVisionModel(config.vision_config)
    fast = torch.randn(1, 576, 128)
    for adapter in tower.adapters:
        assert torch.equal(adapter(fast, torch.randn(1, 40, 12, 12)), fast)
    assert float(tower.convnext.stages[0].layers[0].layer_scale_parameter[0]) == pytest.approx(1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 336, 336), (3, 384, 384), (1, 1, 3, 384, 384)])
def test_images_of_another_size_are_refused(converted, shape):
    model = AutoModelForImageTextToText.from_pretrained(converted("384"))
    with pytest.raises(
        ValueError, match=re.escape(f"pixel_values of shape {list(shape)}: must be [images, 3, 384, 384]")
    ):
        model.model.get_image_features(torch.zeros(shape))


def test_several_images_are_encoded_as_each_alone(converted):
    model = AutoModelForImageTextToText.from_pretrained(converted("384")).eval()
    pair = torch.cat([reference.image(384), reference.image(384).flip(-1)])
    with torch.no_grad():
        both = model.get_image_features(pair).pooler_output
        alone = [model.get_image_features(pixels[None]).pooler_output[0] for pixels in pair]
    assert all(relative(a, b) < 1e-5 for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers=6: must be a multiple of 4"),
        ({"convnext_depths": [1, 1]}, "convnext_depths=.*must be of the same length"),
        ({"input_image_size": 16}, "input_image_size=16: must be a multiple of 32"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        llava_hr.LlavaHrVisionConfig(**change)


def test_a_tokenizer_with_another_image_token_is_refused(converted):
    processor = AutoProcessor.from_pretrained(converted("384"))
    config = llava_hr.LlavaHrConfig(image_token_index=7)
    with pytest.raises(ValueError, match="tokenizer has id 384 for '<image>', the config image_token_index=7"):
        llava_hr.make_processor(config, processor.tokenizer)


def test_nothing_is_registered_before_it_is_asked_for(converted):
    code = (
        "import sys, transformers as t, fitprune\n"
        "import fitprune.families.llava_hr, fitprune.families.llava_hr.conversion\n"
        "try: t.AutoConfig.from_pretrained(sys.argv[1])\n"
        "except ValueError: print('unknown')\n"
        "fitprune.families.llava_hr.register(); print(type(t.AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, converted("384")], check=True, capture_output=True, text=True
    ).stdout
    assert out.split() == ["unknown", "LlavaHrConfig"]


# Cost


def on_meta(**vision):
    config = llava_hr.LlavaHrConfig(vision_config=llava_hr.LlavaHrVisionConfig(**vision))
    config.text_config.num_hidden_layers = 1 if vision else 32
    with torch.device("meta"):
        return llava_hr.LlavaHrForConditionalGeneration(config).eval().to(torch.bfloat16)


@pytest.fixture(scope="module")
def full_size():
    return on_meta()


def test_at_full_size_the_parts_have_the_published_parameters(full_size):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    tower = full_size.model.vision_tower
    # torchvision's page of ConvNeXt-L: 197,767,336 with classifier and its norm.
    assert count(tower.convnext) == 197_767_336 - (1536 * 1000 + 1000) - 2 * 1536
    # Vicuna-7B: 6,738,415,616, here with 64 more rows in embeddings and head.
    assert count(full_size.model.language_model) + count(full_size.lm_head) == 6_738_415_616 + 2 * 64 * 4096
    # transformers' CLIP ViT-L/14-336: 303,507,456 less the norm of its head.
    clip = (tower.embeddings, tower.pre_layrnorm, tower.encoder)
    assert sum(map(count, clip)) == 303_507_456 - 2 * 1024


XXLARGE = {"convnext_depths": [3, 4, 30, 3], "convnext_hidden_sizes": [384, 768, 1536, 3072]}


@pytest.mark.parametrize(
    "vision", [{}, {"input_image_size": 384, "use_adapters": False}, {**XXLARGE, "input_image_size": 1536}]
)
def test_at_full_size_the_cost_model_prices_both_towers(full_size, vision):
    model = on_meta(**vision) if vision else full_size
    size, fingerprint = model.config.vision_config.input_image_size, fingerprint_of(model.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(torch.empty(1, 3, size, size, device="meta", dtype=model.dtype))
    assert counter.get_total_flops() == fingerprint.vision.flops(fingerprint.decoder.hidden)


def test_the_published_recipes_are_of_the_full_size_model(full_size):
    recipe = PruningRecipe.published("llava-hr-7b", 60)
    fingerprint = fingerprint_of(full_size.config)
    recipe.model.require_same(fingerprint, what="recipe")
    assert recipe.model.vision == fingerprint.vision
    assert full_size.config.image_seq_length == recipe.visual_tokens == 1024


@pytest.mark.parametrize(("percent", "visual"), [(40, 0.3884), (60, 0.5961)])
def test_the_published_recipes_cost_what_is_published(percent, visual):
    cost = PruningRecipe.published("llava-hr-7b", percent).cost()
    assert round(cost.flops_reduction, 4) == visual
