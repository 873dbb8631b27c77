"""What a prefill kept: the record that a pruner has as `last`."""

from __future__ import annotations

import dataclasses

import torch

from fitprune.families.images import tokens_of


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What a prefill kept; B batch, Q columns of the prompt, m rows present.

    Attributes:
        positions: for each layer, the columns of the prompt [B, m] that enter it, ascending; -1 at padding, on the left
            of rows that hold fewer tokens than the longest.
        after: the same of what is present after each layer.
        image: [B, Q] int64, number of the image or frame that each column belongs to in its sample; -1 for others.
    """

    positions: list[torch.Tensor]
    after: list[torch.Tensor]
    image: torch.Tensor

    def __repr__(self) -> str:
        return f"Prefill(visual tokens {self.visual_tokens}, of which the last layer keeps {self.kept[-1]})"

    @property
    def visual_tokens(self) -> list[list[int]]:
        """For each sample the visual tokens of each of its images in the prompt."""
        return [[count for count in row if count] for row in tokens_of(self.image)]

    @property
    def kept(self) -> list[list[list[int]]]:
        """For each layer, sample and image, the visual tokens that are present after the layer."""
        layers = []
        for columns in self.after:
            image = self.image.to(columns.device).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
            counts = image.new_zeros(len(image), int(self.image.max()) + 2).scatter_add_(
                1, image + 1, image.new_ones(image.shape)
            )
            rows = zip(counts[:, 1:].tolist(), self.visual_tokens, strict=True)
            layers.append([row[: len(images)] for row, images in rows])
        return layers
