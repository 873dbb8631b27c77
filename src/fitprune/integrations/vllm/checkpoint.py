"""Names of weights: what transformers 5 saves, and vLLM asks for."""

from __future__ import annotations

import re
from typing import Any

TOWERS = ("clip_vision_model", "siglip_vision_model")


def accept_newer_names(model_config: Any) -> None:
    """Have a vLLM model class load what transformers 5 saves, and older checkpoints as before.

    transformers 5 leaves `vision_model` out of the names of a CLIP or SigLIP tower's weights; vLLM's tower has it, as
    checkpoints on the hub have. vLLM's model classes rename while they load, by a map of their own: it gets one rule
    more. So nothing is copied, and lists of quantized layers are read by the same rule.

    Args:
        model_config: vLLM's ModelConfig.
    """
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.model_executor.models.utils import WeightsMapper

    tower = getattr(model_config.hf_config, "vision_config", None)
    if getattr(tower, "model_type", None) not in TOWERS or model_config.using_transformers_backend():
        return
    model = get_model_cls(model_config)
    rule = {re.compile(r"\bvision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
    model.hf_to_vllm_mapper = model.hf_to_vllm_mapper | WeightsMapper(orig_to_new_regex=rule)
