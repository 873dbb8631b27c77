"""The images of a request, and the frames of its videos, numbered as `prune` numbers them.

Legend: Q tokens of a request: of its prompt, and of an answer's first part where it goes on after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fitprune.families.config import family_of
from fitprune.families.frames import frames_of
from fitprune.families.images import images_of

GRID = "video_grid_thw"  # what processors of Qwen's models call a video's patches by time, height and width


def can_number(features: Sequence[Any], config: Any) -> bool:
    """Whether all that is no text in a request is images, and videos whose frames are known.

    Args:
        features: the request's, vLLM's MultiModalFeatureSpec.
        config: the model's whole config.
    """
    rule = family_of(config).video
    return all(
        feature.modality == "image" or (feature.modality == "video" and _knows_frames(rule, feature))
        for feature in features
    )


def _knows_frames(rule: str, video: Any) -> bool:
    return rule in ("runs", "pooled") or (rule == "grid" and GRID in (video.data or ()))


def images_in(features: Sequence[Any], length: int, config: Any) -> torch.Tensor:
    """Number the images and frames of a request, which `can_number`.

    Args:
        features: the request's, in the order of their places.
        length: Q.
        config: the model's whole config.

    Returns:
        [1, Q] int64, -1 for text.
    """
    image, first = torch.full((1, length), -1), 0
    for feature in features:
        place, marked = feature.mm_position, torch.zeros(1, length, dtype=torch.bool)
        marked[0, place.offset : place.offset + place.length] = True if place.is_embed is None else place.is_embed
        own = torch.where(marked, 0, -1) if feature.modality == "image" else _frames(feature, marked, config)
        image = torch.where(own >= 0, own + first, image)
        first = int(image.max()) + 1
    return image


def _frames(feature: Any, marked: torch.Tensor, config: Any) -> torch.Tensor:
    """Number the frames of a video, [1, Q], by the rule of the model's family."""
    family = family_of(config)
    if family.video == "runs":
        return images_of(marked)
    call = {GRID: feature.data[GRID].data[None]} if family.video == "grid" else {}
    return images_of(marked, frames_of(family, config, [int(marked.sum())], marked, call))
