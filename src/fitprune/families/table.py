"""The table of families: one row says all that is particular about a family of multimodal models.

Keyed by `config.model_type`. Most families need little: decoder layers with attention and an MLP, image features put in
place of the image token, causal attention. A model of this common shape that has no row is served by GENERIC.
`register_family` or an entry point of the group "fitprune.families" adds a row from another package. Imports neither
torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from fitprune._support.messages import line, short
from fitprune._support.registry import Registry
from fitprune.costs.sizes import DecoderSizes, VisionSizes
from fitprune.families.sizes import clip_tower, decoder_sizes, lfm2_sizes, llava_hr_tower, unknown_tower

# Which visual tokens are one image, and how a video's tokens fall into frames; `Family` says what each means.
ImageRule = Literal["features", "runs", "joined", "tiles"]
VideoRule = Literal["", "features", "runs", "pooled", "grid"]
Part = Literal["decoder", "mlp", "norm"]
Modality = Literal["image", "video"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular about a family.

    Attributes:
        model_type: the config's.
        models: models that users know it by.
        images: which visual tokens are one image. "features": the model's encoder gives each image's features apart.
            "runs": adjacent tokens are one image (its encoder gives tiles). "joined": so are runs with one token
            between them. "tiles": runs are one image up to the one whose marker before it is that of the sample's last.
            Or a function of the visual tokens [B, N] bool and the ids [B, N] (None where the call has none), which
            gives the number of the image that each visual token belongs to, [B, N] int64, -1 elsewhere.
        video: how a video's tokens fall into frames. "": the family has no video; "features": as images; "runs":
            adjacent tokens; "pooled": equal frames of the pooled patch grid; "grid": equal frames, counted by the
            processor's grid or by rotary positions.
        parts: names of modules, where they are not the usual ones: "decoder" in the base model (usually
            "language_model"), "mlp" in each layer, "norm" in the decoder.
        token_ids: by "image" and "video" the name under which the config has the id that marks its tokens, where that
            is not "image_token_id" or "image_token_index".
        sizes: reads the decoder's sizes off the whole config.
        tower: reads the vision tower's sizes off the whole config; None where the cost model does not know it.
        architecture: what else in the config tells two models of the family apart, beside the usual names of sizes.
        bidirectional: whether tokens of an image (or the whole prompt) attend to later ones.
        answer_type: what its processor calls a token of the answer, in the types that it gives for each token.
        register: makes the Auto classes of transformers know the family; `load_model` calls it before it loads.
        removal: how tokens leave, for the table.
        refused: why the family is refused; empty if it is served.

    Raises:
        ValueError: a value is not one of those above.
    """

    model_type: str
    models: str
    images: ImageRule | Callable[[Any, Any], Any] = "features"
    video: VideoRule = ""
    parts: Mapping[Part, str] = dataclasses.field(default_factory=dict)
    token_ids: Mapping[Modality, str] = dataclasses.field(default_factory=dict)
    sizes: Callable[[Any], DecoderSizes] = decoder_sizes
    tower: Callable[[Any], VisionSizes | None] = unknown_tower
    architecture: tuple[str, ...] = ()
    bidirectional: bool = False
    answer_type: int = 0
    register: Callable[[], None] | None = None
    removal: str = "in every layer"
    refused: str = ""

    def __post_init__(self) -> None:
        for name in ("model_type", "models", "removal", "refused"):
            self._require(name, isinstance(getattr(self, name), str), "a text")
        self._require("images", self._is_one_of("images", ImageRule) or callable(self.images),
                      f"one of {get_args(ImageRule)}, or a function of visual tokens and ids")  # fmt: skip
        self._require("video", self._is_one_of("video", VideoRule), f"one of {get_args(VideoRule)}")
        for name, keys in (("parts", get_args(Part)), ("token_ids", get_args(Modality))):
            value = getattr(self, name)
            good = isinstance(value, Mapping) and set(value) <= set(keys)
            good = good and all(isinstance(text, str) and text.isidentifier() for text in value.values())
            self._require(name, good, f"names by {' or '.join(map(repr, keys))}")
        for name in ("sizes", "tower"):
            self._require(name, callable(getattr(self, name)), "a function of the config")
        names = self.architecture
        good = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        self._require("architecture", good, "a tuple of names in the config")
        self._require("bidirectional", isinstance(self.bidirectional, bool), "true or false")
        self._require("answer_type", type(self.answer_type) is int and self.answer_type >= 0, "0 or more")
        self._require("register", self.register is None or callable(self.register), "a function of no argument")

    def _is_one_of(self, name: str, rule: Any) -> bool:
        value = getattr(self, name)
        return isinstance(value, str) and value in get_args(rule)

    def _require(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(
                f"family {short(self.model_type)}: {name}={short(getattr(self, name))}: must be {rule}; see Family"
            )


def _register_llava_hr() -> None:
    from fitprune.families import llava_hr

    llava_hr.register()


_HYBRID = "in attention layers; the other layers run over the tokens that are left"
_DEEPSTACK = "after the layers that DeepStack adds visual features to"
_SLIDING = "in every layer; windows count original positions"

_BUILTIN = {
    family.model_type: family
    for family in (
        Family("llava", "LLaVA-1.5, Pixtral-12B, BakLLaVA", tower=clip_tower),
        Family("llava_next", "LLaVA-NeXT (1.6)", tower=clip_tower),
        Family("llava_next_video", "LLaVA-NeXT-Video", video="pooled", tower=clip_tower),
        Family("llava_hr", "LLaVA-HR, LLaVA-HR-X (converted)", tower=llava_hr_tower, register=_register_llava_hr),
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
        Family("lfm2_vl", "LFM2-VL", images="joined", sizes=lfm2_sizes, removal=_HYBRID),
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
FAMILIES: Registry[Family] = Registry("family", "fitprune.families", Family, _BUILTIN)
GENERIC = Family(
    "",
    "any other model of the common shape",
    video="runs",
    removal="in every layer with attention; see the log message",
)


def register_family(family: Family, *, replace: bool = False) -> None:
    """Add a row to the table of families, in this process.

    In every process that has a package installed, an entry point does the same: in the group "fitprune.families", under
    the name of the `model_type`, the `Family`.

    Args:
        family: the row; models whose config has its `model_type` are read by it.
        replace: take the place of a row that was registered before.

    Raises:
        ValueError: it is no Family, its `model_type` is no name, or that has a row already.
    """
    if not isinstance(family, Family):
        raise ValueError(f"family is a {type(family).__name__}: must be a fitprune.families.table.Family")
    FAMILIES.add(family.model_type, family, replace=replace)


def find_family(model_type: object) -> Family:
    """Find the row of a config's `model_type`; GENERIC if there is none.

    Args:
        model_type: the config's; may be None.

    Raises:
        ValueError: a package's entry point has a broken row, or one of another `model_type`.
    """
    family = FAMILIES.get(str(model_type), GENERIC)
    if family is not GENERIC and family.model_type != model_type:
        raise ValueError(
            f"family {model_type!r}: its entry point has a row with model_type={family.model_type!r}: must be the "
            "same; rename the entry point in the package that has it"
        )
    return family


def served() -> list[str]:
    """Name the rows that are served; those of other packages without importing them."""
    return sorted(name for name in FAMILIES if name not in _BUILTIN or not _BUILTIN[name].refused)


def table() -> str:
    """Give the families as a Markdown table."""
    rows = ["| model_type | models | status | tokens leave | one image is | frames |", "|---|---|---|---|---|---|"]
    images = {
        "features": "what its encoder gives",
        "runs": "a run of tokens",
        "tiles": "its tiles together",
        "joined": "its tiles together",
    }
    for model_type in (*FAMILIES, ""):
        try:
            family = find_family(model_type)
        except ValueError as error:  # a package's entry point: the other rows are shown all the same
            status = line(error, 300).replace("|", "/")
            rows.append(f"| `{line(model_type)}` | | {status} | | | |")
            continue
        name = f"`{family.model_type}`" if family.model_type else "others"
        if family.refused:
            rows.append(f"| {name} | {family.models} | refused: {family.refused} | | | |")
            continue
        status = "supported" if family.model_type in _BUILTIN else "registered" if family.model_type else "generic"
        image = images[family.images] if isinstance(family.images, str) else "by a rule of its own"
        frames = ("one share each" if family.model_type else "a run of tokens") if family.video else ""
        rows.append(f"| {name} | {family.models} | {status} | {family.removal} | {image} | {frames} |")
    return "\n".join(rows)
