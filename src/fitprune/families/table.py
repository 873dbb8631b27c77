"""The families of multimodal models: what is particular about each. Data, not code.

Keyed by `config.model_type`. The common shape needs no entry's help: decoder layers with attention and an MLP, image
features put in place of the image token, causal attention. `adapters` finds the parts; any model of the common shape
that is not in the table is served as "generic". Imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

# Which visual tokens are one image, and how a video's tokens fall into frames; `Family` says what each means.
ImageRule = Literal["features", "runs", "joined", "tiles"]
VideoRule = Literal["", "features", "runs", "pooled", "grid"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular about a family.

    Attributes:
        model_type: the config's.
        models: models that users know it by.
        images: which visual tokens are one image. "features": the model's encoder gives each image's features apart.
            "runs": adjacent tokens are one image (its encoder gives tiles). "joined": so are runs with one token
            between them. "tiles": runs are one image up to the one whose marker before it is that of the sample's last.
        video: how a video's tokens fall into frames. "": the family has no video; "features": as images; "runs":
            adjacent tokens; "pooled": equal frames of the pooled patch grid; "grid": equal frames, counted by the
            processor's grid or by rotary positions.
        bidirectional: whether tokens of an image (or the whole prompt) attend to later ones.
        answer_type: what its processor calls a token of the answer, in the types that it gives for each token.
        removal: how tokens leave, for the table.
        refused: why the family is refused; empty if it is served.

    Raises:
        ValueError: there is no such rule for images or videos.
    """

    model_type: str
    models: str
    images: ImageRule = "features"
    video: VideoRule = ""
    bidirectional: bool = False
    answer_type: int = 0
    removal: str = "in every layer"
    refused: str = ""

    def __post_init__(self) -> None:
        for name, rules in (("images", get_args(ImageRule)), ("video", get_args(VideoRule))):
            if getattr(self, name) not in rules:
                raise ValueError(f"family {self.model_type!r}: {name}={getattr(self, name)!r}: must be one of {rules}")


_HYBRID = "in attention layers; the other layers run over the tokens that are left"
_DEEPSTACK = "behind the layers that DeepStack adds visual features to"
_SLIDING = "in every layer; windows count original positions"

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LLaVA-1.5, Pixtral-12B, BakLLaVA"),
        Family("llava_next", "LLaVA-NeXT (1.6)"),
        Family("llava_next_video", "LLaVA-NeXT-Video", video="pooled"),
        Family("llava_hr", "LLaVA-HR, LLaVA-HR-X (converted)"),
        Family("llava_onevision", "LLaVA-OneVision", video="pooled"),
        Family("vipllava", "ViP-LLaVA"),
        Family("video_llava", "Video-LLaVA", video="features"),
        Family("qwen2_vl", "Qwen2-VL", video="grid"),
        Family("qwen2_5_vl", "Qwen2.5-VL", video="grid"),
        Family("qwen3_vl", "Qwen3-VL", video="runs", removal=_DEEPSTACK),
        Family("qwen3_vl_moe", "Qwen3-VL-MoE", video="runs", removal=_DEEPSTACK),
        Family("qwen3_5", "Qwen3.5", video="runs", removal=_HYBRID),
        Family("internvl", "InternVL3, InternVL2.5 (-hf)", images="runs", video="runs"),
        Family("idefics3", "Idefics3", images="tiles"),
        Family("smolvlm", "SmolVLM, SmolVLM2", images="tiles", video="runs"),
        Family("gemma3", "Gemma 3", bidirectional=True, removal=_SLIDING),
        Family("paligemma", "PaliGemma, PaliGemma 2", bidirectional=True, answer_type=1, removal=_SLIDING),
        Family("mistral3", "Mistral Small 3.1 and 3.2"),
        Family("aya_vision", "Aya Vision", images="tiles", removal=_SLIDING),
        Family("cohere2_vision", "Command A Vision", images="joined", removal=_SLIDING),
        Family("glm4v", "GLM-4.1V", video="runs"),
        Family("fast_vlm", "FastVLM"),
        Family("lfm2_vl", "LFM2-VL", images="joined", removal=_HYBRID),
        Family("deepseek_vl", "DeepSeek-VL"),
        Family(
            "mllama", "Llama 3.2 Vision", refused="images enter by cross-attention: no visual token is in the prompt"
        ),
        Family("blip-2", "BLIP-2", refused="its decoder may be an encoder-decoder, and its 32 queries are few already"),
        Family("instructblip", "InstructBLIP", refused="its 32 image queries are few already"),
        Family("gemma3n", "Gemma 3n", refused="its layers share keys and carry inputs of their own for every token"),
        Family("florence2", "Florence-2", refused="an encoder-decoder: its visual tokens are in the encoder"),
    )
}

GENERIC = Family(
    "", "any other model of the common shape", removal="in every layer with attention; see the log message"
)


def table() -> str:
    """Give the families as a Markdown table."""
    rows = ["| model_type | models | status | tokens leave | one image is | frames |", "|---|---|---|---|---|---|"]
    images = {
        "features": "what its encoder gives",
        "runs": "a run of tokens",
        "tiles": "its tiles together",
        "joined": "its tiles together",
    }
    for family in (*FAMILIES.values(), GENERIC):
        name = f"`{family.model_type}`" if family.model_type else "others"
        if family.refused:
            rows.append(f"| {name} | {family.models} | refused: {family.refused} | | | |")
            continue
        status = "supported" if family.model_type else "generic"
        frames = "one share each" if family.video else ""
        rows.append(f"| {name} | {family.models} | {status} | {family.removal} | {images[family.images]} | {frames} |")
    return "\n".join(rows)
