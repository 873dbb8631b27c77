"""The attention that a vision tower's [CLS] token pays to each patch, for scorers that rank by it.

The images may be encoded long before the prefill (generate does it ahead). So the weights of the last few calls of the
image encoder are kept, and looked up by an image's features.

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

from fitprune._support.host import crops_of_size, packed, packs_features
from fitprune.families.adapter import AdaptedModel

KEPT = 4  # calls of the image encoder whose weights are kept


class Tower(threading.local):
    """Watches a model's image encoder, and keeps its last features with the [CLS] attention of their tokens.

    A threading.local, since a server's threads encode other images at the same time: each sees its own calls alone.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._base = adapted.model.base_model
        self._weights: torch.Tensor | None = None  # [C, T - 1] of the call that is running
        self._calls: list[
            list[tuple[torch.Tensor, torch.Tensor]]
        ] = []  # of each call: every image's features and weights

    def at_attention(self, attention: Any, hidden: torch.Tensor) -> None:
        """Compute the row of [CLS] of the tower's attention, the mean over heads, from its input [C, T, d]."""
        crops, length, _ = hidden.shape
        with torch.no_grad():
            query = attention.q_proj(hidden[:, :1]).view(crops, 1, -1, attention.head_dim).transpose(1, 2)
            key = attention.k_proj(hidden).view(crops, length, -1, attention.head_dim).permute(0, 2, 3, 1)
            weights = ((query @ key) * attention.scale).float().softmax(-1)
        self._weights = weights[:, :, 0, 1:].mean(1)

    def encoded(self, features: Sequence[torch.Tensor], sizes: torch.Tensor | None) -> None:
        """Keep each image's features [tokens, width] with the weights of its tokens; `sizes` as for `crops_of`."""
        if self._weights is not None:
            weights = self._by_token(self._weights, sizes)
            self._calls = [*self._calls[1 - KEPT :], list(zip(features, weights, strict=True))]
            self._weights = None

    def _by_token(self, weights: torch.Tensor, sizes: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Deal patches' weights to tokens, by image; LLaVA-NeXT's newline tokens, which are no patch, get 0."""
        if not packs_features(self._base):
            return list(weights)
        assert sizes is not None
        parts = torch.split(weights[..., None], crops_of(self._adapted, sizes, len(sizes)))
        return [part[:, 0] for part in packed(self._base, parts, sizes, newline=weights.new_zeros(1))]

    def deal(self, features: Sequence[torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """Give each visual token its weight, [B, Q]; 0 for text.

        Args:
            features: each image's features [tokens, width], in the order of their tokens.
            visual: [B, Q] bool.

        Raises:
            ValueError: an image was not encoded inside the block.
        """
        known = [image for call in self._calls for image in call]
        parts = []
        for image in features:
            own = next((w for other, w in known if other.shape == image.shape and torch.equal(other, image)), None)
            if own is None:
                raise ValueError(
                    "the scorer reads the vision tower's [CLS] attention, and these image features were not made "
                    "inside the prune block: pass pixel_values, or encode the images inside it"
                )
            parts.append(own)
        weights = torch.cat(parts)
        values = torch.zeros(visual.shape, device=weights.device)
        return values.masked_scatter(visual.to(weights.device), weights)


def crops_of(adapted: AdaptedModel, sizes: torch.Tensor | None, images: int) -> list[int]:
    """Count the crops that the vision tower sees of each image.

    Args:
        adapted: the model.
        sizes: [images, 2], height and width of each image, where the processor gives them; None for one crop each.
        images: the number of images.
    """
    grid = getattr(adapted.model.config, "image_grid_pinpoints", None)
    if sizes is None or grid is None:
        return [1] * images
    side = adapted.model.config.vision_config.image_size
    return [crops_of_size(size, grid, side) for size in sizes]


@contextlib.contextmanager
def watching(adapted: AdaptedModel) -> Iterator[Tower]:
    """Watch the image encoder of a model, until the block ends.

    Args:
        adapted: the model.

    Raises:
        ValueError: the tower has no [CLS] token that the model leaves out, or its features come from several layers.
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
            f"the vision tower of this {config.model_type} model has no [CLS] token, or its attention does not rank "
            "the visual tokens (CLIP's does, where all its features but [CLS] are used), and scorer 'cls' needs one "
            "that does: use another method"
        )
    tower = Tower(adapted)
    encode, own = base.get_image_features, vars(base).get("get_image_features")

    @functools.wraps(encode)
    def encode_watched(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        sizes = kwargs.get("image_sizes", args[1] if len(args) > 1 else None)
        tower.encoded(outputs.pooler_output, sizes)
        return outputs

    # Hidden state -1 is the last layer's output, -2 that of the layer before: the last attention before the features.
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
        del base.get_image_features  # which uncovers the class's own
        if own is not None:
            base.get_image_features = own
