"""LLaVA-HR as an ordinary transformers model: two vision towers at two resolutions, then LLaVA.

A ConvNeXt sees the image at its full size, CLIP at a lower one. Adapters add the ConvNeXt's features to CLIP's after
each of the first three quarters of its layers, and a last sum gives one visual token for each of CLIP's patches: 1,024
of a 1,024-pixel image. CLIP, ConvNeXt, projector, text model, generation and processor are transformers' own; what is
new is the walk through both towers and the adapters.

Legend: B images, P patches of CLIP (a square number), F and S channels of CLIP and of the ConvNeXt.

Source: arXiv:2403.03003, and the authors' code at github.com/luogen1996/LLaVA-HR, commit 1212ffb.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextLayer,
    ConvNextLayerNorm,
    ConvNextStage,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.utils import is_torchvision_available

# Vicuna's system prompt and separators, which the released models were tuned with.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}"
    '{% set system = "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\" %}"
    "{% endif %}"
    "{% if system is string %}{{ system }}{% else %}{% for part in system %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class LlavaHrVisionConfig(CLIPVisionConfig):  # type: ignore[misc]
    """Configuration of the vision towers: CLIP's, and what the ConvNeXt and the adapters add to it.

    By default those of LLaVA-HR: CLIP ViT-L/14-336 and ConvNeXt-L, for images of 1,024 pixels. LLaVA-HR-X has
    ConvNeXt-XXL: depths 3, 4, 30, 3, widths 384 to 3,072, and `convnext_norm_eps` 1e-5.

    Args:
        input_image_size: height and width of the image in pixels. (`image_size` is what CLIP was trained at.)
        use_adapters: whether adapters join the towers within CLIP. In the authors' first training stage none do.
        convnext_depths: blocks of each stage.
        convnext_hidden_sizes: channels of each stage.
        convnext_norm_eps: of the ConvNeXt's norms.
        convnext_layer_scale: what each block's scale starts at in training.

    Raises:
        ValueError: CLIP's layers do not fall into quarters, or the towers' patches do not fall on each other.
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
        """CLIP's patches, and so visual tokens, in each direction: as the ConvNeXt's, at least CLIP's own."""
        return int(max(self.input_image_size // self.stride, self.image_size // self.patch_size))

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image."""
        return self.grid**2


class LlavaHrConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of LLaVA-HR; by default LLaVA-HR-7B.

    Args:
        vision_config: a LlavaHrVisionConfig or its keywords.
        text_config: of the text model, a config or its keywords; by default Llama.
        image_token_index: id that stands for each visual token.
    """

    model_type = "llava_hr"
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    sub_configs = {"vision_config": LlavaHrVisionConfig, "text_config": AutoConfig}  # noqa: RUF012
    # Fixed in this architecture; transformers' projector asks for them.
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


def _enlarged(features: torch.Tensor, side: int) -> torch.Tensor:
    """Bring a feature map [B, C, h, h] to [B, C, side, side], which is at least as large."""
    if features.shape[-1] == side:
        return features
    wide = functional.interpolate(features.float(), size=(side, side), mode="bilinear", align_corners=True)
    return wide.to(features.dtype)


def _as_map(tokens: torch.Tensor) -> torch.Tensor:
    """[B, P, C] -> [B, C, sqrt P, sqrt P]."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(*tokens.shape[::2], side, side)


def _as_tokens(grid: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, h w, C]."""
    return grid.flatten(2).transpose(1, 2)


class ConvNext(nn.Module):
    """transformers' ConvNeXt less its head: a plain module, since what has no attention has none to choose."""

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__()
        self.config = ConvNextConfig(
            depths=list(config.convnext_depths),
            hidden_sizes=list(config.convnext_hidden_sizes),
            num_stages=len(config.convnext_depths),
            layer_scale_init_value=config.convnext_layer_scale,
        )
        self.embeddings = ConvNextEmbeddings(self.config)
        widths = (config.convnext_hidden_sizes[0], *config.convnext_hidden_sizes)
        self.stages: Any = nn.ModuleList(
            ConvNextStage(self.config, widths[n], widths[n + 1], stride=2 if n else 1, depth=depth)
            for n, depth in enumerate(config.convnext_depths)
        )
        for module in self.modules():
            if isinstance(module, ConvNextLayerNorm):
                module.eps = config.convnext_norm_eps  # which transformers fixes at 1e-6

    def blocks(self) -> Iterator[nn.Module]:
        """All that an image goes through, in order."""
        yield self.embeddings
        for stage in self.stages:
            yield from stage.downsampling_layer
            yield from stage.layers


class _ZeroConv2d(nn.Conv2d):
    """A convolution that training starts at zero."""


class MixtureOfResolutionAdapter(nn.Module):
    """Add the ConvNeXt's features to CLIP's, gated by both. Training starts it at the identity."""

    def __init__(self, fast: int, slow: int) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(slow, slow, 1)
        self.slow_proj = _ZeroConv2d(slow, fast, 1)
        self.fast_conv = nn.Conv2d(fast, fast, 7, padding=3, groups=fast)
        self.fast_proj = _ZeroConv2d(fast, fast, 1)
        self.gate = nn.Sequential(nn.Linear(2 * fast, fast // 2), nn.GELU(), nn.Linear(fast // 2, 1))

    def forward(self, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        """[B, P, F] and [B, S, h, h] to [B, P, F]."""
        grid = _as_map(fast)
        fine = self.slow_proj(functional.gelu(self.slow_conv(slow)))
        aligned = _as_tokens(_enlarged(fine, grid.shape[-1]))
        own = _as_tokens(grid + self.fast_proj(functional.gelu(self.fast_conv(grid))))
        gate = self.gate(torch.cat([own, aligned], -1).mean(1, keepdim=True))
        joined: torch.Tensor = own + aligned * gate.tanh()
        return joined


class ResolutionFusion(nn.Module):
    """The sum of both towers' projections: the visual tokens."""

    def __init__(self, fast: int, slow: int) -> None:
        super().__init__()
        self.fast_proj = nn.Linear(fast, fast)
        self.slow_proj = nn.Linear(slow, fast)

    def forward(self, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        """[B, P, F] and [B, S, h, h] to [B, P, F]."""
        aligned = _as_tokens(_enlarged(slow, math.isqrt(fast.shape[1])))
        projected: torch.Tensor = self.fast_proj(fast) + self.slow_proj(aligned)
        return projected


class LlavaHrVisionModel(CLIPVisionModel):  # type: ignore[misc]
    """CLIP with a ConvNeXt beside it, and what joins them."""

    config_class = LlavaHrVisionConfig
    _no_split_modules = ["LlavaHrVisionModel"]  # noqa: RUF012  (the towers meet four times: they stay on one device)

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__(config)
        self.post_layernorm = nn.Identity()  # of CLIP's head, which sees no use here
        self.convnext = ConvNext(config)
        fast, slow = config.hidden_size, config.convnext_hidden_sizes[-1]
        self.adapters = nn.ModuleList(
            MixtureOfResolutionAdapter(fast, slow) for _ in range(3 if config.use_adapters else 0)
        )
        self.fusion = ResolutionFusion(fast, slow)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _ZeroConv2d):
            init.zeros_(module.weight)
        elif isinstance(module, ConvNextLayer):
            init.constant_(module.layer_scale_parameter, self.config.convnext_layer_scale)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: [B, 3, input_image_size, input_image_size], as the processor gives them.
            kwargs: for CLIP's attention.

        Returns:
            `last_hidden_state`: [B, P, F].

        Raises:
            ValueError: the images are of another size.
        """
        size = self.config.input_image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values of shape {list(pixel_values.shape)}: must be [images, 3, {size}, {size}], as this "
                "model's processor makes them"
            )
        kwargs.pop("return_dict", None)
        pixel_values = pixel_values.to(self.embeddings.patch_embedding.weight.dtype)
        slow = self._features(pixel_values)
        tokens = self._tokens(pixel_values)
        quarter = self.config.num_hidden_layers // 4
        for number, layer in enumerate(self.encoder.layers):
            if len(self.adapters) and number and number % quarter == 0:
                tokens = self.adapters[number // quarter - 1](tokens, slow)
            tokens = layer(tokens, None, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.fusion(tokens, slow))

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] to the ConvNeXt's [B, S, h, h]."""
        features = pixel_values
        for block in self.convnext.blocks():
            if self.gradient_checkpointing and self.training:
                features = self._gradient_checkpointing_func(block.__call__, features)
            else:
                features = block(features)
        return features

    def _tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed the image at CLIP's resolution, [B, P, F]. There is no class token."""
        config, weights = self.config, self.embeddings
        pixels = (config.grid * config.patch_size,) * 2
        small = functional.interpolate(pixel_values.float(), size=pixels, mode="bilinear", align_corners=True)
        patches = _as_tokens(weights.patch_embedding(small.to(pixel_values.dtype)))
        positions = weights.position_embedding.weight[None, 1:]
        if positions.shape[1] != patches.shape[1]:
            grid = _as_map(positions.float())
            grid = functional.interpolate(grid, size=(config.grid,) * 2, mode="bicubic", antialias=True)
            positions = _as_tokens(grid).to(patches.dtype)
        embedded: torch.Tensor = self.pre_layrnorm(patches + positions)
        return embedded


class LlavaHrModel(LlavaModel):  # type: ignore[misc]
    """LLaVA with LLaVA-HR's vision tower, without a language modelling head."""

    config_class = LlavaHrConfig

    def __init__(self, config: LlavaHrConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's own would look for the tower among the Auto classes
        self.vision_tower = LlavaHrVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, *, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode images and project them.

        Args:
            pixel_values: [B, 3, input_image_size, input_image_size].
            return_dict: False for a tuple.
            kwargs: for the vision tower; LLaVA's choice of a layer is accepted and has no meaning here.

        Returns:
            `pooler_output`: for each image its visual tokens, [P, hidden size of the text model].
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"):
            kwargs.pop(name, None)
        encoded = self.vision_tower(pixel_values, **kwargs)
        encoded.pooler_output = list(self.multi_modal_projector(encoded.last_hidden_state))
        return encoded if return_dict is None or return_dict else encoded.to_tuple()


class LlavaHrForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-HR with its language modelling head."""

    config_class = LlavaHrConfig

    def __init__(self, config: LlavaHrConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaHrModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class LlavaHrProcessor(LlavaProcessor):  # type: ignore[misc]
    """LLaVA's processor, which tokenizes as the authors do: the text between two images apart.

    Args:
        image_processor: LLaVA's, which pads to a square.
        tokenizer: of the text model, with the token "<image>".
        patch_size: pixels of an image to a visual token, in each direction.
        vision_feature_select_strategy: "full": no token of the tower is left out.
        chat_template: Jinja.
        image_token: stands for an image in a prompt.
        num_additional_image_tokens: none.
        adds_space: whether the tokenizer begins the text behind a special token with a space by itself.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        adds_space: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.adds_space = adds_space

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Process images and prompts; arguments and result as transformers' LlavaProcessor."""
        if isinstance(text, str):
            text = self._apart(text)
        elif isinstance(text, (list, tuple)):
            text = [self._apart(prompt) if isinstance(prompt, str) else prompt for prompt in text]
        return super().__call__(images=images, text=text, **kwargs)

    def _apart(self, prompt: str) -> str:
        """Begin the text behind an image with a space, as the authors' tokenizer does with every text of its own."""
        image = re.escape(self.image_token)
        # A tokenizer that adds a space adds none to a text that begins with one.
        where = "(?= )" if self.adds_space else f"(?!{image}|$)"
        return re.sub(image + where, f"{self.image_token} ", prompt)


def make_processor(config: LlavaHrConfig, tokenizer: Any) -> LlavaHrProcessor:
    """Make the processor: images padded to a square with the mean colour, resized, normalized; Vicuna's chat template.

    Args:
        config: of the model; says size and number of visual tokens.
        tokenizer: of the text model; has the special token "<image>" under the id that the config says.

    Raises:
        ValueError: the tokenizer's "<image>" has another id than the config says.
    """
    found = tokenizer.convert_tokens_to_ids("<image>")
    if found != config.image_token_index:
        raise ValueError(
            f"tokenizer has id {found} for '<image>', the config image_token_index={config.image_token_index}: must be "
            "the same; add '<image>' to the tokenizer as a special token"
        )
    size = config.vision_config.input_image_size
    images = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    behind, first = (tokenizer(text, add_special_tokens=False).input_ids for text in ("<image>a", "a"))
    return LlavaHrProcessor(
        images,
        tokenizer,
        patch_size=size // config.vision_config.grid,
        chat_template=CHAT_TEMPLATE,
        adds_space=behind[1:] == first,
    )


def register() -> None:
    """Make transformers' Auto classes know LLaVA-HR. May be called again."""
    AutoConfig.register(LlavaHrConfig.model_type, LlavaHrConfig, exist_ok=True)
    AutoConfig.register(LlavaHrVisionConfig.model_type, LlavaHrVisionConfig, exist_ok=True)
    AutoModel.register(LlavaHrConfig, LlavaHrModel, exist_ok=True)
    AutoModel.register(LlavaHrVisionConfig, LlavaHrVisionModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaHrConfig, LlavaHrForConditionalGeneration, exist_ok=True)
    images = {"pil": LlavaImageProcessorPil}
    if is_torchvision_available():
        from transformers import LlavaImageProcessor

        images["torchvision"] = LlavaImageProcessor
    AutoImageProcessor.register(LlavaHrConfig, image_processor_classes=images, exist_ok=True)
    AutoProcessor.register(LlavaHrConfig, LlavaHrProcessor, exist_ok=True)
