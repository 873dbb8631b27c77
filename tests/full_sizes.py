"""Models at full size: their published configs and figures, with sources. Nothing is downloaded; weights are on "meta".

Only what a shape depends on is written out; the rest is left at transformers' defaults. A source is where a figure was
read: a stored copy of the Hub's own page where there is one, else a public copy of the config or another program's
example. What no source was found for is marked "from memory".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
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

from fitprune.flops import DecoderShape

TEXT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class FullSize:
    """A published model.

    Attributes:
        name: as people say it.
        hub: the checkpoint that the figures are of.
        architecture: name of its transformers class.
        config: makes its config from the written-out values.
        config_source: where those values were read.
        decoder: decoder sizes, written out a second time: what must come out.
        parameters: the published total.
        exact: it is published to the last digit.
        parameters_source: where.
        side: height and width of the image, in pixels.
        visual_tokens: of that image.
        made_of: how they come about.
        encoder_inputs: what `get_image_features` is called with for that image; None where it needs real tensors.
    """

    name: str
    hub: str
    architecture: str
    config: Callable[[], Any]
    config_source: str
    decoder: DecoderShape
    parameters: int
    exact: bool
    parameters_source: str
    side: int
    visual_tokens: int
    made_of: str
    encoder_inputs: Callable[[], dict[str, torch.Tensor]] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, text included."""
        return self.visual_tokens + TEXT_TOKENS


def build(entry: FullSize) -> Any:
    """Make the model in bf16 on the meta device: shapes, but no memory."""
    with torch.device("meta"):
        model = getattr(transformers, entry.architecture)(entry.config())
    return model.to(torch.bfloat16).eval()


def prefill(model: Any, tokens: int) -> tuple[int, int]:
    """Run decoder and head over `tokens` embeddings, the head on the last; give FLOPs counted and KV bytes held."""
    text = model.config.text_config
    embeds = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, device="meta")
    cache = DynamicCache(config=text)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)[0]
        model.lm_head(hidden[:, -1:])
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in held)


def hand_flops(shape: DecoderShape, tokens: int) -> int:
    """Count a dense prefill by hand: two per multiply-accumulate, attention over all pairs, head on one position."""
    n, d, q = tokens, shape.hidden, shape.heads * shape.head_dim
    kv, m = shape.kv_heads * shape.head_dim, shape.intermediate
    projections = 2 * n * d * (q + kv + kv + q)
    products = 2 * n * n * q + 2 * n * n * q
    gate_up_down = 3 * 2 * n * d * m
    return shape.layers * (projections + products + gate_up_down) + 2 * d * shape.vocab


def _pixels(*size: int) -> torch.Tensor:
    return torch.empty(*size, dtype=torch.bfloat16, device="meta")


_VICUNA_7B = DecoderShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32064)
_VICUNA_13B = DecoderShape(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40, head_dim=128, vocab=32064)
_MISTRAL_7B = DecoderShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=32064)
_QWEN2_7B = DecoderShape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)


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
    # The class ties the embeddings unless told otherwise; this checkpoint has a head of its own.
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


_NEXT_TOKENS = "24 x 24 of the whole image, and 48 rows of 48 and a newline"


def _next_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(1, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]])}


FULL_SIZES = (
    FullSize(
        name="LLaVA-1.5-7B",
        hub="llava-hf/llava-1.5-7b-hf",
        architecture="LlavaForConditionalGeneration",
        config=lambda: _llava(_vicuna_7b()),
        config_source="copy of config.json in github.com/tung2kg1/AI-Stock-Chart-Analysis (61f63b5), which leaves the "
        "decoder at LlamaConfig's defaults",
        decoder=_VICUNA_7B,
        parameters=7_063_427_072,
        exact=True,
        parameters_source="total_size 14,126,854,144 bytes of fp16 in the same copy's safetensors index",
        side=336,
        visual_tokens=24 * 24,
        made_of="patches of 14, without the class token",
        encoder_inputs=lambda: {"pixel_values": _pixels(1, 3, 336, 336)},
    ),
    FullSize(
        name="LLaVA-1.5-13B",
        hub="llava-hf/llava-1.5-13b-hf",
        architecture="LlavaForConditionalGeneration",
        config=_llava_13b,
        config_source="decoder: config.json of llava-v1.6-vicuna-13b-hf, the same Vicuna-13B-v1.5, in issue "
        "haotian-liu/LLaVA#1378; tower: as the 7B",
        decoder=_VICUNA_13B,
        parameters=13_345_000_000,
        exact=False,
        parameters_source="26.69 GB of fp16 files (4.96 + 4.97 + 4.88 + 4.93 + 4.93 + 2.02) on the Hub's page, rounded "
        "to 0.01 GB each",
        side=336,
        visual_tokens=24 * 24,
        made_of="patches of 14, without the class token",
        encoder_inputs=lambda: {"pixel_values": _pixels(1, 3, 336, 336)},
    ),
    FullSize(
        name="LLaVA-NeXT-7B Vicuna",
        hub="llava-hf/llava-v1.6-vicuna-7b-hf",
        architecture="LlavaNextForConditionalGeneration",
        config=lambda: _llava_next(_vicuna_7b()),
        config_source="transformers' convert_llava_next_weights_to_hf.py (063b32f): lmsys/vicuna-7b-v1.5, vocabulary "
        "resized to 32,064; grid: issue haotian-liu/LLaVA#1378",
        decoder=_VICUNA_7B,
        parameters=7_060_000_000,
        exact=False,
        parameters_source='"7.06B params" on the Hub\'s page of a full fine-tune (gray311/vlm_unlearned_ft_llava_v1.6_'
        "vicuna_7b)",
        side=672,
        visual_tokens=24 * 24 + 48 * (48 + 1),
        made_of=_NEXT_TOKENS,
        encoder_inputs=_next_inputs,
    ),
    FullSize(
        name="LLaVA-NeXT-7B Mistral",
        hub="llava-hf/llava-v1.6-mistral-7b-hf",
        architecture="LlavaNextForConditionalGeneration",
        config=_llava_next_mistral,
        config_source="config.json of mistralai/Mistral-7B-Instruct-v0.2 as copied by huggingface.co/teilomillet/"
        "Merlin-7B-v0.1 (sliding_window null); vocabulary and grid: as the Vicuna model",
        decoder=_MISTRAL_7B,
        parameters=7_570_000_000,
        exact=False,
        parameters_source="15.14 GB of fp16 files (4.92 + 4.92 + 4.92 + 0.38) on the Hub's pages, the third in the "
        "copy TrgTuan10/llava-v1.6-mistral-7b-hf",
        side=672,
        visual_tokens=24 * 24 + 48 * (48 + 1),
        made_of=_NEXT_TOKENS,
        encoder_inputs=_next_inputs,
    ),
    FullSize(
        name="LLaVA-OneVision-7B",
        hub="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        architecture="LlavaOnevisionForConditionalGeneration",
        config=_llava_onevision,
        config_source="transformers' convert_llava_onevision_weights_to_hf.py (01080c6): Qwen2-7B-Instruct, vocabulary "
        "152,064 + 2 padded to 152,128; its sizes: huggingface.co/REILX/llava-Qwen2-7B-Instruct-Chinese-CLIP",
        decoder=dataclasses.replace(_QWEN2_7B, vocab=152128),
        parameters=8_030_000_000,
        exact=False,
        parameters_source='"8.03B params" on the Hub\'s page of a full fine-tune (zixianma/'
        "llava_ov_7b_tune_vision_293k-seq_len_8192-lr_1e-5-ep_2)",
        side=768,
        visual_tokens=27 * 27 + 54 * (54 + 1),
        made_of="27 x 27 of the whole image, and 54 rows of 54 and a newline",
        encoder_inputs=lambda: {
            "pixel_values": _pixels(1, 5, 3, 384, 384),
            "image_sizes": torch.tensor([[768, 768]]),
        },
    ),
    FullSize(
        name="Qwen2.5-VL-7B",
        hub="Qwen/Qwen2.5-VL-7B-Instruct",
        architecture="Qwen2_5_VLForConditionalGeneration",
        config=_qwen2_5_vl,
        config_source="print of the loaded model in github.com/acproject/duorou (docs/qwen2.5vl_graph.md); vocabulary: "
        "issue QwenLM/Qwen3-VL#1973; mrope_section from memory (no shape depends on it)",
        decoder=_QWEN2_7B,
        parameters=8_292_166_656,
        exact=True,
        parameters_source="total_size 16,584,333,312 bytes of bf16 in the safetensors index, and numParameters on "
        "the Hub's pages, both as quoted in public repositories",
        side=1008,
        visual_tokens=36 * 36,
        made_of="patches of 14, merged 2 x 2",
    ),
    FullSize(
        name="Qwen3-VL-8B",
        hub="Qwen/Qwen3-VL-8B-Instruct",
        architecture="Qwen3VLForConditionalGeneration",
        config=_qwen3_vl,
        config_source="config.json of a fine-tune, huggingface.co/Steinate/Cortex; tower: that of the 32B in "
        "huggingface.co/quanliang/F1, but 4,096 wide at its end",
        decoder=DecoderShape(
            layers=36,
            hidden=4096,
            intermediate=12288,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=151936,
            first_prunable=3,
        ),
        parameters=8_767_123_696,
        exact=True,
        parameters_source="safetensors.total of the Hub's API, as quoted in public repositories",
        side=1024,
        visual_tokens=32 * 32,
        made_of="patches of 16, merged 2 x 2",
    ),
    FullSize(
        name="InternVL3-8B",
        hub="OpenGVLab/InternVL3-8B-hf",
        architecture="InternVLForConditionalGeneration",
        config=_internvl3,
        config_source="gitcode.com/Ascend/MindSpeed-MM 2.3.0 examples/internvl3/model_8B.json; tower: defaults of "
        "InternVLVisionConfig, bias from memory (under 0.01% of the parameters)",
        decoder=dataclasses.replace(_QWEN2_7B, vocab=151674),
        parameters=7_945_000_000,
        exact=False,
        parameters_source="15.89 GB of bf16 files (4.88 + 4.99 + 4.93 + 1.09) on the Hub's page",
        side=896,
        visual_tokens=(4 + 1) * 16 * 16,
        made_of="four tiles of 448 and the whole image, 32 x 32 patches each, merged 2 x 2",
        encoder_inputs=lambda: {"pixel_values": _pixels(5, 3, 448, 448)},
    ),
    FullSize(
        name="Gemma3-4B",
        hub="google/gemma-3-4b-it",
        architecture="Gemma3ForConditionalGeneration",
        config=_gemma3,
        config_source="transformers' convert_gemma3_weights.py (0d7e95d): variant gemma3_4b; vocabulary 262,144 + 64 "
        "for the image token, the default of Gemma3TextConfig",
        decoder=DecoderShape(
            layers=34,
            hidden=2560,
            intermediate=10240,
            heads=8,
            kv_heads=4,
            head_dim=256,
            vocab=262208,
            bidirectional=True,
        ),
        parameters=4_300_079_472,
        exact=True,
        parameters_source="params of the preset kaggle://keras/medgemma/keras/medgemma_4b, the same architecture, and "
        "of google/gemma-3-4b-it as quoted in public repositories",
        side=896,
        visual_tokens=16 * 16,
        made_of="64 x 64 patches of 14, averaged 4 x 4",
        encoder_inputs=lambda: {"pixel_values": _pixels(1, 3, 896, 896)},
    ),
)
