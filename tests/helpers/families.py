"""A tiny random model of each family from its real config class, and inputs for it from its real processor.

The tokenizer is a byte-level one without merges (every character a token) that has the family's special tokens. Image
processors are the PIL ones; video processors need torchvision, so `Videos` makes their tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as tf
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.video_utils import VideoMetadata

from fitprune.families import llava_hr

LAYERS = 6
VOCABULARY = 320
IMAGE_PROMPTS = ["look: {i} what?", "is {i} as {i}? say it", "{i}tell me", "one more talk {i}and so?"]
VIDEO_PROMPTS = ["clip {v} what?", "is {i} in {v}? say it", "{v}then {v}tell me", "no clip, {i} or {i} and so?"]
SIZES = [(32, 32), (60, 30), (31, 62), (48, 40), (24, 64), (64, 64)]  # (height, width) of an image, in turns
FRAMES = [4, 4, 4]  # of a video, in turns: where the videos of a batch are one tensor
PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make_model: Callable[[], tf.PreTrainedModel]
    samples: Callable[[tf.PreTrainedModel], list[dict]]
    collate: Callable[[list[dict]], dict]
    processor: Callable[[], Any] | None = None
    image: str = ""  # its placeholder in a prompt


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

    num_frames = fps = None  # what SmolVLM's chat template asks for

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


def build(family, config, *, std=0.2, change=None, attention="sdpa"):
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
    model.set_attn_implementation(attention)
    return model


def prompts_of(texts, image, video, frames):
    """(text, images, videos) of the four samples; `image` and `video`: their placeholders in the text."""
    found, images, videos = [], 0, 0
    for text in texts:
        counts = text.count("{i}"), text.count("{v}")
        numbers = range(images, images + counts[0])
        found.append(
            (
                text.format(i=image, v=video),
                [picture(number, SIZES[number % len(SIZES)]) for number in numbers],
                [clip(number, frames[number % len(frames)]) for number in range(videos, videos + counts[1])],
            )
        )
        images, videos = images + counts[0], videos + counts[1]
    return found


def process(processor, prompts, *, nested=True, **options):
    """Each prompt alone through the processor."""
    with warnings.catch_warnings():  # some processors turn tensors to numpy in a way that numpy 2 warns of
        warnings.simplefilter("ignore", DeprecationWarning)
        return _processed(processor, prompts, nested, options)


def _processed(processor, prompts, nested, options):
    return [
        dict(
            processor(
                text=[text], return_tensors="pt", **options,
                **({"images": [images] if nested else images} if images else {}),
                **({"videos": videos} if videos else {}),
            )
        )
        for text, images, videos in prompts
    ]  # fmt: skip


def missing(part, shape):
    """What `torch.nn.functional.pad` has to add at the end of each axis but the first, the last axis first."""
    return [n for d in reversed(range(len(shape))) for n in (0, shape[d] - part.shape[d + 1])]


def collate(samples):
    """Tokens padded on the left; pixels one after another, padded with zeros on the right where their shapes differ."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch = {}
    for name in names:
        parts = [sample[name] for sample in samples if name in sample]
        if name in PADDING:
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0), value=PADDING[name]) for part in parts]
        else:
            shape = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
            parts = [torch.nn.functional.pad(part, missing(part, shape)) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def row(
    name, family, config, processor, *, image, video=None, special=(), named=None, prompts=None, frames=FRAMES,
    call=None, real=True, **options,
):  # fmt: skip
    """`config` of `Ids`, `processor` of the tokenizer; `image`, `video`: placeholders; `call`: for the processor."""
    prompts = prompts or (VIDEO_PROMPTS if video else IMAGE_PROMPTS)

    @functools.cache
    def parts():
        tokens = tokenizer(special, named or {})
        return Ids(tokens), processor(tokens)

    return Row(
        name=name,
        make_model=lambda: build(family, config(parts()[0]), **options),
        samples=lambda model: process(parts()[1], prompts_of(prompts, image, video, frames), **(call or {})),
        collate=collate,
        processor=(lambda: parts()[1]) if real else None,
        image=image,
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


def video_llava_processor(tokens):
    images = tf.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    return untyped(tf.VideoLlavaProcessor)(images, Videos(), tokens, patch_size=8)


def llava_hr_config(ids):
    vision = {key: size for key, size in VISION.items() if key not in ("image_size", "patch_size", "num_hidden_layers")}
    return llava_hr.LlavaHrConfig(
        text_config=tf.LlamaConfig(**TEXT), image_token_index=ids["<image>"],
        vision_config=llava_hr.LlavaHrVisionConfig(
            **vision, num_hidden_layers=4, image_size=16, patch_size=4, input_image_size=128,
            convnext_depths=[1, 1, 2, 1], convnext_hidden_sizes=[8, 8, 16, 24],
        ),
    )  # fmt: skip


def llava_hr_processor(tokens):
    return llava_hr.make_processor(llava_hr_config(Ids(tokens)), tokens)


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
    # Text models that a LLaVA may have: norms after a layer's parts, windows, experts, sinks, an MLP without gate.
    *(
        row(
            f"llava-{name}", tf.LlavaForConditionalGeneration,
            lambda ids, text=text: llava_config(tf.LlavaConfig, text(), ids, image_seq_length=16),
            llava_processor, attention=attention, **LLAVA,
        )
        for name, text, attention in [
            ("mistral-window", lambda: tf.MistralConfig(**TEXT, sliding_window=12), "sdpa"),
            ("exaone4", lambda: tf.Exaone4Config(**TEXT, sliding_window=12, sliding_window_pattern=3), "sdpa"),
            ("olmo2", lambda: tf.Olmo2Config(**TEXT), "sdpa"),
            ("gpt_oss", lambda: tf.GptOssConfig(
                **TEXT, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=12
            ), "eager"),
            ("mixtral", lambda: tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2), "sdpa"),
            ("starcoder2", lambda: tf.Starcoder2Config(**TEXT, use_bias=True, sliding_window=None), "sdpa"),
        ]
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
    row("llava_hr", llava_hr.LlavaHrForConditionalGeneration, llava_hr_config, llava_hr_processor, **LLAVA),
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
    row(
        "video_llava", tf.VideoLlavaForConditionalGeneration,
        lambda ids: llava_config(
            tf.VideoLlavaConfig, tf.LlamaConfig(**TEXT), ids, image_seq_length=16, video_seq_length=68,
            video_token_index=ids["<video>"],
        ),
        video_llava_processor, call={"return_legacy_image_output": False}, **LLAVA_VIDEO,
    ),
    # The real tower is one of timm, which needs torchvision. ResNet too gives last_hidden_state [B, C, H, W]; and as
    # timm's it is to take any attention, having none.
    row(
        "fast_vlm", tf.FastVlmForConditionalGeneration,
        lambda ids: tf.FastVlmConfig(
            text_config=tf.Qwen2Config(**TEXT),
            vision_config=tf.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", hidden_size=32
            ),
            image_token_index=ids["<image>"],
        ),
        lambda tokens: tf.LlavaProcessor(clip_images(), tokens, 8, "full"),
        change=lambda model: setattr(model.model.vision_tower, "_supports_sdpa", True), **LLAVA,
    ),
    row(
        "deepseek_vl", tf.DeepseekVLForConditionalGeneration,
        lambda ids: tf.DeepseekVLConfig(
            text_config=tf.LlamaConfig(**TEXT), vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
            image_token_id=ids["<image_placeholder>"], tie_word_embeddings=False,
        ),
        lambda tokens: tf.DeepseekVLProcessor(
            tf.DeepseekVLImageProcessorPil(size=SQUARE, min_size=8), tokens, num_image_tokens=16
        ),
        image="<image_placeholder>", named={"image_token": "<image_placeholder>"},
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


def qwen_rows(name, family, config, processor, *, video=True, **options):
    both = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "special": ["<|vision_start|>", "<|vision_end|>"],
        "named": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        **options,
    }
    processor = functools.partial(qwen_processor, processor)
    rows = [row(name, family, config, processor, **both)]
    if video:  # Qwen3-VL's processor writes the start and end around every frame, inside those of the prompt
        video = "<|vision_start|><|video_pad|><|vision_end|>"
        rows.append(row(f"{name}-video", family, config, processor, video=video, frames=[4, 2, 6], **both))
    return rows


QWEN3_ROPE = {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
HYBRID = ["linear_attention", "linear_attention", "full_attention"] * 2
QWEN_ROWS = [
    *qwen_rows(
        "qwen2_vl", tf.Qwen2VLForConditionalGeneration,
        lambda ids: qwen_config(
            tf.Qwen2VLConfig, ids,
            {
                "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                "initializer_range": 0.2,
            },
        ),
        tf.Qwen2VLProcessor,
    ),
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
    *qwen_rows(
        "qwen3_vl_moe", tf.Qwen3VLMoeForConditionalGeneration,
        lambda ids: qwen_config(
            tf.Qwen3VLMoeConfig, ids, qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            head_dim=16, rope=QWEN3_ROPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        ),
        tf.Qwen3VLProcessor, video=False,
    ),
    *qwen_rows(
        "qwen3_5", tf.Qwen3_5ForConditionalGeneration,
        lambda ids: qwen_config(
            tf.Qwen3_5Config, ids, qwen_vision(num_position_embeddings=64), head_dim=16, layer_types=HYBRID,
            rope={"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        tf.Qwen3VLProcessor, video=False, std=0.15,  # at 0.2 rounding errors grow to 1e-4
    ),
]  # fmt: skip


def glm4v_config(ids):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    return tf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=qwen_vision(image_size=32, intermediate_size=64),
        image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"], image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"], video_end_token_id=ids["<|end_of_video|>"],
    )  # fmt: skip


def glm4v_processor(tokens):
    images = tf.Glm4vImageProcessorPil(patch_size=4, size={"shortest_edge": 16 * 64, "longest_edge": 64 * 64})
    return untyped(tf.Glm4vProcessor)(images, tokens, Videos(patch=4))


GLM = {
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "special": ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"],
    "named": {"image_token": "<|image|>", "video_token": "<|video|>"},
}
GLM_ROWS = [
    row("glm4v", tf.Glm4vForConditionalGeneration, glm4v_config, glm4v_processor, **GLM),
    # Frames of videos are image tokens, so that the model refuses a call with images and videos.
    row(
        "glm4v-video", tf.Glm4vForConditionalGeneration, glm4v_config, glm4v_processor, frames=[4, 2, 6],
        video="<|begin_of_video|><|video|><|end_of_video|>",
        prompts=[text.replace("{i}", "{v}") for text in VIDEO_PROMPTS], **GLM,
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


def smolvlm_processor(tokens):
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # required, for the prompts of videos only
    images = tf.SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return untyped(tf.SmolVLMProcessor)(images, tokens, Videos(), image_seq_len=4)


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
    row(
        "smolvlm", tf.SmolVLMForConditionalGeneration, lambda ids: idefics3_config(tf.SmolVLMConfig, ids),
        smolvlm_processor, **IDEFICS3,
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


def paligemma_config(text, ids):
    """Prompts attend both ways and all the way, text too: the windows of Gemma 2 count from the first new token on."""
    return tf.PaliGemmaConfig(
        text_config=text, vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=64),
        image_token_index=ids["<image>"], vocab_size=VOCABULARY, projection_dim=64, hidden_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip


def paligemma_processor(tokens):
    images = tf.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(images, tokens)


def gemma2_text():
    return tf.Gemma2Config(
        **TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=GEMMA_LAYERS,
        attn_logit_softcapping=5.0, final_logit_softcapping=30.0,
    )  # fmt: skip


GEMMA_ROWS = [
    row(
        "gemma3", tf.Gemma3ForConditionalGeneration, gemma3_config, gemma3_processor, image="<start_of_image>",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    row(
        "paligemma", tf.PaliGemmaForConditionalGeneration,
        lambda ids: paligemma_config(tf.GemmaConfig(**TEXT, head_dim=16), ids), paligemma_processor,
        image="<image>", named={"image_token": "<image>"},
    ),
    row(
        "paligemma2", tf.PaliGemmaForConditionalGeneration, lambda ids: paligemma_config(gemma2_text(), ids),
        paligemma_processor, image="<image>", named={"image_token": "<image>"},
        attention={"text_config": "eager", "vision_config": "sdpa"},  # sdpa cannot cap the scores
    ),
]  # fmt: skip


# Cohere, Mistral, LFM2, GOT-OCR2


def tiles(**more):
    return tf.GotOcr2ImageProcessorPil(
        size={"height": 48, "width": 48}, crop_to_patches=True, max_patches=2, **more
    )  # one tile, or two and the whole


def cohere_text():
    return tf.Cohere2Config(**TEXT, sliding_window=12, layer_types=GEMMA_LAYERS, logit_scale=0.25)


def cohere_vision():
    return tf.SiglipVisionConfig(**{**VISION, "image_size": 48}, vision_use_head=False)


def aya_config(ids):
    return tf.AyaVisionConfig(
        text_config=cohere_text(), vision_config=cohere_vision(), image_token_index=ids["<|IMG_PATCH|>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def cohere2_config(ids):
    return tf.Cohere2VisionConfig(
        text_config=cohere_text(), vision_config=cohere_vision(), image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=96, tie_word_embeddings=False,
    )  # fmt: skip


def cohere2_processor(tokens):
    images = tiles()  # its own image processor needs torchvision; it makes the same tiles
    images.patch_size = 3
    return tf.Cohere2VisionProcessor(images, tokens)


def mistral3_config(ids):
    return tf.Mistral3Config(
        text_config=tf.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        vision_config=tf.PixtralVisionConfig(**{**VISION, "patch_size": 4, "image_size": 64}),
        image_token_index=ids["[IMG]"], spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip


def mistral3_processor(tokens):
    """What PixtralProcessor does: its module imports torchvision."""
    images = tf.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})

    def process(text, images_, return_tensors):
        pixels = images(images_, return_tensors=return_tensors)
        for height, width in pixels["image_sizes"].tolist():
            rows = ["[IMG]" * (width // 8)] * (height // 8)
            text = [text[0].replace("<placeholder>", "[IMG_BREAK]".join(rows) + "[IMG_END]", 1)]
        return {**tokens(text, return_tensors=return_tensors), **pixels}

    return lambda text, images, return_tensors: process(text, images[0], return_tensors)


class Lfm2Images:
    """Stands for the image processor of LFM2-VL, which needs torchvision: one tile, or two or four and a thumbnail."""

    tile_size, encoder_patch_size, downsample_factor, use_thumbnail = 32, 4, 2, True
    fetch_images = staticmethod(lambda images: images)

    def __call__(self, images, return_tensors, **kwargs):
        pixels, masks, shapes, rows, columns, sizes = [], [], [], [], [], []

        def add(image, height, width):
            image = np.asarray(image.resize((width, height)), np.float32).reshape(height // 4, 4, width // 4, 4, 3)
            patches = torch.from_numpy(image / 127.5 - 1).permute(0, 2, 1, 3, 4).reshape(-1, 48)
            missing = 64 - len(patches)
            pixels.append(torch.nn.functional.pad(patches, (0, 0, 0, missing)))
            masks.append(torch.arange(64).lt(len(patches)).int())
            shapes.append([height // 4, width // 4])

        for image in [image for sample in images for image in sample]:
            height, width = (max(16, min(32, side // 8 * 8)) for side in (image.height, image.width))
            down, across = (1 + (side > 40) for side in (image.height, image.width))
            whole = image.resize((across * 32, down * 32))
            for corner in itertools.product(range(0, down * 32, 32), range(0, across * 32, 32)):
                if down * across > 1:
                    add(whole.crop((corner[1], corner[0], corner[1] + 32, corner[0] + 32)), 32, 32)
            add(image, height, width)
            rows, columns, sizes = [*rows, down], [*columns, across], [*sizes, [height, width]]
        return {
            "pixel_values": torch.stack(pixels), "pixel_attention_mask": torch.stack(masks),
            "spatial_shapes": torch.tensor(shapes), "image_rows": rows, "image_cols": columns, "image_sizes": sizes,
        }  # fmt: skip


def lfm2_config(ids):
    text = {**TEXT, "layer_types": ["conv", "conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    return tf.Lfm2VlConfig(
        text_config=tf.Lfm2Config(**text),
        vision_config=tf.Siglip2VisionConfig(**{**vision, "patch_size": 4, "num_patches": 64}, vision_use_head=False),
        image_token_id=ids["<image>"], projector_hidden_size=48, downsample_factor=2, tie_word_embeddings=False,
    )  # fmt: skip


def got_config(ids):
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 48,
        "image_size": 64, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "initializer_range": 0.2,
    }  # fmt: skip
    return tf.GotOcr2Config(
        text_config=tf.Qwen2Config(**TEXT), vision_config=vision, image_token_index=ids["<imgpad>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def got_processor(tokens):
    return tf.GotOcr2Processor(tf.GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}), tokens)


OTHER_ROWS = [
    row(
        "aya_vision", tf.AyaVisionForConditionalGeneration, aya_config,
        lambda tokens: tf.AyaVisionProcessor(tiles(), tokens, patch_size=8, img_size=48, downsample_factor=2),
        image="<image>",
        special=[
            "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", "TILE_1", "TILE_2",
        ],
    ),
    row(
        "cohere2_vision", tf.Cohere2VisionForConditionalGeneration, cohere2_config, cohere2_processor,
        image="<|IMG_PATCH|>",
        named={
            "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    row(
        "mistral3", tf.Mistral3ForConditionalGeneration, mistral3_config, mistral3_processor, real=False,
        image="<placeholder>", special=["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    ),
    row(
        "lfm2_vl", tf.Lfm2VlForConditionalGeneration, lfm2_config,
        lambda tokens: untyped(tf.Lfm2VlProcessor)(Lfm2Images(), tokens),
        image="<image>",
        special=[
            "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
            *(f"<|img_row_{i}_col_{j}|>" for i in (1, 2) for j in (1, 2)),
        ],
        named={"image_token": "<image>"},
    ),
    row(
        "got_ocr2", tf.GotOcr2ForConditionalGeneration, got_config, got_processor, image="<img><imgpad></img>",
        special=["<img>", "</img>", "<imgpad>"],
        call={"nested": False, "num_image_tokens": 16, "crop_to_patches": True, "max_patches": 2},
    ),
]  # fmt: skip


ROWS: list[Row] = [
    *LLAVA_ROWS,
    *QWEN_ROWS,
    *GLM_ROWS,
    *INTERNVL_ROWS,
    *IDEFICS3_ROWS,
    *GEMMA_ROWS,
    *OTHER_ROWS,
]
