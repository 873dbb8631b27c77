"""Run LLaVA-HR as an ordinary transformers model: two vision towers at two resolutions, then LLaVA.

A ConvNeXt sees the image at its full size, CLIP at a lower one. Adapters add the ConvNeXt's features to CLIP's after
each of the first three quarters of its layers, and a last sum gives one visual token for each of CLIP's patches: 1,024
of a 1,024-pixel image. CLIP, ConvNeXt, projector, text model, generation and processor are transformers' own; what is
new is the way through both towers and the adapters.

Legend: B images, P patches of CLIP (a square number), F and S channels of CLIP and of the ConvNeXt.

Source: arXiv:2403.03003, and the authors' code at github.com/luogen1996/LLaVA-HR, commit 1212ffb.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, CLIPVisionModel, ConvNextConfig, LlavaForConditionalGeneration, LlavaModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextLayer,
    ConvNextLayerNorm,
    ConvNextStage,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel

from fitprune.families.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig


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
    """transformers' ConvNeXt without its head: a plain module, since it has no attention implementation to choose."""

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
        """Give all modules that an image goes through after the embeddings, in order."""
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


class LlavaHrVisionModel(CLIPVisionModel):
    """CLIP with a ConvNeXt beside it, and what joins them."""

    config_class = LlavaHrVisionConfig
    # The towers meet four times: they stay on one device.
    _no_split_modules: ClassVar[list[str]] = ["LlavaHrVisionModel"]

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__(config)
        self.post_layernorm = nn.Identity()  # of CLIP's head, which is not used here
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
            **kwargs: for CLIP's attention.

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
        features: torch.Tensor = self.convnext.embeddings(pixel_values)
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
        # A call of the module, so that accelerate can bring offloaded weights; position 0 is the class token's.
        positions = weights.position_embedding(torch.arange(1, weights.num_positions, device=patches.device))[None]
        if positions.shape[1] != patches.shape[1]:
            grid = _as_map(positions.float())
            grid = functional.interpolate(grid, size=(config.grid,) * 2, mode="bicubic", antialias=True)
            positions = _as_tokens(grid).to(patches.dtype)
        tokens: torch.Tensor = self.pre_layrnorm(patches + positions)
        return tokens


class LlavaHrModel(LlavaModel):
    """LLaVA with LLaVA-HR's vision tower, without a language modelling head."""

    config_class = LlavaHrConfig

    def __init__(self, config: LlavaHrConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's would look for the tower among the Auto classes
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
            **kwargs: for the vision tower; LLaVA's choice of a layer is accepted and has no effect here.

        Returns:
            `pooler_output`: for each image its visual tokens, [P, hidden size of the text model].
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"):
            kwargs.pop(name, None)
        encoded = self.vision_tower(pixel_values, **kwargs)
        encoded.pooler_output = list(self.multi_modal_projector(encoded.last_hidden_state))
        return encoded if return_dict is None or return_dict else encoded.to_tuple()


class LlavaHrForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-HR with its language modelling head."""

    config_class = LlavaHrConfig

    def __init__(self, config: LlavaHrConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaHrModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
