"""The vLLM plug-in on other families: tiny models of random weights, with heads as wide as its CPU attention takes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from transformers import AutoProcessor

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from fitprune import PruningRecipe, prune
from fitprune.families.adapter import adapt
from helpers import families
from helpers.served import OPTIONS, first_apart

# Each with the placeholder of a video in its prompts; None where it has none, or, as Qwen3-VL with these weights,
# answers otherwise about videos in vLLM than in transformers without any recipe.
FAMILIES = {
    "llava_next": None, "llava_onevision": "<video>", "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_vl": None, "internvl": "<video>",
}  # fmt: skip
VIDEO_PROMPTS = ["clip {v} what?", "is {i} in {v}? say it", "{v}then {v}tell me"]


def row_of(name, monkeypatch):
    """A row of tests/families.py with two heads 32 wide."""
    monkeypatch.setattr(families, "TEXT", {**families.TEXT, "num_attention_heads": 2, "num_key_value_heads": 1})
    config = families.qwen_config

    def wider(kind, ids, vision, **text):
        text["rope"] = {**text.get("rope", {}), "mrope_section": [4, 6, 6]}
        return config(kind, ids, vision, **{**text, **({"head_dim": 32} if "head_dim" in text else {})})

    monkeypatch.setattr(families, "qwen_config", wider)
    rows = itertools.chain.from_iterable(getattr(families, part) for part in vars(families) if part.endswith("ROWS"))
    return next(row for row in rows if row.name == name)


def whole_processor(row):
    """The row's processor, its stand-in for a video processor replaced: here torchvision is at hand."""
    processor = row.processor()
    patch = getattr(processor.image_processor, "patch_size", None)
    few = {"size": {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}}  # pixels
    videos = {
        "qwen2_5_vl": lambda: tf.Qwen2VLVideoProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2, **few),
        "qwen3_vl": lambda: tf.Qwen3VLVideoProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2, **few),
        "internvl": lambda: tf.InternVLVideoProcessor(size={"height": 48, "width": 48}),
        "llava_onevision": lambda: tf.LlavaOnevisionVideoProcessor(size=families.SQUARE),
    }
    if row.name in videos:
        processor.video_processor = videos[row.name]()
        processor.__class__ = type(processor).__mro__[1]  # not the child that knows the stand-in
    return processor


@pytest.fixture(scope="module")
def expected_of(tmp_path_factory):
    """By family, once for both runners: a folder with its model and recipe, prompts, and what transformers answers."""
    known = {}

    def find(name, monkeypatch):
        if name not in known:
            known[name] = by_transformers(name, tmp_path_factory.mktemp(name), monkeypatch)
        return known[name]

    return find


def by_transformers(name, path, monkeypatch):
    row = row_of(name, monkeypatch)
    model, folder = row.make_model(), path / "model"
    model.save_pretrained(folder, max_shard_size="100KB")  # several files, with the names that transformers 5 gives
    whole_processor(row).save_pretrained(folder)
    decoder = adapt(model).fingerprint.decoder
    keep = [0.7 ** sum(each <= layer for each in decoder.prunable) for layer in range(decoder.layers)]
    recipe = PruningRecipe(tuple(keep), adapt(model).fingerprint, 16)
    recipe.save(path / "recipe.json")
    texts = families.IMAGE_PROMPTS
    if name == "llava_onevision":  # of several images vLLM makes other tokens than transformers, without any recipe
        texts = [text for text in texts if text.count("{i}") == 1]
    if FAMILIES[name]:
        texts = texts + VIDEO_PROMPTS
    # In transformers, unlike in vLLM, Qwen2.5-VL's positions after a video do not depend on its length: a short one.
    frames = [4, 2, 2] if name == "qwen2_5_vl" else families.FRAMES
    asked, ids, logprobs = [], [], []
    processor = AutoProcessor.from_pretrained(folder)  # as vLLM loads it
    for text, images, videos in families.prompts_of(texts, row.image, FAMILIES[name], frames):
        asked.append({"prompt": text, "multi_modal_data": {}})
        media = {}
        if images:
            asked[-1]["multi_modal_data"]["image"], media["images"] = images, [images]
        if videos:
            clips = [of_clip(video) for video in videos]
            media |= {"videos": videos, "video_metadata": clips}
            asked[-1]["multi_modal_data"]["video"] = [
                (video, {**clip, "do_sample_frames": False}) for video, clip in zip(videos, clips, strict=True)
            ]
        inputs = processor(text=[text], return_tensors="pt", do_sample_frames=False, **media)
        with prune(model, recipe), torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        ids.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        logprobs.append([out.logits[0].log_softmax(-1)[0, ids[-1][0]].item()])
    return path, asked, SimpleNamespace(ids=ids, logprobs=logprobs)


def of_clip(video):
    """What goes with the frames of a video, of which all are to be taken."""
    frames = len(video)
    return {
        "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_answer_as_in_transformers(name, runner, engines, expected_of, monkeypatch):
    path, asked, expected = expected_of(name, monkeypatch)
    options = {**OPTIONS, "limit_mm_per_prompt": {"image": 3, "video": 2}}
    engine = engines(path / "model", path / "recipe.json", runner, **options)
    found = engine.answer(asked, max_tokens=6, ignore_eos=True)
    assert found.ids == expected.ids
    assert first_apart(found, expected).max() < 1e-3
