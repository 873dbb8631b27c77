"""Cut the visual tokens of videos into frames, by the rule of the family.

Shapes: B batch, N tokens of this call, A axes of rotary positions (time, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune.families.table import Family


def frames_of(
    family: Family, config: Any, lengths: Sequence[int], marked: torch.Tensor, call: Mapping[str, Any]
) -> list[int]:
    """Count the tokens of every frame of the batch.

    Args:
        family: the model's.
        config: the model's whole config.
        lengths: tokens of each video.
        marked: [B, N] bool, the videos' tokens.
        call: the arguments of the model's call.

    Raises:
        ValueError: neither the processor's grid nor rotary positions say how many tokens a frame has, or the family's
            frames are not of equal size.
    """
    rule = family.video
    if rule == "features":
        return list(lengths)
    if rule == "pooled":
        vision, stride = config.vision_config, getattr(config, "spatial_pool_stride", 2)
        side = -(-(vision.image_size // vision.patch_size) // stride)
        sizes = [side * side] * len(lengths)
    elif rule == "grid":
        grid = call.get("video_grid_thw")
        if grid is not None and len(grid) == len(lengths):
            sizes = [length // int(frames) for length, frames in zip(lengths, grid[:, 0], strict=True)]
        else:
            sizes = _sizes_by_positions(lengths, marked, call.get("position_ids"))
    else:
        raise ValueError(f"family {family.model_type!r}: video={rule!r} is no rule of equal frames")
    frames = []
    for length, size in zip(lengths, sizes, strict=True):
        own = [size] * (length // size)
        own[-1] += length - sum(own)  # a token that ends the video belongs to its last frame
        frames += own
    return frames


def _sizes_by_positions(lengths: Sequence[int], marked: torch.Tensor, position_ids: torch.Tensor | None) -> list[int]:
    """Read the size of each video's frames off its rotary positions [A, B, N]: each frame has the first one's again."""
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
