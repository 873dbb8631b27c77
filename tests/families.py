"""A tiny random model of each family from its real config class, and inputs for it from its real processor.

The tokenizer is a byte-level one without merges (every character a token) that has the family's special tokens. Image
processors are the PIL ones; video processors need torchvision, so `Videos` makes their tensors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as tf
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.video_utils import VideoMetadata

LAYERS = 6
VOCABULARY = 320
IMAGE_PROMPTS = ["look: {i} what?", "is {i} as {i}? say it", "{i}tell me", "one more talk {i}and so?"]
VIDEO_PROMPTS = ["clip {v} what?", "is {i} in {v}? say it", "{v}then {v}tell me", "no clip, {i} or {i} and so?"]
SIZES = [(32, 32), (60, 30), (31, 62), (48, 40), (24, 64), (64, 64)]  # (height, width) of an image, in turns
FRAMES = [4, 4, 4]  # of a video, in turns: where the videos of a batch are one tensor
PADDED = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make_model: Callable[[], tf.PreTrainedModel]
    samples: Callable[[tf.PreTrainedModel], list[dict]]
    collate: Callable[[list[dict]], dict]
    processor: Callable[[], Any] | None = None


# Tokens


def tokenizer(special, named):
    """Ids: 0..3 pad, begin, end, unknown, then `special` and `named` (attributes such as image_token), then bytes."""
    control = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys([*special, *named.values()])]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(control + alphabet)}
    assert len(vocabulary) <= VOCABULARY
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(control)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", extra_special_tokens=dict(named), model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class Ids:
    """Token ids, by token: what a config needs."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __getitem__(self, token):
        found = self.tokens.convert_tokens_to_ids(token)
        assert found not in (None, 3), token
        return found


# Pictures


def picture(number, size):
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


def clip(number, frames):
    return np.random.default_rng(100 + number).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


class Videos:
    """Stands for a video processor: frames [N, T, C, H, W], or with a `patch` size those of Qwen, [P, C * 2 * p * p].

    All frames are kept, resized to `size`, and are two per second.
    """

    def __init__(self, patch=None, size=(32, 32)):
        self.patch, self.size, self.merge_size, self.temporal_patch_size = patch, size, 2, 2

    def __call__(self, videos, **kwargs):
        pixels = [torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1 for video in videos]
        pixels = [torch.nn.functional.interpolate(video, self.size, mode="bilinear") for video in pixels]
        metadata = [VideoMetadata(len(v), fps=2.0, frames_indices=list(range(len(v)))) for v in pixels]
        if self.patch is None:
            return BatchFeature({"pixel_values_videos": torch.stack(pixels), "video_metadata": metadata})
        grids = [(len(v) // 2, v.shape[2] // self.patch, v.shape[3] // self.patch) for v in pixels]
        patches = []
        for video, (t, h, w) in zip(pixels, grids, strict=True):
            blocks = video.reshape(t, 2, 3, h // 2, 2, self.patch, w // 2, 2, self.patch)
            patches.append(blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1))
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(patches),
                "video_grid_thw": torch.tensor(grids),
                "video_metadata": metadata,
            }
        )


def untyped(processor):
    """The processor class less the check of its parts: without torchvision there is no class to check videos with."""
    return type(processor.__name__, (processor,), {"check_argument_for_proper_class": lambda *_: None})


# Rows


def build(family, config, *, std=0.2, change=None):
    torch.manual_seed(0)
    model = family(config)
    if change:
        change(model)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("sdpa")
    return model


def prompts_of(image, video=None, sizes=SIZES, frames=FRAMES):
    """(text, images, videos) of the four samples; `image` and `video`: their placeholders in the text."""
    found, images, videos = [], 0, 0
    for text in VIDEO_PROMPTS if video else IMAGE_PROMPTS:
        counts = text.count("{i}"), text.count("{v}")
        numbers = range(images, images + counts[0])
        found.append(
            (
                text.format(i=image, v=video),
                [picture(number, sizes[number % len(sizes)]) for number in numbers],
                [clip(number, frames[number % len(frames)]) for number in range(videos, videos + counts[1])],
            )
        )
        images, videos = images + counts[0], videos + counts[1]
    return found


def process(processor, prompts, **options):
    """Each prompt alone through the processor."""
    return [
        dict(
            processor(
                text=[text], return_tensors="pt", **options,
                **({"images": [images]} if images else {}), **({"videos": videos} if videos else {}),
            )
        )
        for text, images, videos in prompts
    ]  # fmt: skip


def collate(samples):
    """Tokens padded on the left with zeros; pixels one after another, padded with zeros where their shapes differ."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch = {}
    for name in names:
        parts = [sample[name] for sample in samples if name in sample]
        if name in PADDED:
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]
        else:
            shape = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
            missing = lambda part: [n for d in reversed(range(len(shape))) for n in (0, shape[d] - part.shape[d + 1])]  # noqa: E731, B023
            parts = [torch.nn.functional.pad(part, missing(part)) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def row(
    name, family, config, processor, *, image, special=(), named=None, video=None, sizes=SIZES, frames=FRAMES, **options
):
    """`config` of `Ids`, `processor` of the tokenizer; `image`, `video`: placeholders in the text."""
    tokens = lambda: tokenizer(special, named or {})  # noqa: E731
    built = functools.cache(lambda: processor(tokens()))
    return Row(
        name=name,
        make_model=lambda: build(family, config(Ids(tokens())), **options),
        samples=lambda model: process(built(), prompts_of(image, video, sizes, frames)),
        collate=collate,
        processor=built,
    )


TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


# LLaVA and what came of it


def llava_config(config, text, ids, **more):
    return config(
        text_config=text, vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=ids["<image>"],
        vision_feature_layer=more.pop("vision_feature_layer", -2), **more,
    )  # fmt: skip


def clip_images():
    return tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)


def llava_processor(tokens):
    return tf.LlavaProcessor(clip_images(), tokens, 8, "default", num_additional_image_tokens=1)


def llava_next_processor(tokens):
    images = tf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return tf.LlavaNextProcessor(images, tokens, 8, "default", num_additional_image_tokens=1)


def llava_next_video_processor(tokens):
    images = tf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return untyped(tf.LlavaNextVideoProcessor)(
        Videos(), images, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_onevision_processor(tokens):
    images = tf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return untyped(tf.LlavaOnevisionProcessor)(
        images, tokens, Videos(), num_image_tokens=16, vision_feature_select_strategy="full"
    )


LLAVA = {"image": "<image>", "named": {"image_token": "<image>"}}
LLAVA_VIDEO = {
    "image": "<image>",
    "video": "<video>",
    "named": {"image_token": "<image>", "video_token": "<video>"},
}
LLAVA_ROWS = [
    row(
        "llava", tf.LlavaForConditionalGeneration,
        lambda ids: llava_config(tf.LlavaConfig, tf.LlamaConfig(**TEXT), ids, image_seq_length=16),
        llava_processor, **LLAVA,
    ),
    row(
        "llava-qwen3", tf.LlavaForConditionalGeneration,
        lambda ids: llava_config(tf.LlavaConfig, tf.Qwen3Config(**TEXT, head_dim=16), ids, image_seq_length=16),
        llava_processor, **LLAVA,
    ),
    row(
        "llava_next", tf.LlavaNextForConditionalGeneration,
        lambda ids: llava_config(tf.LlavaNextConfig, tf.LlamaConfig(**TEXT), ids, image_grid_pinpoints=PINPOINTS),
        llava_next_processor, **LLAVA,
    ),
    row(
        "llava_next-mistral", tf.LlavaNextForConditionalGeneration,
        lambda ids: llava_config(
            tf.LlavaNextConfig, tf.MistralConfig(**TEXT, sliding_window=None), ids, image_grid_pinpoints=PINPOINTS
        ),
        llava_next_processor, **LLAVA,
    ),
    row(
        "llava_next_video", tf.LlavaNextVideoForConditionalGeneration,
        lambda ids: llava_config(
            tf.LlavaNextVideoConfig, tf.LlamaConfig(**TEXT), ids, image_grid_pinpoints=PINPOINTS,
            video_token_index=ids["<video>"],
        ),
        llava_next_video_processor, **LLAVA_VIDEO,
    ),
    *(
        row(
            name, tf.LlavaOnevisionForConditionalGeneration,
            lambda ids: tf.LlavaOnevisionConfig(
                text_config=tf.Qwen2Config(**TEXT),
                vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
                image_token_index=ids["<image>"], video_token_index=ids["<video>"], image_grid_pinpoints=PINPOINTS,
            ),
            llava_onevision_processor, **{**LLAVA_VIDEO, "video": video},
        )
        for name, video in [("llava_onevision", None), ("llava_onevision-video", "<video>")]
    ),
    row(
        "vipllava", tf.VipLlavaForConditionalGeneration,
        lambda ids: llava_config(
            tf.VipLlavaConfig, tf.LlamaConfig(**TEXT), ids, image_seq_length=16, vision_feature_layers=[-2, -1, 1]
        ),
        llava_processor, **LLAVA,
    ),
]  # fmt: skip


# Qwen


def qwen_vision(**more):
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "initializer_range": 0.2, **more,
    }  # fmt: skip


def qwen_config(config, ids, vision, **text):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **text.pop("rope", {})}
    return config(
        text_config={**TEXT, "rope_parameters": rope, **text}, vision_config=vision,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def qwen_processor(processor, tokens):
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 16 * 32, "longest_edge": 64 * 32})
    return untyped(processor)(images, tokens, Videos(patch=4))


def qwen_rows(name, family, config, processor, *, video=True):
    both = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "special": ["<|vision_start|>", "<|vision_end|>"],
        "named": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    }
    processor = functools.partial(qwen_processor, processor)
    rows = [row(name, family, config, processor, **both)]
    if video:  # Qwen3-VL's processor writes the start and end around every frame, inside those of the prompt
        video = "<|vision_start|><|video_pad|><|vision_end|>"
        rows.append(row(f"{name}-video", family, config, processor, video=video, frames=[4, 2, 6], **both))
    return rows


QWEN3_ROPE = {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
QWEN_ROWS = [
    *qwen_rows(
        "qwen2_5_vl", tf.Qwen2_5_VLForConditionalGeneration,
        lambda ids: qwen_config(
            tf.Qwen2_5_VLConfig, ids, qwen_vision(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
        ),
        tf.Qwen2_5_VLProcessor,
    ),
    *qwen_rows(
        "qwen3_vl", tf.Qwen3VLForConditionalGeneration,
        lambda ids: qwen_config(
            tf.Qwen3VLConfig, ids, qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            head_dim=16, rope=QWEN3_ROPE,
        ),
        tf.Qwen3VLProcessor,
    ),
]  # fmt: skip


# InternVL, Idefics3, Gemma3


def internvl_processor(tokens):
    images = tf.GotOcr2ImageProcessorPil(size={"height": 48, "width": 48}, crop_to_patches=True, max_patches=2)
    return untyped(tf.InternVLProcessor)(images, tokens, Videos(size=(48, 48)), image_seq_length=9)


def internvl_config(ids):
    return tf.InternVLConfig(
        text_config=tf.Qwen2Config(**TEXT), vision_config=tf.InternVLVisionConfig(**{**VISION, "image_size": 48}),
        image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=9,
    )  # fmt: skip


INTERNVL = {
    "image": "<IMG_CONTEXT>",
    "named": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
INTERNVL_ROWS = [
    row(
        "internvl" if not video else "internvl-video", tf.InternVLForConditionalGeneration, internvl_config,
        internvl_processor, video=video, **INTERNVL,
    )
    for video in (None, "<video>")
]  # fmt: skip


def idefics3_config(config, ids):
    return config(
        text_config=tf.LlamaConfig(**TEXT), vision_config=VISION, scale_factor=2, image_token_id=ids["<image>"],
        pad_token_id=0,
    )  # fmt: skip


def idefics3_processor(tokens):
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return tf.Idefics3Processor(images, tokens, image_seq_len=4)


IDEFICS3 = {
    "image": "<image>",
    "special": [
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
        *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    ],
}  # fmt: skip
IDEFICS3_ROWS = [
    row(
        "idefics3", tf.Idefics3ForConditionalGeneration, lambda ids: idefics3_config(tf.Idefics3Config, ids),
        idefics3_processor, **IDEFICS3,
    ),
]  # fmt: skip


GEMMA_LAYERS = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"]


def gemma3_config(ids):
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "layer_types": GEMMA_LAYERS}
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**text),
        vision_config=tf.SiglipVisionConfig(**{**VISION, "vision_use_head": False}),
        mm_tokens_per_image=16, image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"], tie_word_embeddings=False,
    )  # fmt: skip


def gemma3_processor(tokens):
    return tf.Gemma3Processor(tf.Gemma3ImageProcessorPil(size=SQUARE), tokens, image_seq_length=16)


GEMMA3_ROWS = [
    row(
        "gemma3", tf.Gemma3ForConditionalGeneration, gemma3_config, gemma3_processor, image="<start_of_image>",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
]  # fmt: skip


ROWS: list[Row] = [*LLAVA_ROWS, *QWEN_ROWS, *INTERNVL_ROWS, *IDEFICS3_ROWS, *GEMMA3_ROWS]
