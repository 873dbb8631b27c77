"""LLaVA-HR, which transformers does not have. `register` makes the Auto classes know it; importing registers nothing.

`conversion` converts the authors' checkpoints to it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_torchvision_available

from fitprune.families.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig
from fitprune.families.llava_hr.modeling import (
    LlavaHrForConditionalGeneration,
    LlavaHrModel,
    LlavaHrVisionModel,
)
from fitprune.families.llava_hr.processing import CHAT_TEMPLATE, LlavaHrProcessor, make_processor

__all__ = [
    "CHAT_TEMPLATE",
    "LlavaHrConfig",
    "LlavaHrForConditionalGeneration",
    "LlavaHrModel",
    "LlavaHrProcessor",
    "LlavaHrVisionConfig",
    "LlavaHrVisionModel",
    "make_processor",
    "register",
]


def register() -> None:
    """Make transformers' Auto classes know LLaVA-HR. May be called again."""
    AutoConfig.register(LlavaHrConfig.model_type, LlavaHrConfig, exist_ok=True)
    AutoConfig.register(LlavaHrVisionConfig.model_type, LlavaHrVisionConfig, exist_ok=True)
    AutoModel.register(LlavaHrConfig, LlavaHrModel, exist_ok=True)
    AutoModel.register(LlavaHrVisionConfig, LlavaHrVisionModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaHrConfig, LlavaHrForConditionalGeneration, exist_ok=True)
    images: dict[str, Any] = {"pil": LlavaImageProcessorPil}
    if is_torchvision_available():
        from transformers import LlavaImageProcessor

        images["torchvision"] = LlavaImageProcessor
    AutoImageProcessor.register(LlavaHrConfig, image_processor_classes=images, exist_ok=True)
    AutoProcessor.register(LlavaHrConfig, LlavaHrProcessor, exist_ok=True)
