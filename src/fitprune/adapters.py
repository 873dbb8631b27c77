"""The one place that knows model families: where their parts are, and how large.

Keyed by `config.model_type`. Everything else works on what `adapt` returns.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fitprune.flops import DecoderShape, ModelShape, VisionShape

FAMILIES = ("llava", "llava_next")


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A model's parts, under the same names for every family.

    Attributes:
        model: the whole model, as the user holds it.
        decoder: the language model that owns `layers`.
        layers: the decoder layers, a ModuleList; each has `self_attn` and `mlp`.
        shape: type and sizes.
        image_token_id: id that marks a visual token's position in `input_ids`.
    """

    model: Any
    decoder: Any
    layers: Any
    shape: ModelShape
    image_token_id: int


def adapt(model: Any) -> AdaptedModel:
    """Find the parts of a model.

    Raises:
        ValueError: the family is not supported, or the model has no decoder layers.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model is a {type(model).__name__}: must be a transformers model with a config")
    shape = model_shape(config)
    decoder = getattr(getattr(model, "model", None), "language_model", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"model is a {type(model).__name__} without decoder layers at model.language_model.layers; "
            "pass the ...ForConditionalGeneration model"
        )
    if len(layers) != shape.decoder.layers:
        raise ValueError(f"model has {len(layers)} decoder layers but its config says {shape.decoder.layers}")
    return AdaptedModel(model, decoder, layers, shape, config.image_token_id)


def model_shape(config: Any) -> ModelShape:
    """Read type and sizes from a config.

    Raises:
        ValueError: the family is not supported.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: not supported; must be one of {list(FAMILIES)}")
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads
    decoder = DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
    )
    tower = VisionShape(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    return ModelShape(model_type, decoder, tower)


def visual_mask(
    adapted: AdaptedModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the visual tokens: bool [B, N].

    Args:
        adapted: the model.
        input_ids: [B, N]; None to look for the image token's embedding in `inputs_embeds`, as transformers does.
        inputs_embeds: [B, N, d], before image features are put in.
    """
    if input_ids is not None:
        return input_ids == adapted.image_token_id
    assert inputs_embeds is not None
    token = torch.tensor(adapted.image_token_id, device=inputs_embeds.device)
    embedding: torch.Tensor = adapted.model.get_input_embeddings()(token)
    return (inputs_embeds == embedding).all(-1)


def crops_of(adapted: AdaptedModel, sizes: torch.Tensor | None, images: int) -> list[int]:
    """Count the crops that the vision tower sees of each image.

    Args:
        adapted: the model.
        sizes: [images, 2], height and width of each image, where the processor gives them; None for one crop each.
        images: how many there are.
    """
    if sizes is None:
        return [1] * images
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = adapted.model.config
    grid, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [image_size_to_num_patches(size, grid, side) for size in sizes]


def encode_images(adapted: AdaptedModel, given: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Find out how many visual tokens each image has; encode the images for it, unless that is done already.

    Args:
        adapted: the model.
        given: the arguments of its call, with `pixel_values` or `mm_encoder_outputs` (as generate makes them).

    Returns:
        Visual tokens of each image, in the order of the batch, and the arguments that replace those given.

    Raises:
        ValueError: no image is given, or the features come from generate's chunked prefill, which cuts through images.
    """
    outputs = (given.get("mm_encoder_outputs") or {}).get("image")
    changed: dict[str, Any] = {}
    if outputs is None:
        if given.get("pixel_values") is None:
            raise ValueError("no image is given: pass the processor's pixel_values")
        encode = adapted.model.base_model.get_image_features
        names = [name for name in inspect.signature(encode).parameters if given.get(name) is not None]
        outputs = encode(**{name: given[name] for name in names}, return_dict=True)
        changed = {**dict.fromkeys(names), "mm_encoder_outputs": {"image": outputs}}
    elif outputs.last_hidden_state is None:
        raise ValueError(
            "mm_encoder_outputs hold no last_hidden_state, as in generate's chunked prefill, whose chunks cut images "
            "and questions: drop prefill_chunk_size, and pass features as get_image_features returns them"
        )
    return [len(features) for features in outputs.pooler_output], changed
