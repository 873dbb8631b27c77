"""Which positions of a prompt are visual tokens, and which image or video frame each belongs to.

The model's own encoders say how many tokens each image has; `families` says how their features are to be read.

Shapes: B batch, N tokens of this call, d hidden size, I images (or frames) of the whole batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune.families.adapter import AdaptedModel

# By modality, what processors and models call its pixels; Video-LLaVA has a name of its own in transformers 5.19.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


@dataclasses.dataclass(frozen=True)
class Images:
    """The visual tokens of a call.

    Attributes:
        visual: [B, N] bool.
        image: [B, N] int64, number of the image or frame that each token belongs to, in the order of its sample; -1
            for text.
        features: each image's features [tokens, d] as the encoders give them: images, then videos.
        changed: arguments that replace the call's own: its images, encoded.
    """

    visual: torch.Tensor
    image: torch.Tensor
    features: Sequence[torch.Tensor]
    changed: dict[str, Any]


def given_images(given: Mapping[str, Any]) -> Any:
    """What a call gives of images or videos, encoded or not; None for a call of text alone."""
    encoded = given.get("mm_encoder_outputs") or {}
    found = [encoded.get(modality) for modality in PIXELS]
    found += [given.get(name) for names in PIXELS.values() for name in names]
    return next((images for images in found if images is not None), None)


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
    """Say whether visual tokens, ids [N], are those of an "image" or of a "video"; by the first."""
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


def read_images(adapted: AdaptedModel, given: Mapping[str, Any], cache: Any = None) -> Images:
    """Find a call's visual tokens and their images; encode these, unless that is done already.

    Args:
        adapted: the model.
        given: the arguments of its call, with pixels or `mm_encoder_outputs` (as generate makes them).
        cache: the call's KV cache, if it has one.

    Raises:
        ValueError: no image is given, features and visual tokens differ in number, or the features come from
            generate's chunked prefill, which cuts through images.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if given_images(given) is None:
        raise ValueError("no image is given: pass the processor's pixel_values")
    encoded, changed = _encoded(adapted, given)
    visual = visual_mask(adapted, ids, embeds)
    owner, first, features = torch.full_like(visual, -1, dtype=torch.long), 0, []
    for modality, outputs in encoded.items():
        parts = _features(outputs)
        features += parts
        marked = _marked(adapted, modality, ids, embeds) if modality in adapted.token_ids else None
        if marked is None or not bool(marked.any()):  # some models mark a video's frames as images
            marked = _marked(adapted, "image", ids, embeds)
        _require_features(marked, parts, modality, cache)
        how = adapted.family.images if modality == "image" else adapted.family.video
        lengths = [len(part) for part in parts]
        if how == "tiles":
            own = _by_tiles(marked, ids)
        elif how == "joined":
            between = torch.nn.functional.pad(marked[:, :-2] & marked[:, 2:], (1, 1))
            own = images_of(marked | between).masked_fill(~marked, -1)
        elif how in ("runs", ""):
            own = images_of(marked)
        else:
            own = images_of(marked, lengths if modality == "image" else _frames(adapted, how, lengths, marked, given))
        owner = torch.where(own >= 0, own + first, owner)
        first = int(owner.max()) + 1
    if bool((left := visual & (owner < 0)).any()):
        what = "image" if ids is None else modality_of(adapted, ids[left])
        raise ValueError(
            f"the prompt has {int(left.sum())} visual tokens of {what}s that are not given: pass the {PIXELS[what][0]} "
            "of all of this turn's"
        )
    return Images(visual, _numbered(owner), features, changed)


def _encoded(adapted: AdaptedModel, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Encode the images that are not, as generate does before it calls the model."""
    outputs = {name: value for name, value in (given.get("mm_encoder_outputs") or {}).items() if value is not None}
    changed: dict[str, Any] = {}
    for modality, named in PIXELS.items():
        pixels = next((name for name in named if given.get(name) is not None), None)
        if modality in outputs:
            if outputs[modality].last_hidden_state is None:
                raise ValueError(
                    "mm_encoder_outputs hold no last_hidden_state, as in generate's chunked prefill, whose chunks cut "
                    f"images and questions: drop prefill_chunk_size, and pass features as get_{modality}_features "
                    "returns them"
                )
        elif pixels is not None:
            encode = getattr(adapted.model.base_model, f"get_{modality}_features")
            names = [name for name in inspect.signature(encode).parameters if given.get(name) is not None]
            outputs[modality] = encode(**{name: given[name] for name in names}, return_dict=True)
            changed[pixels] = None
    if changed:
        changed["mm_encoder_outputs"] = outputs
    return {modality: outputs[modality] for modality in PIXELS if modality in outputs}, changed


def _features(outputs: Any) -> list[torch.Tensor]:
    """Each image's features [tokens, d], in whichever form the encoder gives them."""
    pooled = outputs.pooler_output
    if isinstance(pooled, torch.Tensor) and pooled.ndim == 2:
        return [pooled]
    return [part.reshape(-1, part.shape[-1]) for part in pooled]


def feature_lengths(adapted: AdaptedModel, given: Mapping[str, Any], modality: str) -> list[int]:
    """Count the features of each image of a call, or of each video, as the model's own encoder gives them."""
    with torch.no_grad():
        outputs = _encoded(adapted, given)[0].get(modality)
    return [] if outputs is None else [len(part) for part in _features(outputs)]


def _require_features(marked: torch.Tensor, parts: Sequence[torch.Tensor], modality: str, cache: Any) -> None:
    """Refuse a prompt whose visual tokens are not as many as its images' features."""
    if (tokens := int(marked.sum())) != (there := sum(len(part) for part in parts)):
        remedy = "make the prompt with the model's own processor"
        if cache is not None and cache.get_seq_length():
            remedy += ", and pass only the images of this turn: those of earlier turns are in the KV cache"
        raise ValueError(
            f"the prompt has {tokens} visual tokens, but its {len(parts)} {modality}(s) have {there} features: "
            f"must be as many; {remedy}"
        )


def _by_tiles(marked: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Number the images of each sample [B, N] where each is cut into tiles, which are runs of tokens.

    Processors mark each tile by a token before it; an image's last tile, which shows it whole, has a marker of its own.
    Every sample ends with such a tile, so its marker tells where images end.
    """
    if ids is None:
        raise ValueError(
            "inputs_embeds are given without input_ids: this model's images are cut into tiles, which only ids tell "
            "apart; pass input_ids"
        )
    run = images_of(marked)
    image = torch.full_like(run, -1)
    for row, own in enumerate(run):
        here = own >= 0
        if not bool(here.any()):
            continue
        begins = torch.nonzero(here & (own != torch.nn.functional.pad(own[:-1], (1, 0), value=-1)))[:, 0]
        marker = ids[row, (begins - 1).clamp(min=0)]
        ends = (marker == marker[-1]).long()
        image[row, here] = (ends.cumsum(0) - ends)[own[here]]
    return image


def _frames(
    adapted: AdaptedModel, how: str, lengths: Sequence[int], marked: torch.Tensor, given: Mapping[str, Any]
) -> list[int]:
    """Cut each video's tokens into frames: tokens of every frame of the batch."""
    if how == "features":
        return list(lengths)
    if how == "pooled":
        vision, stride = adapted.model.config.vision_config, getattr(adapted.model.config, "spatial_pool_stride", 2)
        side = -(-(vision.image_size // vision.patch_size) // stride)
        sizes = [side * side] * len(lengths)
    elif (grid := given.get("video_grid_thw")) is not None and len(grid) == len(lengths):
        sizes = [length // int(frames) for length, frames in zip(lengths, grid[:, 0], strict=True)]
    else:
        sizes = _frame_sizes(lengths, marked, given.get("position_ids"))
    frames = []
    for length, size in zip(lengths, sizes, strict=True):
        own = [size] * (length // size)
        own[-1] += length - sum(own)  # a token that ends the video belongs to its last frame
        frames += own
    return frames


def _frame_sizes(lengths: Sequence[int], marked: torch.Tensor, position_ids: torch.Tensor | None) -> list[int]:
    """Read the size of each video's frames off its rotary positions: height and width begin anew with each frame."""
    if position_ids is None or position_ids.ndim != 3:
        raise ValueError(
            "the frames of a video are unknown: pass video_grid_thw, or position_ids [3, batch, tokens] with the "
            "features in mm_encoder_outputs"
        )
    place = position_ids[-2:].permute(1, 2, 0)[marked.to(position_ids.device)]  # [visual tokens, 2]
    sizes, begin = [], 0
    for length in lengths:
        own = place[begin : begin + length]
        again = torch.nonzero((own == own[0]).all(1))[:, 0]
        sizes.append(int(again[1]) if len(again) > 1 else length)
        begin += length
    return sizes


def _numbered(owner: torch.Tensor) -> torch.Tensor:
    """Count each sample's images from 0, in the order of their tokens; -1 stays."""
    image = torch.full_like(owner, -1)
    for row, own in enumerate(owner):
        here = torch.nonzero(own >= 0)[:, 0]
        if len(here):
            begins = torch.nn.functional.pad(own[here][1:] != own[here][:-1], (1, 0))
            image[row, here] = begins.long().cumsum(0)
    return image


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
    """Count the visual tokens of each image: per sample, as many counts as the sample with most images has.

    Args:
        image: [B, N] int64, number of the image each token belongs to, -1 for text.
    """
    counts = torch.zeros(image.shape[0], int(image.max()) + 2, dtype=torch.long, device=image.device)
    return counts.scatter_add_(1, image + 1, torch.ones_like(image))[:, 1:].tolist()
