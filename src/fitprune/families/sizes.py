"""Read the sizes of decoders and vision towers off configs: the usual reading, and the rules of single families."""

from __future__ import annotations

import dataclasses
from typing import Any

from fitprune._support.host import first_attribute
from fitprune.costs.sizes import LINEAR_CHUNK, DecoderSizes, VisionSizes


def decoder_sizes(config: Any) -> DecoderSizes:
    """Read a decoder's sizes under the names that most configs use."""
    text = config.text_config
    heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    router, intermediate = 0, text.intermediate_size
    if not isinstance(intermediate, int):  # a width for each layer
        intermediate = max(intermediate)
    if (experts := first_attribute(text, "num_experts")) and isinstance(
        getattr(text, "moe_intermediate_size", None), int
    ):
        # Of other mixtures `adapt` counts the weights.
        intermediate, router = text.num_experts_per_tok * text.moe_intermediate_size, experts
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    linear = tuple(number for number, kind in enumerate(kinds[:layers]) if kind in ("linear_attention", "conv"))
    token_macs, chunk_macs = _linear_costs(text) if linear else (0, 0)
    return DecoderSizes(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocab=text.vocab_size,
        router=router,
        query_gate="linear_attention" in kinds,
        bidirectional=bool(getattr(text, "use_bidirectional_attention", None)),
        first_prunable=len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ()),
        linear_layers=linear,
        linear_macs=token_macs,
        linear_chunk_macs=chunk_macs,
    )


def _linear_costs(text: Any) -> tuple[int, int]:
    """Price a mixer without softmax attention, a short convolution or a gated delta rule: per token, per chunk."""
    hidden = text.hidden_size
    if (kernel := getattr(text, "conv_L_cache", None)) is not None:
        return 4 * hidden * hidden + kernel * hidden, 0
    heads, key_dim, value_dim = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    keys, values = text.linear_num_key_heads * key_dim, heads * value_dim
    mixed = 2 * keys + values
    chunk = LINEAR_CHUNK * (2 * LINEAR_CHUNK * key_dim + LINEAR_CHUNK * value_dim + 3 * key_dim * value_dim)
    return hidden * (mixed + 2 * values + 2 * heads) + mixed * text.linear_conv_kernel_dim, heads * chunk


def lfm2_sizes(config: Any) -> DecoderSizes:
    """Read LFM2's sizes: the width of its MLP follows from the width that its config says."""
    sizes, text = decoder_sizes(config), config.text_config
    if not getattr(text, "block_auto_adjust_ff_dim", False):
        return sizes
    multiple, factor = text.block_multiple_of, text.block_ffn_dim_multiplier or 1
    width = multiple * -(-int(factor * int(2 * sizes.intermediate / 3)) // multiple)
    return dataclasses.replace(sizes, intermediate=width)


def unknown_tower(config: Any) -> None:
    """Give no sizes: the cost model does not know this tower or its projector, and leaves them out."""


def clip_tower(config: Any) -> VisionSizes | None:
    """Read the sizes of a CLIP tower; None for any other tower."""
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        return None
    return VisionSizes(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def llava_hr_tower(config: Any) -> VisionSizes:
    """Read the sizes of LLaVA-HR's CLIP, and price what it has beside it: ConvNeXt, adapters, fusion."""
    vision = config.vision_config
    side, before, macs = vision.input_image_size // 4, 3, 0
    for stage, (depth, width) in enumerate(zip(vision.convnext_depths, vision.convnext_hidden_sizes, strict=True)):
        side //= 2 if stage else 1
        macs += side**2 * before * width * (4 if stage else 16)  # patches of 4 x 4 pixels, then of 2 x 2
        macs += depth * side**2 * (49 * width + 8 * width**2)
        before = width
    fast, slow, patches = vision.hidden_size, before, vision.grid**2
    adapter = side**2 * slow * (slow + fast) + patches * fast * (49 + fast) + (2 * fast + 1) * (fast // 2)
    return VisionSizes(
        layers=vision.num_hidden_layers,
        hidden=fast,
        intermediate=vision.intermediate_size,
        image_size=vision.grid * vision.patch_size,
        patch_size=vision.patch_size,
        class_tokens=0,
        beside_macs=int(macs + (3 * adapter if vision.use_adapters else 0) + patches * fast * (fast + slow)),
    )
