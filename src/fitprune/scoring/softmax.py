"""The softmax of one layer, computed as the layer does: scale, soft-cap, sinks, mask.

Shapes: B batch, H query heads, Q queries, K keys; r rows of the queries, k of the first keys.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Softmax:
    """How a layer turns the products of queries and keys into attention weights.

    Attributes:
        scaling: factor on the products.
        valid: [B, K] bool, False at padding; None where nothing is padded. Ignored where there is a mask.
        mask: [B or 1, H or 1, Q, K], the layer's own: bool, True where a row sees a key, or a number to add. None: a
            row sees all keys up to its own.
        window: how many keys a row sees, its own the last of them, where there is no mask; None for all.
        softcap: logits are squashed by tanh to stay within +-softcap; None for no cap.
        sinks: [H], a logit for each head that takes part in the softmax and has no value.
    """

    scaling: float
    valid: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @functools.cached_property
    def causal(self) -> bool:
        """Whether no row sees a later key than its own."""
        if self.mask is None:
            return True
        visible = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        rows, keys = visible.shape[-2:]
        return not bool(visible.triu(keys - rows + 1).any())

    def of(self, samples: slice) -> Softmax:
        """Take some samples of the batch."""
        return dataclasses.replace(
            self,
            valid=None if self.valid is None else self.valid[samples],
            mask=self.mask if self.mask is None or len(self.mask) == 1 else self.mask[samples],
        )

    def hidden(self, rows: torch.Tensor, past: int, keys: int) -> torch.Tensor:
        """Mark the keys that rows do not see: [B or 1, H or 1, r, keys] bool. The mask must not be one of numbers.

        Args:
            rows: [r], numbers of the rows, counted from the first query.
            past: keys before that of the first query.
            keys: of how many keys, from the first on.
        """
        if self.mask is not None:
            return ~self.mask[:, :, rows, :keys]
        key, own = torch.arange(keys, device=rows.device), past + rows[:, None]
        hidden = key > own if self.window is None else (key > own) | (key <= own - self.window)
        return hidden[None, None] if self.valid is None else hidden | ~self.valid[:, None, None, :keys]

    @property
    def only_causal(self) -> bool:
        """Whether a row sees all keys up to its own, and no other."""
        return self.mask is None and self.window is None and self.valid is None

    @property
    def plain(self) -> bool:
        """Whether a weight is the exponential of a product less its row's log-sum-exp, or hidden in all heads."""
        masked_alike = self.mask is None or (self.mask.dtype == torch.bool and self.mask.shape[1] == 1)
        return masked_alike and self.softcap is None and self.sinks is None

    def weights(self, products: torch.Tensor, rows: torch.Tensor, past: int) -> torch.Tensor:
        """Turn scaled products into weights [B, H, r, k] fp32.

        Args:
            products: [B, H, r, k], of the rows and the first k keys.
            rows: [r], numbers of the rows, counted from the first query.
            past: keys before that of the first query.
        """
        logits, keys = products.float(), products.shape[-1]
        lowest = torch.finfo(torch.float32).min  # not -inf: a padded row sees no key and must not become NaN
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = (logits + self.mask[:, :, rows, :keys]).clamp_(min=lowest)
        else:
            logits = logits.masked_fill_(self.hidden(rows, past, keys), lowest)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
