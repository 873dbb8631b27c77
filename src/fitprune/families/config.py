"""Read a model's config: its family, its image tokens, and the fingerprint by which recipes know it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from typing import Any, get_args

from fitprune._support.host import first_attribute, token_id
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.families.table import GENERIC, Family, Modality, find_family, served

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
    """Read the fingerprint off a config.

    Args:
        config: a model's whole config.

    Raises:
        ValueError: the family is refused, or the config is of no multimodal model.
    """
    family = family_of(config)
    try:
        sizes, tower = family.sizes(config), family.tower(config)
        digest = _config_hash(config, family)
    except ValueError:
        raise
    except Exception as error:  # configs of other families fail in ways of their own
        text_type = getattr(getattr(config, "text_config", None), "model_type", None)
        raise ValueError(
            f"model_type={config.model_type!r} with a text model {text_type!r}: not supported, because its config does "
            f"not have the decoder's sizes under a known name ({error}); see 'fitprune families', or register a family "
            "with a rule for its sizes (docs/extending.md)"
        ) from None
    for name, value, kinds in (("sizes", sizes, DecoderSizes), ("tower", tower, (VisionSizes, type(None)))):
        if not isinstance(value, kinds):
            raise ValueError(
                f"family {family.model_type!r}: its rule {name} returned a {type(value).__name__}: must return "
                f"{'DecoderSizes' if name == 'sizes' else 'VisionSizes or None'}; mend the family's row"
            )
    sizes = dataclasses.replace(sizes, bidirectional=family.bidirectional or sizes.bidirectional)
    return ModelFingerprint(config.model_type, sizes, tower, token_ids(config, family)["image"], digest)


def _config_hash(config: Any, family: Family) -> str:
    """Hash what a config says of the architecture; the same for fine-tunes, and in every version of transformers."""
    parts = {"": config, "text": config.text_config, "vision": config.vision_config}
    entries: dict[str, Any] = {"model_type": config.model_type, "text.model_type": config.text_config.model_type}
    entries |= {
        f"{part}.{names[0]}": value if isinstance(value, (int, float, str)) else [str(item) for item in value]
        for part, of in parts.items()
        for names in (*_ARCHITECTURE, *((name,) for name in family.architecture))
        if (value := first_attribute(of, *names)) is not None
    }
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def say_generic(model_type: str) -> None:
    """Say, once for each type of model, that it has no row in the table of families."""
    logger.warning(
        "model_type=%r is not in the table of families (fitprune families): served by the generic adapter, as a "
        "decoder of the common shape",
        model_type,
    )


def family_of(config: Any) -> Family:
    """Find a config's family; GENERIC if it is not in the table.

    Args:
        config: a model's whole config.

    Raises:
        ValueError: the family is refused, or the config is of no multimodal model.
    """
    model_type = getattr(config, "model_type", None)
    family = find_family(model_type)
    if family.refused:
        raise ValueError(f"model_type={model_type!r}: refused, because {family.refused}; see 'fitprune families'")
    text = getattr(config, "text_config", None)
    problem = ""
    lacking = [name for name in ("text_config", "vision_config") if getattr(config, name, None) is None]
    lacking += [] if token_ids(config, family) else [family.token_ids.get("image", "image_token_id")]
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
            f"model_type={model_type!r}: not supported, because it {problem}; must be one of {served()} or of their "
            "common shape"
        )
    return family


def token_ids(config: Any, family: Family) -> dict[str, int]:
    """Read the ids that mark visual tokens, by modality; empty where images have none."""
    ids = {}
    for modality in get_args(Modality):
        name = family.token_ids.get(modality)
        token = token_id(config, modality) if name is None else getattr(config, name, None)
        if isinstance(token, int):
            ids[modality] = token
    return ids if "image" in ids else {}
