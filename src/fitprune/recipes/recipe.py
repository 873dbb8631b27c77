"""The recipe: how many visual tokens are left after each decoder layer. Data, and doors to where it is kept."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitprune._support import checked, files, text_tables
from fitprune._support.messages import short as short
from fitprune.costs import flops
from fitprune.costs.cost import Cost, cost_of
from fitprune.costs.counts import Counts
from fitprune.costs.sizes import MOST_TOKENS, ModelFingerprint
from fitprune.recipes import checks, hub, model_card, pretrained, published, recipe_json, rounding, scorer_spec
from fitprune.recipes.scorer_spec import scorer_parts as scorer_parts


@dataclasses.dataclass(frozen=True)
class PruningRecipe:
    """For each decoder layer, the fraction of an image's visual tokens still present after it.

    Attributes:
        keep: one fraction per layer, between 0 and 1, non-increasing.
        model: the model that the recipe was fitted for.
        visual_tokens: the visual-token count that the budget was met for.
        provenance: where it comes from (budget, tolerance, samples, source, version).
        enter: one fraction per layer, of the tokens that enter it, where some leave between layers or before the first
            (as methods other than FitPrune have it); empty where each layer gets what the one before it kept.
        scorer: how tokens are ranked, {"name": ..., "parameters": {...}}; see `fitprune.scoring.scorers`.

    Raises:
        ValueError: a field breaks the rules above, or JSON cannot hold `provenance` or `scorer`.
    """

    keep: tuple[float, ...]
    model: ModelFingerprint
    visual_tokens: int
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    enter: tuple[float, ...] = ()
    scorer: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": scorer_spec.FITPRUNE}, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelFingerprint):
            raise ValueError(f"model is a {type(self.model).__name__}: must be a ModelFingerprint, as stats.model is")
        for name, values in checks.fractions(self.keep, self.enter, self.model.decoder.layers).items():
            object.__setattr__(self, name, values)
        checks.require_scorer(self.scorer)
        checked.whole("visual_tokens", self.visual_tokens, 1, MOST_TOKENS)
        for name in ("provenance", "scorer"):  # here, not when the recipe is saved, or results that hold it
            checks.require_json(name, getattr(self, name))

    def __repr__(self) -> str:
        n = self.visual_tokens
        counts = self.layer_counts(n)
        cut = 100 * flops.visual_flops_reduction(self.model.decoder, n, counts.removed, counts.before)
        return (
            f"PruningRecipe({self.model.model_type}, visual FLOPs -{cut:.1f}%, {n} -> {counts.kept[-1]} visual "
            f"tokens, {len(self.keep)} layers, scorer {str(self.scorer['name'])[:40]})"
        )

    def _repr_html_(self) -> str:
        counts = self.layer_counts(self.visual_tokens)
        rows = [
            (str(layer), str(enters), str(left), left / self.visual_tokens)
            for layer, (enters, left) in enumerate(zip(counts.entering, counts.kept, strict=True))
        ]
        return text_tables.bars(repr(self), ("layer", "visual tokens that enter", "are left", ""), rows)

    @property
    def entering(self) -> tuple[float, ...]:
        """The fraction of the image's visual tokens that enters each layer."""
        return self.enter or (1.0, *self.keep[:-1])

    @property
    def removing(self) -> list[int]:
        """The layers that tokens leave, inside or before them."""
        before = (1.0, *self.keep[:-1])
        return [layer for layer, (had, keeps) in enumerate(zip(before, self.keep, strict=True)) if keeps < had]

    def layer_counts(self, visual_tokens: int) -> Counts:
        """Count the visual tokens at each layer, for an image of `visual_tokens`."""
        kept, entering = (rounding.kept_counts(part, visual_tokens) for part in (self.keep, self.entering))
        return Counts(visual_tokens, tuple(kept), tuple(entering))

    def kept(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens present after each layer, for an image of `visual_tokens`."""
        return rounding.kept_counts(self.keep, visual_tokens)

    def counts(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens removed inside each layer, for an image of `visual_tokens`."""
        return self.layer_counts(visual_tokens).removed

    def counts_before(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens that leave before each layer, for an image of `visual_tokens`."""
        return self.layer_counts(visual_tokens).before

    def cost(
        self,
        *,
        visual_tokens: int | None = None,
        text_before: int = 0,
        text_tokens: int = 64,
        crops: int | None = None,
        value_bytes: int = 2,
    ) -> Cost:
        """Price the recipe for one sample; a ValueError says which number is wrong.

        Args:
            visual_tokens: visual tokens of the sample; by default the recipe's own.
            text_before: text tokens before the image, part of `text_tokens`.
            text_tokens: text tokens of the prompt.
            crops: image crops that the vision tower sees; by default the fewest that give that number of visual tokens.
            value_bytes: bytes of one cached value, 2 for 16-bit types.
        """
        n = self.visual_tokens if visual_tokens is None else visual_tokens
        checked.whole("visual_tokens", n, 1, MOST_TOKENS)
        counts = self.layer_counts(n)
        return cost_of(
            self.model, counts, text_before=text_before, text_tokens=text_tokens, crops=crops, value_bytes=value_bytes
        )

    @classmethod
    def from_counts(
        cls,
        counts: Counts,
        model: ModelFingerprint,
        *,
        provenance: Mapping[str, Any] | None = None,
        scorer: Mapping[str, Any] | None = None,
    ) -> PruningRecipe:
        """Make the recipe of these counts, for images of `counts.visual_tokens`; the default scorer is FitPrune's."""
        keep, enter = counts.fractions
        return cls(keep, model, counts.visual_tokens, provenance or {}, enter, scorer or {"name": scorer_spec.FITPRUNE})

    @classmethod
    def dense(cls, model: ModelFingerprint, visual_tokens: int) -> PruningRecipe:
        """Make the recipe that keeps everything."""
        return cls((1.0,) * model.decoder.layers, model, visual_tokens, {"source": "keeps all"})

    @classmethod
    def published(cls, name: str, percent: int) -> PruningRecipe:
        """Take a recipe that the FitPrune authors published; a ValueError lists those that there are.

        Args:
            name: "llava-1.5-7b", "llava-next-7b" or "llava-hr-7b".
            percent: the visual-token FLOPs reduction in percent that the authors name the recipe by.

        Source: arXiv:2409.10197 and the authors' code.
        """
        return cls(**published.fields(name, percent))

    @classmethod
    def named(cls, name: str | os.PathLike[str]) -> PruningRecipe:
        """Find a recipe by what a user calls it.

        Args:
            name: a file, a folder that holds fitprune_recipe.json, a published recipe such as "llava-1.5-7b:60", or a
                hub repository "owner/name", or "owner/name@revision". What exists on this machine goes first.

        Raises:
            OSError: the file cannot be read, nothing has that name, or the hub is out of reach.
            ValueError: as `load` and `published`, or the percent is missing.
        """
        files.require_path(name)
        path, name = Path(name), os.fspath(name)
        if path.exists():
            return cls.from_pretrained(path) if path.is_dir() else cls.load(path)
        if of := published.split_name(name):
            return cls.published(*of)
        if place := hub.split_name(name):
            return cls.from_pretrained(place[0], revision=place[1])
        raise FileNotFoundError(
            f"{name}: no such file or folder, no published recipe (those of {', '.join(published.names())} are named "
            "like llava-1.5-7b:60) and no hub name (owner/name)"
        )

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | os.PathLike[str], *, revision: str | None = None, **download: Any
    ) -> PruningRecipe:
        """Read fitprune_recipe.json of a folder or of a hub repository: the recipe's own, or its model's.

        Args:
            name_or_dir: folder, or "owner/name" on the hub; a folder goes first.
            revision: branch, tag or commit on the hub; by default the main branch.
            **download: `token`, `cache_dir`, `local_files_only` and `force_download`, as huggingface_hub takes them.

        Raises:
            FileNotFoundError: there is no such folder or repository, or no recipe in it.
            ConnectionError: the hub is out of reach (offline mode too), and the cache has no such file.
            ValueError: as `load`; or a revision of a folder.
        """
        path, is_download = pretrained.locate(name_or_dir, revision=revision, **download)
        if not is_download:
            return cls.load(path)
        try:
            return cls.from_json(files.read_text(path))
        except ValueError as error:
            raise ValueError(f"{hub.RECIPE_FILE} of {name_or_dir} on the hub: {error}") from None

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_options: Any,
    ) -> str | None:
        """Write fitprune_recipe.json into a folder: beside a model's weights, or into one of its own with a card.

        The card, README.md, says what the recipe cuts and what it was fitted on. None is written beside a model's
        config.json, nor over a README.md that is not fitprune's.

        Args:
            directory: is made where it is missing.
            base_model: hub name of the model, for the card; by default the name that the model was measured under.
            push_to_hub: do that too.
            repo_id: for `push_to_hub`; by default the folder's name.
            **hub_options: the other arguments of `push_to_hub`.

        Returns:
            None, or `push_to_hub`'s address.

        Raises:
            OSError: a file cannot be written (each is written whole or not at all), or as `push_to_hub`.
            ValueError: an argument of `push_to_hub` without it.
        """
        defaults = {"create_pr": False}
        options = {"repo_id": repo_id, **hub_options}
        passed = [name for name, value in options.items() if value is not defaults.get(name)]
        if passed and not push_to_hub:
            raise ValueError(f"{passed[0]}: is for the hub; pass push_to_hub=True too, or leave it out")
        files.require_path(directory)
        name = repo_id or Path(directory).resolve().name
        pretrained.write_folder(directory, self.to_json(), lambda: self.card(name, base_model))
        return self.push_to_hub(name, base_model=base_model, **hub_options) if push_to_hub else None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Write fitprune_recipe.json, and the card as `save_pretrained`, to a hub repository, in one commit.

        Args:
            repo_id: "owner/name", or "name" for one's own; made where it is missing. It may be a model's.
            base_model: as for `save_pretrained`.
            private: whether a new repository is private; by default as its owner has set.
            token: access token; by default the one that is logged in.
            commit_message: by default says what is pushed.
            revision: branch, made where it is missing; by default main. Budgets may have a branch each.
            create_pr: propose it to the owner as a pull request.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ConnectionError: the hub is out of reach.
            OSError: the hub refuses, as without a token.
        """
        repository = hub.Repository.open(repo_id, private=private, token=token, revision=revision)
        message = commit_message or f"FitPrune recipe: {100 * self.cost().flops_reduction:.1f}% of visual FLOPs cut"
        card = functools.partial(self.card, base_model=base_model)
        return pretrained.push(repository, self.to_json(), card, message, create_pr=create_pr)

    def card(self, name: str, base_model: str | None = None) -> str:
        """Write the model card of the recipe that `prune` finds by `name`; `base_model` as for `save_pretrained`."""
        return model_card.card_of(
            name,
            base_model or pretrained.base_model_of(self.provenance),
            model_type=self.model.model_type,
            cost=self.cost(),
            counts=self.layer_counts(self.visual_tokens),
            scorer=self.scorer,
            provenance=self.provenance,
        )

    def to_json(self) -> str:
        """Give the recipe as JSON text."""
        return recipe_json.text_of({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str) -> PruningRecipe:
        """Read `to_json`'s text; the ValueError of another text says what is wrong with it."""
        return cls(**recipe_json.fields_of(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON, whole or, with an OSError, not at all."""
        files.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningRecipe:
        """Read a recipe file of at most 4 MB; a ValueError says what is wrong with it, or what else it is."""
        files.require_path(path)
        if not Path(path).exists():
            raise files.missing(path, files.RECIPE)
        try:
            return cls.from_json(files.read_text(path))
        except ValueError as error:
            raise ValueError(files.explained(path, files.RECIPE, error)) from None
