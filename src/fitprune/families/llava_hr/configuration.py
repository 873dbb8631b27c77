"""Configuration of LLaVA-HR: sizes of its two vision towers, and the number of visual tokens of an image."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class LlavaHrVisionConfig(CLIPVisionConfig):
    """Configuration of the vision towers: CLIP's, with entries for the ConvNeXt and the adapters.

    By default those of LLaVA-HR: CLIP ViT-L/14-336 and ConvNeXt-L, for images of 1,024 pixels. LLaVA-HR-X has
    ConvNeXt-XXL: depths 3, 4, 30, 3, widths 384 to 3,072, and `convnext_norm_eps` 1e-5.

    Args:
        input_image_size: height and width of the image in pixels. (`image_size` is what CLIP was trained at.)
        use_adapters: whether adapters join the towers within CLIP. In the authors' first training stage none do.
        convnext_depths: blocks of each stage.
        convnext_hidden_sizes: channels of each stage.
        convnext_norm_eps: of the ConvNeXt's norms.
        convnext_layer_scale: each block's scale at the start of training.

    Raises:
        ValueError: CLIP's layers cannot be cut into quarters, or the towers' patches do not fall on each other.
    """

    model_type = "llava_hr_vision"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    input_image_size: int = 1024
    use_adapters: bool = True
    convnext_depths: list[int] | tuple[int, ...] = (3, 3, 27, 3)
    convnext_hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    convnext_norm_eps: float = 1e-6
    convnext_layer_scale: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_hidden_layers % 4 or self.num_hidden_layers < 4:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: must be a multiple of 4, because adapters stand between "
                "quarters of CLIP's layers"
            )
        if len(self.convnext_depths) != len(self.convnext_hidden_sizes):
            raise ValueError(
                f"convnext_depths={self.convnext_depths} and convnext_hidden_sizes={self.convnext_hidden_sizes}: must "
                "be of the same length, one for each stage"
            )
        if self.input_image_size % self.stride or self.input_image_size < self.stride:
            raise ValueError(
                f"input_image_size={self.input_image_size}: must be a multiple of {self.stride}, the ConvNeXt's stride"
            )
        fine, coarse = self.input_image_size // self.stride, self.grid
        if coarse % fine:
            raise ValueError(
                f"input_image_size={self.input_image_size}: the ConvNeXt's {fine}x{fine} patches and CLIP's "
                f"{coarse}x{coarse} do not fall on each other; must be {coarse * self.stride} or more, or give a "
                f"divisor of {coarse}"
            )

    @property
    def stride(self) -> int:
        """Pixels of the image to one patch of the ConvNeXt's last stage."""
        return int(4 * 2 ** (len(self.convnext_depths) - 1))

    @property
    def grid(self) -> int:
        """CLIP's patches, and so visual tokens, in each direction: the ConvNeXt's number, at least CLIP's own."""
        return int(max(self.input_image_size // self.stride, self.image_size // self.patch_size))

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image."""
        return self.grid**2


class LlavaHrConfig(PreTrainedConfig):
    """Configuration of LLaVA-HR; by default LLaVA-HR-7B.

    Args:
        vision_config: a LlavaHrVisionConfig or its keywords.
        text_config: of the text model, a config or its keywords; by default Llama.
        image_token_index: id of each visual token in `input_ids`.
    """

    model_type = "llava_hr"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": LlavaHrVisionConfig, "text_config": AutoConfig}
    # Fixed in this architecture; transformers' projector reads them.
    vision_feature_layer = -1
    projector_hidden_act = "gelu"
    multimodal_projector_bias = True

    vision_config: Any = None
    text_config: Any = None
    image_token_index: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        vision, text = self.vision_config, self.text_config
        if not isinstance(vision, PreTrainedConfig):
            vision = LlavaHrVisionConfig(**(vision or {}))
        if not isinstance(text, PreTrainedConfig):
            text = CONFIG_MAPPING[text.get("model_type", "llama")](**text) if text else LlamaConfig(vocab_size=32064)
        self.vision_config, self.text_config = vision, text
        super().__post_init__(**kwargs)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens of an image."""
        return int(self.vision_config.num_visual_tokens)
