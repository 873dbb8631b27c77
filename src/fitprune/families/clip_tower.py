"""The attention that a vision tower's [CLS] token pays to each patch, for scorers that rank by it.

The images may be encoded long before the prefill (generate does it ahead), so what was seen is kept for the last few
calls of the image encoder, and found again by an image's features.

Shapes: C crops (images, or parts of one), T tokens of the tower with [CLS] first, d its width, B batch, Q columns of
the prompt.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fitprune.families.adapter import AdaptedModel

KEPT = 4  # calls of the image encoder remembered


class Tower(threading.local):
    """Watches a model's image encoder, and remembers its last features with the [CLS] attention of their tokens.

    What it remembers belongs to the thread that encoded.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._base = adapted.model.base_model
        self._weights: torch.Tensor | None = None  # [C, T - 1] of the call that is running
        self._seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # by call: each image's features and weights

    def at_attention(self, attention: Any, hidden: torch.Tensor) -> None:
        """Compute, beside the tower's own attention, the row of [CLS]: the mean over heads."""
        crops, length, _ = hidden.shape
        with torch.no_grad():
            query = attention.q_proj(hidden[:, :1]).view(crops, 1, -1, attention.head_dim).transpose(1, 2)
            key = attention.k_proj(hidden).view(crops, length, -1, attention.head_dim).permute(0, 2, 3, 1)
            weights = ((query @ key) * attention.scale).float().softmax(-1)
        self._weights = weights[:, :, 0, 1:].mean(1)

    def encoded(self, features: Sequence[torch.Tensor], sizes: torch.Tensor | None) -> None:
        """Remember each image's features [tokens, width] with the weights of its tokens."""
        if self._weights is not None:
            weights = self._by_token(self._weights, sizes)
            self._seen = [*self._seen[1 - KEPT :], list(zip(features, weights, strict=True))]
            self._weights = None

    def _by_token(self, weights: torch.Tensor, sizes: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Deal patches' weights to tokens, by image; LLaVA-NeXT's newline tokens, which are no patch, get 0."""
        if not hasattr(self._base, "pack_image_features"):
            return list(weights)
        assert sizes is not None
        parts = torch.split(weights[..., None], crops_of(self._adapted, sizes, len(sizes)))
        packed, _ = self._base.pack_image_features(parts, sizes, "default", image_newline=weights.new_zeros(1))
        return [part[:, 0] for part in packed]

    def deal(self, features: Sequence[torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """Give each visual token [B, Q] its weight, in the order of the images' features; 0 for text.

        Raises:
            ValueError: an image was not encoded inside the block.
        """
        known = [image for call in self._seen for image in call]
        found = []
        for image in features:
            own = next((w for seen, w in known if seen.shape == image.shape and torch.equal(seen, image)), None)
            if own is None:
                raise ValueError(
                    "the scorer reads the vision tower's [CLS] attention, and these image features were not made "
                    "inside the prune block: pass pixel_values, or encode the images inside it"
                )
            found.append(own)
        weights = torch.cat(found)
        values = torch.zeros(visual.shape, device=weights.device)
        return values.masked_scatter(visual.to(weights.device), weights)


def crops_of(adapted: AdaptedModel, sizes: torch.Tensor | None, images: int) -> list[int]:
    """Count the crops that the vision tower sees of each image.

    Args:
        adapted: the model.
        sizes: [images, 2], height and width of each image, where the processor gives them; None for one crop each.
        images: how many there are.
    """
    grid = getattr(adapted.model.config, "image_grid_pinpoints", None)
    if sizes is None or grid is None:
        return [1] * images
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = adapted.model.config.vision_config.image_size
    return [image_size_to_num_patches(size, grid, side) for size in sizes]


@contextlib.contextmanager
def watching(adapted: AdaptedModel) -> Iterator[Tower]:
    """Watch the image encoder of a model, until the block ends.

    Raises:
        ValueError: the tower has no [CLS] token that the model leaves out, or its features come of several layers.
    """
    base, config = adapted.model.base_model, adapted.model.config
    module = getattr(base, "vision_tower", None)
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
            f"the vision tower of this {config.model_type} model has no [CLS] token, or none whose attention is known "
            "to rank the visual tokens (as CLIP's does where its features but [CLS] are used), as scorer 'cls' does: "
            "use another method"
        )
    tower = Tower(adapted)
    encode, own = base.get_image_features, vars(base).get("get_image_features")

    @functools.wraps(encode)
    def encode_watched(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        sizes = kwargs.get("image_sizes", args[1] if len(args) > 1 else None)
        tower.encoded(outputs.pooler_output, sizes)
        return outputs

    # Hidden state -1 is what the last layer made, -2 the one before it: the attention that the features went through.
    attention: Any = layers[len(layers) + number if number < 0 else number - 1].self_attn
    handle = attention.register_forward_pre_hook(
        lambda own, args, kwargs: tower.at_attention(own, args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    base.get_image_features = encode_watched
    try:
        yield tower
    finally:
        handle.remove()
        del base.get_image_features  # the class's own is seen again
        if own is not None:
            base.get_image_features = own
