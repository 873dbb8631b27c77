"""Which visual tokens stay, layer by layer, and where in their picture they lie."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from fitprune._support.checked import whole
from fitprune._support.messages import short
from fitprune.engine.choose import choose_by
from fitprune.engine.kept import Prefill
from fitprune.engine.prune import run_prefill
from fitprune.engine.pruner import Pruner
from fitprune.engine.running import Choose
from fitprune.families.grids import Grid, token_grids
from fitprune.families.planes import Box
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import Score, Scorer
from fitprune.scoring.view import LayerView


@dataclasses.dataclass(frozen=True, eq=False)
class KeptImage:
    """What one image, or one frame of a video, keeps in a prefill.

    Attributes:
        grids: where its visual tokens lie; see `fitprune.Grid`.
        entered: [tokens] int64, number of layers that each visual token enters, in the order of the prompt.
        layers: of the decoder.
        scores: [layers, tokens] float32, what the recipe's scorer says of each token in each layer, lowest leaves
            first; NaN where the token has left, or the scorer cannot be asked. None if they were not asked for.
    """

    grids: tuple[Grid, ...]
    entered: torch.Tensor
    layers: int
    scores: torch.Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Visual tokens that enter each layer."""
        return [int((self.entered > layer).sum()) for layer in range(self.layers)]

    def present(self, layer: int) -> torch.Tensor:
        """Mark the visual tokens that enter a layer: [tokens] bool.

        Args:
            layer: its number, from 0.

        Raises:
            ValueError: there is no such layer.
        """
        whole("layer", layer, 0, self.layers - 1, ", the decoder's layers")
        return self.entered > layer

    def grid(self, layer: int) -> list[torch.Tensor]:
        """Mark, for each grid, the cells whose token enters a layer: [rows, columns] bool.

        Args:
            layer: its number, from 0.

        Raises:
            ValueError: there is no such layer.
        """
        present = self.present(layer)
        return [present[grid.tokens] for grid in self.grids]

    def inside(self, box: Box) -> torch.Tensor:
        """Mark the visual tokens that lie in a box of the picture: [tokens] bool.

        A token lies in it if the middle of its cell does. In a box that is too small for that lie the tokens of the
        cells that the box's own middle is in.

        Args:
            box: left, top, right and bottom, in fractions of the picture's width and height.

        Raises:
            ValueError: it is no box of fractions, no token lies in it, or it is not known where the grids lie.
        """
        left, top, right, bottom = _fractions(box)
        middle = (left + right) / 2, (top + bottom) / 2
        inside, around = (torch.zeros(len(self.entered), dtype=torch.bool) for _ in range(2))
        for grid in self.grids:
            x, y, width, height = _middles(grid)
            inside[grid.tokens[(left <= x) & (x <= right) & (top <= y) & (y <= bottom)]] = True
            is_near = ((x - middle[0]).abs() <= width / 2) & ((y - middle[1]).abs() <= height / 2)
            around[grid.tokens[is_near]] = True
        if bool(inside.any()):
            return inside
        if bool(around.any()):
            return around
        raise ValueError(f"box={box}: no visual token lies in it; draw it inside of what the model sees")

    def share(self, box: Box, layer: int) -> float:
        """Compute the share of the visual tokens in a box of the picture that enter a layer.

        Args:
            box: as for `inside`.
            layer: its number, from 0.

        Raises:
            ValueError: as for `inside` and `present`.
        """
        inside = self.inside(box)
        return int((inside & self.present(layer)).sum()) / int(inside.sum())

    def __repr__(self) -> str:
        grids = ", ".join("x".join(map(str, grid.tokens.shape)) for grid in self.grids)
        return f"KeptImage({len(self.entered)} visual tokens in {grids}, {self.counts[-1]} enter the last layer)"


def _fractions(box: Any) -> Box:
    """Check a box of a user's."""
    try:
        left, top, right, bottom = map(float, () if isinstance(box, str) else box)
    except (TypeError, ValueError):
        raise ValueError(f"box={short(box)}: must be four numbers: left, top, right, bottom") from None
    if not (left < right and top < bottom):
        raise ValueError(f"box={box}: must be left, top, right, bottom, with left < right and top < bottom")
    if not (min(left, top) >= -1 and max(right, bottom) <= 2):  # grids reach a little outside of 0..1
        raise ValueError(
            f"box={box}: must be fractions of the picture, from 0 to 1; divide pixels by the picture's width and height"
        )
    return left, top, right, bottom


def _middles(grid: Grid) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Where the middles of a grid's cells lie, x [1, columns] and y [rows, 1], and a cell's width and height."""
    left, top, right, bottom = placed(grid)
    rows, columns = grid.tokens.shape
    width, height = (right - left) / columns, (bottom - top) / rows
    x, y = (torch.arange(n) + 0.5 for n in (columns, rows))
    return left + width * x[None], top + height * y[:, None], width, height


def placed(grid: Grid) -> Box:
    """Give a grid's box in the picture, or refuse a grid whose place is not known."""
    if grid.box is None:
        raise ValueError(
            f"it is not known where in the picture the grid '{grid.name}' lies: pass processor and pictures to "
            "kept_tokens"
        )
    return grid.box


def kept_tokens(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None,
    inputs: Mapping[str, Any],
    *,
    processor: Any = None,
    pictures: Iterable[Any] | None = None,
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    scores: bool = False,
    force: bool = False,
    grids: Sequence[Sequence[Sequence[Grid]]] | None = None,
) -> list[list[KeptImage]]:
    """Run one prefill, and return which visual tokens enter each layer, and where they lie.

    Args:
        model: as for `fitprune.prune`.
        recipe: as for `fitprune.prune`.
        inputs: of one call: what the processor returned.
        processor: the model's; with `pictures` it says where in its picture each token lies. Without, grids have no
            box, and are not to be drawn.
        pictures: what the processor got, in the order of the prompts; a video as a list of the frames that the model
            sees.
        scorer: as for `fitprune.prune`.
        scores: whether to ask the scorer at every layer, also where nothing leaves. That changes nothing of what
            leaves.
        force: as for `fitprune.prune`.
        grids: of the same pictures, from an earlier call, to save measuring them.

    Returns:
        For each sample, for each of its images or frames, what it keeps.

    Raises:
        ValueError: as for `fitprune.prune` and `fitprune.families.grids.token_grids`; or there is no image.
    """
    if isinstance(pictures, (Image.Image, str, os.PathLike)) or getattr(pictures, "ndim", 4) < 4:
        raise ValueError(f"pictures is a {type(pictures).__name__}: must be a list of pictures; pass [picture]")
    record = _Record({})
    pruner = Pruner(model, recipe, scorer, force=force, choose=record.choose_by if scores else choose_by)
    prefill = run_prefill(pruner, inputs)
    none = torch.full(prefill.image.shape, torch.nan)
    table = [record.rows.get(layer, none) for layer in range(len(prefill.positions))]
    if grids is None:
        grids = token_grids(pruner.model, inputs, processor, pictures, image=prefill.image)
    return kept_images(prefill, grids, torch.stack(table) if scores else None)


def kept_images(
    prefill: Prefill, grids: Sequence[Sequence[Sequence[Grid]]], scores: torch.Tensor | None = None
) -> list[list[KeptImage]]:
    """Say what the images of a prefill keep, for whoever ran it: `pruner.last` of a pruner.

    Args:
        prefill: what was kept; B samples of Q columns.
        grids: of the same prompts, from `fitprune.families.grids.token_grids`.
        scores: [layers, B, Q], or None.

    Returns:
        For each sample, for each of its images or frames, what it keeps.
    """
    image = prefill.image.cpu()
    entered = torch.zeros_like(image)
    for columns in (positions.cpu() for positions in prefill.positions):
        entered.scatter_add_(1, columns.clamp(min=0), (columns >= 0).long())
    return [
        [
            KeptImage(
                tuple(of_image),
                entered[row, own := image[row] == number],
                len(prefill.positions),
                None if scores is None else scores[:, row, own],
            )
            for number, of_image in enumerate(of_sample)
        ]
        for row, of_sample in enumerate(grids)
    ]


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a scorer says at each layer.

    Attributes:
        rows: layer -> scores [B, Q], NaN where a column has no token at that layer; of the layer's last place where
            tokens leave, or after its attention if none do.
    """

    rows: dict[int, torch.Tensor]

    def choose_by(self, scorer: Scorer) -> Choose:
        """Choose as `engine.choose.choose_by` does, and note the scores, also where nothing leaves."""

        def score(view: LayerView) -> torch.Tensor:
            scores = scorer(view)
            width = view.prompt.images.shape[1]
            row = torch.full((len(scores), width + 1), torch.nan)  # the last column is for padding
            columns = torch.where(view.column < 0, width, view.column).cpu()
            self.rows[view.layer] = row.scatter(1, columns, scores.detach().float().cpu())[:, :width]
            return scores

        noted = dataclasses.replace(scorer, score=score)
        choose = choose_by(noted)

        def choose_and_note(view: LayerView) -> torch.Tensor | None:
            stays = choose(view)
            over = scorer.accumulates and view.number > view.quotas.last  # nothing is accumulated there
            if stays is None and not (view.before or view.layer in self.rows or over):
                with contextlib.suppress(ValueError):  # one that works at some places alone
                    noted(view)
            return stays

        return choose_and_note
