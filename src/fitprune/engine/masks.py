"""The dense model's attention masks, cut to the tokens that are present; `host.causal_mask` makes those it has not.

Shapes: B batch, h heads or 1, Q rows and K keys of the unpruned sequence, m rows and `keys` keys that are present.
"""

from __future__ import annotations

from typing import Any

import torch

from fitprune._support import host
from fitprune.families.adapter import AdaptedModel


def mask_of_rows(mask: Any) -> torch.Tensor | None:
    """Return a layer's mask if it is one of rows and keys; some attention implementations have other forms."""
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None


def cut_mask(mask: torch.Tensor, kept: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """Cut a layer's mask to the rows and keys present.

    Args:
        mask: [B or 1, h, Q, K] of the unpruned sequence: bool, True where a row sees a key, or a number to add.
        kept: [B, m] rows, -1 at padding; None for all.
        columns: [B, keys] columns of the keys; -1 at padding, which no row sees.
    """
    mask = mask.expand(len(columns), -1, -1, -1)
    if kept is not None:
        rows = kept.clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = columns.clamp(min=0)[:, None, None]
    mask = mask.gather(3, index.expand(-1, mask.shape[1], mask.shape[2], -1))
    padding = (columns < 0)[:, None, None]
    return mask & ~padding if mask.dtype == torch.bool else mask.masked_fill(padding, torch.finfo(mask.dtype).min)


def require_plain_mask(adapted: AdaptedModel, number: int, mask: Any, length: int) -> None:
    """Refuse a layer that hides more than later keys, where its implementation has no mask of rows and keys to cut.

    Args:
        adapted: the model.
        number: the layer's.
        mask: its mask, in a form of the implementation's own; None if it has none.
        length: columns of the unpruned sequence.

    Raises:
        ValueError: the layer has a window that the sequence exceeds, or sees later tokens.
    """
    window = adapted.windows[number]
    windowed = window is not None and length > window
    sees_later = adapted.fingerprint.decoder.bidirectional and mask is not None and not isinstance(mask, torch.Tensor)
    if windowed or sees_later:
        what = f"looks back {window} of {length} tokens" if windowed else "attends to later tokens of an image"
        implementation = host.attention_implementation(adapted.decoder.config)
        raise ValueError(
            f"layer {number} {what}, and attn_implementation={implementation!r} has no mask of rows and keys that "
            "could be cut to the tokens left: load the model with 'sdpa' or 'eager'"
        )
