"""What a model's config says: its family, its image tokens, its sizes, and a hash of its architecture."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from typing import Any

from fitprune.costs.sizes import LINEAR_CHUNK, DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.families.table import FAMILIES, GENERIC, Family

logger = logging.getLogger(__name__)

# What a config says of the architecture, each under the names that families and versions of transformers have for it.
# Neither vocabulary nor training nor what a new version adds: recipes are shared between fine-tunes and versions.
_ARCHITECTURE = (
    ("embed_dim", "hidden_size"),
    ("intermediate_size",),
    ("depth", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("layer_types",),
    ("sliding_window",),
    ("num_experts", "num_local_experts"),
    ("num_experts_per_tok",),
    ("moe_intermediate_size",),
    ("image_size",),
    ("patch_size",),
    ("temporal_patch_size",),
    ("spatial_merge_size",),
    ("deepstack_visual_indexes",),
    ("vision_feature_layers", "vision_feature_layer"),
    ("vision_feature_select_strategy",),
    ("image_grid_pinpoints",),
    ("downsample_ratio", "downsample_factor", "scale_factor"),
    ("mm_tokens_per_image",),
    ("input_image_size",),
    ("convnext_depths",),
    ("convnext_hidden_sizes",),
)


def fingerprint_of(config: Any) -> ModelFingerprint:
    """Read type and sizes from a config.

    Raises:
        ValueError: the family is refused, or the config is of no multimodal model.
    """
    try:
        return _read_shape(config, family_of(config))
    except ValueError:
        raise
    except Exception as error:  # configs of other families fail in ways of their own
        text_type = getattr(getattr(config, "text_config", None), "model_type", None)
        raise ValueError(
            f"model_type={getattr(config, 'model_type', None)!r} with a text model {text_type!r}: not supported, "
            f"because its config does not tell the decoder's sizes ({error}); see 'fitprune families'"
        ) from None


def _read_shape(config: Any, family: Family) -> ModelFingerprint:
    text, vision = config.text_config, config.vision_config
    heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    if isinstance(text.intermediate_size, int):
        intermediate, router = text.intermediate_size, 0
    else:
        intermediate, router = max(text.intermediate_size), 0
    if getattr(text, "block_auto_adjust_ff_dim", False):  # LFM2 derives its width
        multiple, factor = text.block_multiple_of, text.block_ffn_dim_multiplier or 1
        intermediate = multiple * -(-int(factor * int(2 * intermediate / 3)) // multiple)
    if (experts := first_attribute(text, "num_experts")) and isinstance(
        getattr(text, "moe_intermediate_size", None), int
    ):
        # Of other mixtures `adapt` counts the weights.
        intermediate, router = text.num_experts_per_tok * text.moe_intermediate_size, experts
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    linear = tuple(number for number, kind in enumerate(kinds[:layers]) if kind in ("linear_attention", "conv"))
    costs = _linear_costs(text) if linear else (0, 0)
    decoder = DecoderSizes(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocab=text.vocab_size,
        router=router,
        query_gate="linear_attention" in kinds,
        bidirectional=family.bidirectional or bool(getattr(text, "use_bidirectional_attention", None)),
        first_prunable=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        linear_layers=linear,
        linear_macs=costs[0],
        linear_chunk_macs=costs[1],
    )
    return ModelFingerprint(
        config.model_type, decoder, _tower(config.model_type, vision), token_ids(config)["image"], _config_hash(config)
    )


def _linear_costs(text: Any) -> tuple[int, int]:
    """Price a mixer without softmax attention, a short convolution or gated delta rule: for a token, a chunk."""
    hidden = text.hidden_size
    if (kernel := getattr(text, "conv_L_cache", None)) is not None:
        return 4 * hidden * hidden + kernel * hidden, 0
    heads, key_dim, value_dim = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    keys, values = text.linear_num_key_heads * key_dim, heads * value_dim
    mixed = 2 * keys + values
    chunk = LINEAR_CHUNK * (2 * LINEAR_CHUNK * key_dim + LINEAR_CHUNK * value_dim + 3 * key_dim * value_dim)
    return hidden * (mixed + 2 * values + 2 * heads) + mixed * text.linear_conv_kernel_dim, heads * chunk


def _tower(model_type: str, vision: Any) -> VisionSizes | None:
    """Read a CLIP tower's sizes; None where the cost model does not know tower or projector."""
    if vision.model_type == "llava_hr_vision":
        return VisionSizes(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            image_size=vision.grid * vision.patch_size,
            patch_size=vision.patch_size,
            class_tokens=0,
            beside_macs=_beside_macs(vision),
        )
    if vision.model_type != "clip_vision_model" or model_type not in ("llava", "llava_next", "llava_next_video"):
        return None
    return VisionSizes(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def _beside_macs(vision: Any) -> int:
    """Price what LLaVA-HR has beside CLIP: ConvNeXt, adapters, fusion."""
    side, before, macs = vision.input_image_size // 4, 3, 0
    for stage, (depth, width) in enumerate(zip(vision.convnext_depths, vision.convnext_hidden_sizes, strict=True)):
        side //= 2 if stage else 1
        macs += side**2 * before * width * (4 if stage else 16)  # patches of 4 x 4 pixels, then of 2 x 2
        macs += depth * side**2 * (49 * width + 8 * width**2)
        before = width
    fast, slow, patches = vision.hidden_size, before, vision.grid**2
    adapter = side**2 * slow * (slow + fast) + patches * fast * (49 + fast) + (2 * fast + 1) * (fast // 2)
    return int(macs + (3 * adapter if vision.use_adapters else 0) + patches * fast * (fast + slow))


def _config_hash(config: Any) -> str:
    """Hash what a config says of the architecture; the same for fine-tunes, and in every version of transformers."""
    parts = {"": config, "text": config.text_config, "vision": config.vision_config}
    said: dict[str, Any] = {"model_type": config.model_type, "text.model_type": config.text_config.model_type}
    said |= {
        f"{part}.{names[0]}": value if isinstance(value, (int, float, str)) else [str(item) for item in value]
        for part, of in parts.items()
        for names in _ARCHITECTURE
        if (value := first_attribute(of, *names)) is not None
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def say_generic(model_type: str) -> None:
    """Say, once for each type of model, that no entry of `families` stands behind it."""
    logger.warning(
        "model_type=%r is not in the table of families (fitprune families): served by the generic adapter, as a "
        "decoder of the common shape",
        model_type,
    )


def first_attribute(whole: Any, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next((part for name in names if (part := getattr(whole, name, None)) is not None), None)


def family_of(config: Any) -> Family:
    """Find a config's family; GENERIC if it is not in the table.

    Raises:
        ValueError: the family is refused, or the config is of no multimodal model.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type), GENERIC)
    if family.refused:
        raise ValueError(f"model_type={model_type!r}: refused, because {family.refused}; see 'fitprune families'")
    text = getattr(config, "text_config", None)
    problem = ""
    lacking = [name for name in ("text_config", "vision_config") if getattr(config, name, None) is None]
    lacking += [] if token_ids(config) else ["image_token_id"]
    if lacking:
        problem = f"has no {', '.join(lacking)}, as a multimodal model's config has"
    elif family is GENERIC and getattr(config, "is_encoder_decoder", False):
        problem = "is an encoder-decoder: visual tokens are not in the decoder's prompt"
    elif family is GENERIC and getattr(text, "num_kv_shared_layers", None):
        problem = "has layers that share keys, which a removed token would leave at different places"
    elif family is GENERIC and getattr(text, "hidden_size_per_layer_input", None):
        problem = "has layers with inputs of their own for every token"
    if problem:
        raise ValueError(
            f"model_type={model_type!r}: not supported, because it {problem}; must be one of "
            f"{sorted(name for name, known in FAMILIES.items() if not known.refused)} or of their common shape"
        )
    return family


def token_ids(config: Any) -> dict[str, int]:
    """Read the ids that mark visual tokens."""
    found = {}
    for modality in ("image", "video"):
        token = first_attribute(config, f"{modality}_token_id", f"{modality}_token_index")
        if isinstance(token, int):
            found[modality] = token
    return found if "image" in found else {}
