"""Find a prompt's visual tokens, and the image or video frame that each belongs to.

The model's own encoder says how many tokens each image has; the family's row says how its features are to be read. So
the images are encoded here, before the model is called: its arguments `pixel_values` and `pixel_values_videos` become
None, and the features go in as `mm_encoder_outputs`, as `generate` passes them (`Images.changed`).

Shapes: B batch, N tokens of this call, d hidden size, I images (or frames) of the whole batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune._support.host import ENCODED
from fitprune.families.adapter import AdaptedModel
from fitprune.families.frames import frames_of
from fitprune.families.image_rules import by_tiles, checked_numbers, from_zero

# By modality, the argument with its pixels, as processors and models name it; the second name is Video-LLaVA's in
# transformers 5.19.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


@dataclasses.dataclass(frozen=True)
class Images:
    """The visual tokens of a call.

    Attributes:
        visual: [B, N] bool.
        image: [B, N] int64, number of the image or frame that each token belongs to, in the order of its sample; -1
            for text.
        features: each image's features [tokens, d] as the encoders give them: images, then videos.
        changed: arguments that replace the call's own: each argument with pixels by None, and `mm_encoder_outputs`
            with the features of all images. Empty where the call has its images encoded already.
    """

    visual: torch.Tensor
    image: torch.Tensor
    features: Sequence[torch.Tensor]
    changed: dict[str, Any]


def given_images(call: Mapping[str, Any]) -> Any:
    """Give the images or videos of a call, encoded or as pixels; None for a call of text alone."""
    encoded = call.get(ENCODED) or {}
    values = [encoded.get(modality) for modality in PIXELS]
    values += [call.get(name) for names in PIXELS.values() for name in names]
    return next((images for images in values if images is not None), None)


def visual_mask(
    adapted: AdaptedModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the visual tokens: bool [B, N].

    Args:
        adapted: the model.
        input_ids: [B, N]; None to look for the visual tokens' embedding in `inputs_embeds`, as transformers does.
        inputs_embeds: [B, N, d], before image features are put in.
    """
    masks = [_marked(adapted, modality, input_ids, inputs_embeds) for modality in adapted.token_ids]
    return torch.stack(masks).any(0)


def modality_of(adapted: AdaptedModel, tokens: torch.Tensor) -> str:
    """Say whether visual tokens, ids [N], are of an "image" or of a "video": what the first of them is."""
    return next(name for name, token in adapted.token_ids.items() if token == int(tokens[0]))


def _marked(
    adapted: AdaptedModel, modality: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    token = adapted.token_ids[modality]
    if input_ids is not None:
        return input_ids == token
    assert inputs_embeds is not None
    embedding: torch.Tensor = adapted.model.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
    return (inputs_embeds == embedding).all(-1)


def read_images(adapted: AdaptedModel, call: Mapping[str, Any], cache: Any = None) -> Images:
    """Find a call's visual tokens and their images; encode these, unless that is done already.

    Args:
        adapted: the model.
        call: the arguments of the model's call, with pixels or `mm_encoder_outputs` (as generate makes them).
        cache: the call's KV cache, if it has one.

    Raises:
        ValueError: the call has no image, features and visual tokens differ in number, the family has no rule for
            videos, or the features come from generate's chunked prefill, which cuts through images.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if given_images(call) is None:
        raise ValueError("no image is given: pass the processor's pixel_values")
    encoded, changed = _pixels_to_features(adapted, call)
    visual = visual_mask(adapted, ids, embeds)
    owner, first, features = torch.full_like(visual, -1, dtype=torch.long), 0, []
    for modality, outputs in encoded.items():
        parts = _features(outputs)
        features += parts
        marked = _marked(adapted, modality, ids, embeds) if modality in adapted.token_ids else None
        if marked is None or not bool(marked.any()):  # some models mark a video's frames as images
            marked = _marked(adapted, "image", ids, embeds)
        _require_features(marked, parts, modality, cache)
        own = _by_rule(adapted, modality, marked, [len(part) for part in parts], call)
        owner = torch.where(own >= 0, own + first, owner)
        first = int(owner.max()) + 1
    if bool((left := visual & (owner < 0)).any()):
        what = "image" if ids is None else modality_of(adapted, ids[left])
        raise ValueError(
            f"the prompt has {int(left.sum())} visual tokens of {what}s that are not given: pass the {PIXELS[what][0]} "
            "of all of this turn's"
        )
    return Images(visual, from_zero(owner), features, changed)


def _by_rule(
    adapted: AdaptedModel, modality: str, marked: torch.Tensor, lengths: Sequence[int], call: Mapping[str, Any]
) -> torch.Tensor:
    """Number the images or frames of a modality by the rule of the family's row.

    Args:
        adapted: the model.
        modality: "image" or "video".
        marked: [B, N] bool, the modality's visual tokens.
        lengths: of each image's or video's features.
        call: the arguments of the model's call.

    Returns:
        [B, N] int64, -1 where `marked` is False.
    """
    family, ids = adapted.family, call.get("input_ids")
    rule = family.images if modality == "image" else family.video
    if callable(rule):
        return checked_numbers(rule(marked, ids), marked, family.model_type)
    if rule == "tiles":
        return by_tiles(images_of(marked), ids)
    if rule == "joined":
        between = torch.nn.functional.pad(marked[:, :-2] & marked[:, 2:], (1, 1))
        return images_of(marked | between).masked_fill(~marked, -1)
    if rule == "runs":
        return images_of(marked)
    if rule == "":
        raise ValueError(
            f"family {family.model_type!r} has no rule for {modality}s: leave the {modality} out, or register a family "
            "with one (docs/extending.md)"
        )
    if modality == "video":
        lengths = frames_of(family, adapted.model.config, lengths, marked, call)
    return images_of(marked, lengths)


def _pixels_to_features(adapted: AdaptedModel, call: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Encode the images of a call that come as pixels, as generate does before it calls the model.

    Args:
        adapted: the model.
        call: the arguments of its call.

    Returns:
        By modality the encoder's outputs; and the arguments that change, as `Images.changed` says.
    """
    outputs = {name: value for name, value in (call.get(ENCODED) or {}).items() if value is not None}
    changed: dict[str, Any] = {}
    for modality, names in PIXELS.items():
        pixels = next((name for name in names if call.get(name) is not None), None)
        if modality in outputs:
            if outputs[modality].last_hidden_state is None:
                raise ValueError(
                    "mm_encoder_outputs have no last_hidden_state, as in generate's chunked prefill, whose chunks cut "
                    f"images and questions: drop prefill_chunk_size, and pass features as get_{modality}_features "
                    "returns them"
                )
        elif pixels is not None:
            encode = getattr(adapted.model.base_model, f"get_{modality}_features", None)
            if encode is None:
                raise ValueError(
                    f"{pixels} is passed, and model_type={adapted.model.config.model_type!r} has no "
                    f"get_{modality}_features: leave it out"
                )
            taken = [name for name in inspect.signature(encode).parameters if call.get(name) is not None]
            outputs[modality] = encode(**{name: call[name] for name in taken}, return_dict=True)
            changed[pixels] = None
    if changed:
        changed[ENCODED] = outputs
    return {modality: outputs[modality] for modality in PIXELS if modality in outputs}, changed


def _features(outputs: Any) -> list[torch.Tensor]:
    """Each image's features [tokens, d], in whichever form the encoder gives them."""
    pooled = outputs.pooler_output
    if isinstance(pooled, torch.Tensor) and pooled.ndim == 2:
        return [pooled]
    return [part.reshape(-1, part.shape[-1]) for part in pooled]


def feature_lengths(adapted: AdaptedModel, call: Mapping[str, Any], modality: str) -> list[int]:
    """Count the features of each image of a call, or of each video, as the model's own encoder gives them."""
    with torch.no_grad():
        outputs = _pixels_to_features(adapted, call)[0].get(modality)
    return [] if outputs is None else [len(part) for part in _features(outputs)]


def _require_features(marked: torch.Tensor, parts: Sequence[torch.Tensor], modality: str, cache: Any) -> None:
    """Refuse a prompt that has not one visual token for each feature of its images."""
    if (tokens := int(marked.sum())) != (length := sum(len(part) for part in parts)):
        remedy = "make the prompt with the model's own processor"
        if cache is not None and cache.get_seq_length():
            remedy += ", and pass only the images of this turn: those of earlier turns are in the KV cache"
        raise ValueError(
            f"the prompt has {tokens} visual tokens, but its {len(parts)} {modality}(s) have {length} features: "
            f"must be the same number; {remedy}"
        )


def images_of(visual: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """Number the images of each sample.

    Args:
        visual: [B, N] bool.
        lengths: visual tokens of each image, in the order of the batch, as models deal features to tokens; they add up
            to the visual tokens. Without them a run of adjacent visual tokens is one image.

    Returns:
        [B, N] int64: 0, 1, ... in the order of the images, -1 where no visual token is.
    """
    if lengths is not None:
        number = torch.arange(len(lengths), device=visual.device)
        owner = number.repeat_interleave(torch.tensor(lengths, dtype=torch.long, device=visual.device))
        image = torch.full_like(visual, -1, dtype=torch.long).masked_scatter(visual, owner)
        first = torch.where(visual, image, len(lengths)).amin(1, keepdim=True)
        return torch.where(visual, image - first, -1)
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    return torch.where(visual, starts.long().cumsum(1) - 1, -1)


def tokens_of(image: torch.Tensor) -> list[list[int]]:
    """Count the visual tokens of each image: for each sample a list as long as that of the sample with most images.

    Args:
        image: [B, N] int64, number of the image each token belongs to, -1 for text.
    """
    counts = torch.zeros(image.shape[0], int(image.max()) + 2, dtype=torch.long, device=image.device)
    return counts.scatter_add_(1, image + 1, torch.ones_like(image))[:, 1:].tolist()
