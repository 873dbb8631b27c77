"""Where a command writes its recipes: one file, or a folder with a file for each budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fitprune._support import files
from fitprune.cli import options
from fitprune.recipes.recipe import PruningRecipe


@dataclasses.dataclass(frozen=True)
class RecipeFiles:
    """The files of a command's recipes.

    Attributes:
        output: what --output is.
        names: of the files, where `output` is a folder; empty where it is the file itself.
    """

    output: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, args: options.Args) -> RecipeFiles:
        """Decide between a file and a folder, by --output and the number of budgets.

        Args:
            args: with --output and the budgets.

        Raises:
            ValueError: there are several budgets, and --output ends like a recipe file.
        """
        output, kind, values = args.output, *options.budget_values(args)
        folder = _names_a_folder(output) or Path(output).is_dir()
        if len(values) > 1 and not folder and output.endswith(".json"):
            raise ValueError(f"--output {output}: {len(values)} budgets make a file each: name a folder")
        one_file = len(values) == 1 and not folder
        return cls(output, () if one_file else tuple(f"{kind}-{value}.json" for value in values))

    @property
    def paths(self) -> list[Path]:
        """The file of each budget."""
        return [Path(self.output) / name for name in self.names] or [Path(self.output)]

    @property
    def journal(self) -> Path:
        """Where a search notes what it measured, to go on from it."""
        return Path(self.output) / "search.jsonl" if self.names else Path(f"{self.output}.search.jsonl")

    @property
    def statistics(self) -> Path:
        """Where `fitprune recipe` keeps its statistics: r.stats.safetensors beside r.json."""
        if self.names:
            return Path(self.output) / "stats.safetensors"
        return Path(f"{self.output.removesuffix('.json')}.stats.safetensors")

    def claim(self, *, overwrite: bool) -> list[str]:
        """Find out that the files can be written and replace nothing of another kind.

        Args:
            overwrite: replace whatever is there.

        Returns:
            Of each file what `files.claim` returns.
        """
        if self.names and not _names_a_folder(self.output):
            remedy = f"write {self.output}/ to put recipes among them"
            files.claim_folder(self.output, _may_lie_among_recipes, remedy, overwrite=overwrite)
        return [files.claim(path, files.RECIPE, overwrite=overwrite) for path in self.paths]

    def save(self, recipes: Sequence[PruningRecipe], replaced: Sequence[str]) -> None:
        """Write the recipes, and print a line for each.

        Args:
            recipes: one for each path.
            replaced: what `claim` returned.
        """
        for path, recipe, ending in zip(self.paths, recipes, replaced, strict=True):
            recipe.save(path)
            cost = recipe.cost()
            print(
                f"{path}: visual FLOPs -{100 * cost.flops_reduction:.2f}%, "
                f"{cost.mean_visual_tokens:.1f} visual tokens a layer, {fit_of(recipe)}{ending}"
            )


def fit_of(recipe: PruningRecipe) -> str:
    """Say how well a fitted recipe fits: its tolerance, or its divergence and that of the paper's rule."""
    facts = recipe.provenance
    if (divergence := facts.get("divergence")) is None:
        few = facts.get("max_removal_layers") and (
            f", {len(recipe.removing)} layers remove, extra loss {facts['extra_loss']:.4f}"
        )
        return f"tolerance {facts['tolerance']:.4f}{few or ''}"
    means = [f"{half} {of['found']:.4f} (paper's rule {of['paper']:.4f})" for half, of in divergence.items()]
    kept = "" if facts["chosen"] == "found" else ": not better, so the paper's recipe"
    return f"divergence in nats: {', '.join(means)}{kept}"


def has_records(journal: Path) -> bool:
    """Whether a journal holds a record; its first line only says what run it is of."""
    if not journal.is_file():
        return False
    with journal.open("rb") as file:
        return len(file.readlines(1 << 20)) > 1


def _names_a_folder(output: str) -> bool:
    """Whether a name can only be a folder's, whatever is there."""
    return output.endswith(("/", "\\")) or output in (".", "..")


def _may_lie_among_recipes(entry: Path) -> bool:
    """Whether an entry of a folder is a recipe, or what commands put beside recipes."""
    if entry.name in ("README.md", "search.jsonl", "stats.safetensors.parts"):
        return True
    return entry.suffix in (".json", ".safetensors") and files.kind_of(entry) in (files.RECIPE, files.STATISTICS)
