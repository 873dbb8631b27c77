"""The attention that a vision tower's [CLS] token pays to each patch, for scorers that rank by it.

The tower may run long before the prefill (generate encodes images ahead), so what was seen is kept for the last few
images and found again by the tower's output.

Shapes: C crops (images, or parts of one), T tokens of the tower with [CLS] first, d its width, B batch, Q columns of
the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fitprune.adapters import AdaptedModel

KEPT = 4  # tower runs remembered


class Tower:
    """Watches a vision tower, and remembers its last outputs with the [CLS] attention of each crop."""

    def __init__(self) -> None:
        self._weights: torch.Tensor | None = None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # output [C, T, d], attention [C, T - 1]

    def at_attention(self, attention: Any, hidden: torch.Tensor) -> None:
        """Compute, beside the tower's own attention, the row of [CLS]: the mean over heads."""
        crops, length, _ = hidden.shape
        with torch.no_grad():
            query = attention.q_proj(hidden[:, :1]).view(crops, 1, -1, attention.head_dim).transpose(1, 2)
            key = attention.k_proj(hidden).view(crops, length, -1, attention.head_dim).permute(0, 2, 3, 1)
            weights = ((query @ key) * attention.scale).float().softmax(-1)
        self._weights = weights[:, :, 0, 1:].mean(1)

    def after_tower(self, output: Any) -> None:
        """Keep what was seen with the output that it belongs to."""
        if self._weights is not None:
            self._seen = [*self._seen[1 - KEPT :], (output.last_hidden_state, self._weights)]
            self._weights = None

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """Find the attention of these outputs [C, T, d], repeated or in another order, as [C, T - 1].

        Raises:
            ValueError: the tower did not make them inside the block.
        """
        rows = [row for outputs, weights in self._seen for row in zip(outputs, weights, strict=True)]
        found = []
        for crop in output:
            match = next((weights for seen, weights in rows if torch.equal(seen, crop.to(seen.device))), None)
            if match is None:
                raise ValueError(
                    "the scorer reads the vision tower's [CLS] attention, and these image features were not made "
                    "inside the prune block: pass pixel_values, or encode the images inside it"
                )
            found.append(match)
        return torch.stack(found)


@contextlib.contextmanager
def watching(adapted: AdaptedModel) -> Iterator[Tower]:
    """Watch the vision tower of a model, until the block ends.

    Raises:
        ValueError: the tower has no [CLS] token that the model leaves out, or its features come of several layers.
    """
    module, config = adapted.model.base_model.vision_tower, adapted.model.config
    layers = getattr(getattr(module, "encoder", None), "layers", None)
    has_cls = hasattr(getattr(module, "embeddings", None), "class_embedding")
    number = getattr(config, "vision_feature_layer", None)
    if (
        not isinstance(layers, nn.ModuleList)
        or not has_cls
        or not isinstance(number, int)
        or getattr(config, "vision_feature_select_strategy", None) != "default"
    ):
        raise ValueError(
            f"the vision tower ({type(module).__name__}, features of layer {number!r}) has no [CLS] token whose "
            "attention could rank the visual tokens: use another method"
        )
    tower = Tower()
    # Hidden state -1 is what the last layer made, -2 the one before it: the attention that the features went through.
    attention: Any = layers[len(layers) + number if number < 0 else number - 1].self_attn
    handles = [
        attention.register_forward_pre_hook(
            lambda own, args, kwargs: tower.at_attention(own, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        module.register_forward_hook(lambda _, __, output: tower.after_tower(output)),
    ]
    try:
        yield tower
    finally:
        for handle in handles:
            handle.remove()


def cls_attention(tower: Tower, adapted: AdaptedModel, given: Mapping[str, Any], visual: torch.Tensor) -> torch.Tensor:
    """Deal the [CLS] attention of a call's images to its visual tokens.

    Args:
        tower: what was watched.
        adapted: the model.
        given: the arguments of the call, with `mm_encoder_outputs`.
        visual: [B, Q] bool, the visual tokens.

    Returns:
        [B, Q] fp32, 0 for text. LLaVA-NeXT's newline tokens, which are no patch, get 0.

    Raises:
        ValueError: the tower did not make these features inside the block.
    """
    outputs = given["mm_encoder_outputs"]["image"]
    weights = tower.of(outputs.last_hidden_state)
    model = adapted.model.base_model
    if (sizes := given.get("image_sizes")) is not None and hasattr(model, "pack_image_features"):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        crops = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in sizes
        ]
        packed, _ = model.pack_image_features(
            torch.split(weights[..., None], crops), sizes, "default", image_newline=weights.new_zeros(1)
        )
        weights = torch.cat(packed)
    values = torch.zeros(visual.shape, device=weights.device)
    return values.masked_scatter(visual.to(weights.device), weights.flatten())
