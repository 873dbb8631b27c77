"""Number the images of each sample: images that are cut into tiles, and numbers from a family's own rule.

Shapes: B batch, N tokens of this call.
"""

from __future__ import annotations

from typing import Any

import torch


def checked_numbers(image: Any, marked: torch.Tensor, model_type: str) -> torch.Tensor:
    """Refuse what a family's own rule returned, unless it numbers all visual tokens and no others.

    Args:
        image: what it returned: should be [B, N] int64, -1 for text.
        marked: [B, N] bool, the visual tokens.
        model_type: the family's.

    Returns:
        `image`, on the device of `marked`.

    Raises:
        ValueError: it does not.
    """
    what = f"family {model_type!r}: its rule for images"
    if not isinstance(image, torch.Tensor) or image.shape != marked.shape or image.dtype != torch.long:
        shape = f"{image.dtype} of shape {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image)
        raise ValueError(f"{what} returned {shape}: must be int64 of shape {list(marked.shape)}; mend the rule")
    if not torch.equal((image >= 0).to(marked.device), marked):
        raise ValueError(
            f"{what} numbers {int((image >= 0).sum())} tokens where there are {int(marked.sum())} visual ones: must be "
            "0 or more for each of these, and -1 for all others; mend the rule"
        )
    return image.to(marked.device)


def by_tiles(run: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Number the images of each sample where each is cut into tiles, which are runs of tokens.

    Processors mark each tile by a token before it; an image's last tile, which shows it whole, has a marker of its own.
    Every sample ends with such a tile, so images end where a tile has the same marker as the sample's last one.

    Args:
        run: [B, N] int64, number of the run that each visual token belongs to, -1 for text.
        ids: [B, N]; None where the call has none.

    Returns:
        [B, N] int64, numbers of images.

    Raises:
        ValueError: there are no ids.
    """
    if ids is None:
        raise ValueError(
            "inputs_embeds come without input_ids: this model's images are cut into tiles, which only ids tell apart; "
            "pass input_ids"
        )
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


def from_zero(owner: torch.Tensor) -> torch.Tensor:
    """Number each sample's images [B, N] from 0, in the order of their tokens; -1 stays."""
    image = torch.full_like(owner, -1)
    for row, own in enumerate(owner):
        here = torch.nonzero(own >= 0)[:, 0]
        if len(here):
            begins = torch.nn.functional.pad(own[here][1:] != own[here][:-1], (1, 0))
            image[row, here] = begins.long().cumsum(0)
    return image
