"""Read the authors' LLaVA-HR checkpoints: which weight is which, and which model they are of.

Knows the layout of github.com/luogen1996/LLaVA-HR (commit 1212ffb): timm's names for the ConvNeXt, and those of
transformers 4.31 for CLIP and Llama. Names, shapes and settings alone: no weight is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from fitprune.families.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig
from fitprune.families.llava_hr.modeling import LlavaHrForConditionalGeneration

_SLOW = r"model\.vision_tower\.slow_vision_tower\.vision_tower\."
_FAST = r"model\.vision_tower\.fast_vision_tower\.vision_tower\.vision_model\."
_TOWER, _TO_TOWER = r"model\.vision_tower\.", "model.vision_tower."
_BLOCK, _TO_BLOCK = _SLOW + r"stages\.(\d+)\.blocks\.(\d+)\.", _TO_TOWER + r"convnext.stages.\1.layers.\2."
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (_SLOW + r"stem\.0\.", _TO_TOWER + "convnext.embeddings.patch_embeddings."),
        (_SLOW + r"stem\.1\.", _TO_TOWER + "convnext.embeddings.layernorm."),
        (_SLOW + r"stages\.(\d+)\.downsample\.", _TO_TOWER + r"convnext.stages.\1.downsampling_layer."),
        # A block's scale is "gamma" in timm; transformers 4.31 could not load that name, so the authors' is "weight".
        (_BLOCK + r"(weight|gamma)$", _TO_BLOCK + "layer_scale_parameter"),
        (_BLOCK + r"conv_dw\.", _TO_BLOCK + "dwconv."),
        (_BLOCK + r"norm\.", _TO_BLOCK + "layernorm."),
        (_BLOCK + r"mlp\.fc(\d)\.", _TO_BLOCK + r"pwconv\3."),
        (_FAST, _TO_TOWER),
        (_TOWER + r"align_stages_latent\.", _TO_TOWER + "adapters."),
        (_TOWER + r"align_stages\.0\.", _TO_TOWER + "fusion."),
        (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
        (r"lm_head\.", "lm_head."),
    )
]
# No forward pass uses these: heads of the towers, and constants that older versions of transformers stored.
_DROPPED = re.compile(
    f"{_SLOW}head\\..*|{_FAST}post_layernorm\\..*|{_FAST}embeddings\\.position_ids|.*\\.rotary_emb\\.inv_freq"
)
GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # one row for each token
_ROWS = 64  # the vocabulary is filled up to a multiple of this, as transformers does for LLaVA
_LLAMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling", "attention_bias",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_CLIP_HEAD = 64  # channels of an attention head, in every CLIP


def config_of(
    settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor], tokens: int, image_id: int
) -> LlavaHrConfig:
    """Read sizes off the authors' config and the weights' shapes; those of LLaVA-HR-7B where a weight is missing.

    Args:
        settings: the authors' config.json.
        weights: name -> weight.
        tokens: number of the tokenizer's tokens.
        image_id: the id of "<image>".
    """
    slow = "model.vision_tower.slow_vision_tower.vision_tower."
    fast = "model.vision_tower.fast_vision_tower.vision_tower.vision_model."
    vision: dict[str, Any] = {}
    patches = weights.get(f"{fast}embeddings.patch_embedding.weight")
    positions = weights.get(f"{fast}embeddings.position_embedding.weight")
    wide = weights.get(f"{fast}encoder.layers.0.mlp.fc1.weight")
    if patches is not None and positions is not None and wide is not None:
        vision = {
            "hidden_size": patches.shape[0],
            "num_attention_heads": max(1, patches.shape[0] // _CLIP_HEAD),
            "patch_size": patches.shape[-1],
            "image_size": math.isqrt(positions.shape[0] - 1) * patches.shape[-1],
            "intermediate_size": wide.shape[0],
            "num_hidden_layers": _count(weights, re.escape(f"{fast}encoder.layers.")),
        }
    depths = [_count(weights, re.escape(f"{slow}stages.{stage}.blocks.")) for stage in range(4)]
    firsts = [weights.get(f"{slow}stages.{stage}.blocks.0.conv_dw.weight") for stage in range(4)]
    if all(depths) and all(first is not None for first in firsts):
        vision |= {"convnext_depths": depths, "convnext_hidden_sizes": [len(w) for w in firsts if w is not None]}
    embeddings, rows = weights.get("model.embed_tokens.weight"), settings["vocab_size"]
    # ConvNeXt-XXL is known by its name, or without one by its width.
    name = settings.get("vision_tower_slow")
    xxlarge = "xxlarge" in name if isinstance(name, str) else vision.get("convnext_hidden_sizes", [0])[-1] == 3072
    text = {name: settings[name] for name in _LLAMA if settings.get(name) is not None}
    return LlavaHrConfig(
        vision_config=LlavaHrVisionConfig(
            input_image_size=settings["input_image_size"],
            use_adapters=not settings.get(
                "freeze_vision", False
            ),  # frozen in the first stage of training, without them
            convnext_norm_eps=1e-5 if xxlarge else 1e-6,
            **vision,
        ),
        text_config=LlamaConfig(**text, vocab_size=rows if tokens <= rows else -(-tokens // _ROWS) * _ROWS),
        image_token_index=image_id,
        dtype=torch.float16 if embeddings is None else embeddings.dtype,
        architectures=[LlavaHrForConditionalGeneration.__name__],
    )


def _count(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Count the different numbers that follow a prefix."""
    return len({match[1] for name in weights if (match := re.match(prefix + r"(\d+)\.", name))})


def account(
    shards: Mapping[Path, Mapping[str, torch.Tensor]], config: LlavaHrConfig, rows: int
) -> dict[Path, dict[str, str]]:
    """Say for each shard which weight becomes which, target -> name.

    Args:
        shards: their weights, name -> weight.
        config: of the converted model.
        rows: the authors' vocabulary, which the converted model's may exceed.

    Raises:
        ValueError: weights are missing, unexpected, of other shapes or of no floating type; the message lists them all.
    """
    with torch.device("meta"):
        wanted = {name: weight.shape for name, weight in LlavaHrForConditionalGeneration(config).state_dict().items()}
    names: dict[Path, dict[str, str]] = {shard: {} for shard in shards}
    placed: set[str] = set()
    unexpected, misshapen = [], []
    for shard, part in shards.items():
        for name, weight in part.items():
            if _DROPPED.fullmatch(name):
                continue
            target = next((pattern.sub(to, name) for pattern, to in _RENAMED if pattern.match(name)), None)
            if target is None or target not in wanted or target in placed:
                unexpected.append(name)
                continue
            placed.add(target)
            names[shard][target] = name
            shape, must = list(weight.shape), list(wanted[target])
            if target in GROWN:
                must[0] = rows
            if shape != must or not weight.is_floating_point():
                misshapen.append(f"{name} {shape} {weight.dtype} instead of {must}".replace("torch.", ""))
    missing = sorted(set(wanted) - placed)
    if missing or unexpected or misshapen:
        problems = {"missing": missing, "unexpected": sorted(unexpected), "of another shape or type": misshapen}
        raise ValueError(
            "the weights are not those of LLaVA-HR; nothing was written"
            + "".join(f"; {what} ({len(listed)}): {', '.join(listed)}" for what, listed in problems.items() if listed)
        )
    return names
