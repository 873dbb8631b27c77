"""Random models: published architectures at full size with random weights, to measure speed without a checkpoint.

Configs are written out, nothing is downloaded. tests/helpers/full_sizes.py says where each was read, and its tests
compare them with the published figures. Answers mean nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A published model's architecture, and an image for it.

    Attributes:
        hub: the checkpoint whose sizes these are.
        architecture: name of its transformers class.
        config: makes its config.
        side: height and width of the image, in pixels.
        visual_tokens: of that image.
        pixels: makes what the model takes for one image, of noise.
    """

    hub: str
    architecture: str
    config: Callable[[], Any]
    side: int
    visual_tokens: int
    pixels: Callable[[], dict[str, torch.Tensor]]


def build(name: str, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Any:
    """Build a model of random weights, holding no more memory than its weights take.

    Args:
        name: a key of RANDOM_MODELS.
        dtype: of the weights.
        device: of the weights.

    Returns:
        The model, in eval mode. Its weights are one block of normal values over and over, which costs the time that
        writing them takes; scaled so that hidden states stay finite.

    Raises:
        ValueError: no random model has that name.
    """
    import transformers
    from transformers.initialization import no_init_weights

    row = get_model_row(name)
    architecture = getattr(transformers, row.architecture, None)
    if architecture is None:
        from fitprune.families import llava_hr

        architecture = getattr(llava_hr, row.architecture)
    with torch.device(device), no_init_weights():
        model = architecture._from_config(row.config(), dtype=dtype)
    block = torch.randn(2**22 - 1, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms and biases
                parameter.fill_(1.0 if parameter.ndim else 0.0)
                continue
            flat = parameter.view(-1)
            whole = len(flat) // len(block) * len(block)
            flat[:whole].view(-1, len(block)).copy_(block.expand(whole // len(block), -1))
            flat[whole:] = block[: len(flat) - whole]
    model.tie_weights()
    model.name_or_path = f"{name} (random weights)"
    return model.eval()


def make_inputs(
    name: str, model: Any, *, text_tokens: int = 64, text_before: int = 35, batch: int = 1
) -> dict[str, Any]:
    """Make a prompt of one image of noise among random text, for each row of a batch.

    Args:
        name: a key of RANDOM_MODELS.
        model: what `build` made of it.
        text_tokens: text tokens of the prompt.
        text_before: how many of them stand before the image; fewer where `text_tokens` leaves no question after it.
        batch: rows, all the same.

    Returns:
        What the model takes, on its device; `visual_tokens + text_tokens` columns.
    """
    row, token = get_model_row(name), model.config.image_token_id
    if text_tokens < 1:
        raise ValueError(f"text_tokens={text_tokens}: must be at least 1, the question after the image")
    before = min(text_before, text_tokens - 1)
    text = torch.randint(3, 30_000, (text_tokens,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([text[:before], torch.full((row.visual_tokens,), token), text[before:]])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **row.pixels()}
    if "mm_token_type_ids" in _forward_names(model):
        inputs["mm_token_type_ids"] = (ids == token).long()[None]
    if "token_type_ids" in _forward_names(model):
        inputs["token_type_ids"] = (ids == token).long()[None]
    return {
        key: value.repeat(batch, *[1] * (value.ndim - 1)).to(
            model.device, model.dtype if value.is_floating_point() else None
        )
        for key, value in inputs.items()
    }


def get_model_row(name: str) -> RandomModel:
    """Look a random model up.

    Args:
        name: a key of RANDOM_MODELS.

    Raises:
        ValueError: none has that name.
    """
    if name not in RANDOM_MODELS:
        raise ValueError(f"random model {name!r}: must be one of {', '.join(RANDOM_MODELS)}")
    return RANDOM_MODELS[name]


def _forward_names(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _noise(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768, vocab_size=32000,
    )  # fmt: skip


def _vicuna_7b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip


def _llava(text: LlamaConfig) -> LlavaConfig:
    return LlavaConfig(
        text_config=text, vision_config=_clip(), image_token_index=32000, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def _llava_13b() -> LlavaConfig:
    return _llava(
        LlamaConfig(
            hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=40, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
        )
    )  # fmt: skip


def _llava_next(text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=text, vision_config=_clip(), image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )  # fmt: skip


def _llava_next_mistral() -> LlavaNextConfig:
    return _llava_next(
        MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32064, max_position_embeddings=32768, rms_norm_eps=1e-5,
            sliding_window=None, rope_theta=1000000.0,
        )
    )  # fmt: skip


def _qwen2_7b(vocab: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=vocab, use_sliding_window=False, rope_theta=1000000.0, tie_word_embeddings=False,
    )  # fmt: skip


def _llava_onevision() -> LlavaOnevisionConfig:
    tower = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    return LlavaOnevisionConfig(text_config=_qwen2_7b(152128), vision_config=tower)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False, "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen3_vl() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie_word_embeddings=False,
    )  # fmt: skip


def _internvl3() -> InternVLConfig:
    tower = InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448,
        patch_size=14, attention_bias=True, use_qk_norm=False, norm_type="layer_norm",
    )  # fmt: skip
    # The class ties the embeddings by default; this checkpoint has a head of its own.
    return InternVLConfig(text_config=_qwen2_7b(151674), vision_config=tower, tie_word_embeddings=False)


def _gemma3() -> Gemma3Config:
    return Gemma3Config(
        text_config={
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
        },
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=256,
    )  # fmt: skip


def _llava_hr() -> Any:
    from fitprune.families.llava_hr import LlavaHrConfig

    return LlavaHrConfig()


def _crops(count: int, side: int, image: int | None = None) -> Callable[[], dict[str, torch.Tensor]]:
    """One image as `count` crops; models that cut it up themselves take its size too."""

    def pixels() -> dict[str, torch.Tensor]:
        if image is None:
            return {"pixel_values": _noise(count, 3, side, side)}
        return {"pixel_values": _noise(1, count, 3, side, side), "image_sizes": torch.tensor([[image, image]])}

    return pixels


def _patches(side: int, patch: int) -> Callable[[], dict[str, torch.Tensor]]:
    """One image as a grid of patches, of two frames each."""
    grid = side // patch
    return lambda: {
        "pixel_values": _noise(grid * grid, 2 * 3 * patch * patch),
        "image_grid_thw": torch.tensor([[1, grid, grid]]),
    }


_LLAVA, _NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
_NEXT_TOKENS = 24 * 24 + 48 * (48 + 1)  # the whole image, and 48 rows of 48 and a newline
RANDOM_MODELS = {
    "llava-1.5-7b": RandomModel(
        "llava-hf/llava-1.5-7b-hf", _LLAVA, lambda: _llava(_vicuna_7b()), 336, 24 * 24, _crops(1, 336),
    ),
    "llava-1.5-13b": RandomModel("llava-hf/llava-1.5-13b-hf", _LLAVA, _llava_13b, 336, 24 * 24, _crops(1, 336)),
    "llava-next-7b": RandomModel(
        "llava-hf/llava-v1.6-vicuna-7b-hf", _NEXT, lambda: _llava_next(_vicuna_7b()), 672, _NEXT_TOKENS,
        _crops(5, 336, 672),
    ),
    "llava-next-mistral-7b": RandomModel(
        "llava-hf/llava-v1.6-mistral-7b-hf", _NEXT, _llava_next_mistral, 672, _NEXT_TOKENS, _crops(5, 336, 672),
    ),
    "llava-onevision-7b": RandomModel(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "LlavaOnevisionForConditionalGeneration", _llava_onevision,
        768, 27 * 27 + 54 * (54 + 1), _crops(5, 384, 768),
    ),
    "llava-hr-7b": RandomModel(
        "favor123/llava-hr-7b-sft-1024", "LlavaHrForConditionalGeneration", _llava_hr, 1024, 1024, _crops(1, 1024),
    ),
    "qwen2.5-vl-7b": RandomModel(
        "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl,
        1008, 36 * 36, _patches(1008, 14),
    ),
    "qwen3-vl-8b": RandomModel(
        "Qwen/Qwen3-VL-8B-Instruct", "Qwen3VLForConditionalGeneration", _qwen3_vl, 1024, 32 * 32, _patches(1024, 16),
    ),
    "internvl3-8b": RandomModel(
        "OpenGVLab/InternVL3-8B-hf", "InternVLForConditionalGeneration", _internvl3,
        896, (4 + 1) * 16 * 16, _crops(5, 448),
    ),
    "gemma3-4b": RandomModel(
        "google/gemma-3-4b-it", "Gemma3ForConditionalGeneration", _gemma3, 896, 16 * 16, _crops(1, 896),
    ),
}  # fmt: skip
