"""The recipe: how many visual tokens are left after each decoder layer. Data, not code.

Knows its JSON form, where recipes are found by name, and the published recipes of the FitPrune authors. Imports neither
torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fitprune._support import files, text_tables
from fitprune.costs import flops
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.recipes import hub, model_card, rounding

SCHEMA = 1
MOST_PARAMETERS = 64  # of a scorer, one in another counted alone; the richest has a dozen

# The published shapes: Llama-7B decoders with CLIP ViT-L/14, in LLaVA-HR without its class token and with a ConvNeXt-L.
_LLAMA_7B = (32, 32, 128, 32064)  # heads, kv_heads, head_dim, vocab
_CLIP_L_336 = VisionSizes(layers=24, hidden=1024, intermediate=4096, image_size=336, patch_size=14)
_HIGH_RESOLUTION = dataclasses.replace(_CLIP_L_336, image_size=448, class_tokens=0, beside_macs=736_194_201_088)
_PUBLISHED_TYPES: dict[str, tuple[str, VisionSizes]] = {
    "llava-1.5-7b": ("llava", _CLIP_L_336),
    "llava-next-7b": ("llava_next", _CLIP_L_336),
    "llava-hr-7b": ("llava_hr", _HIGH_RESOLUTION),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a recipe costs for one sample, with the dense figure beside each.

    Attributes:
        visual_tokens: visual tokens of the prompt.
        text_tokens: text tokens of the prompt.
        kept: visual tokens present after each layer.
        flops_reduction: fraction of visual-token FLOPs removed (the paper's accounting).
        kv_cache_reduction: fraction of the visual tokens' KV bytes removed.
        mean_visual_tokens: mean over layers of the visual tokens that enter the layer.
        prefill_flops: FLOPs of the real prefill; text, scoring, tower, projector and head included.
        dense_prefill_flops: the same without pruning.
        kv_bytes: bytes of the KV cache after prefill, text included.
        dense_kv_bytes: the same without pruning.
    """

    visual_tokens: int
    text_tokens: int
    kept: tuple[int, ...]
    flops_reduction: float
    kv_cache_reduction: float
    mean_visual_tokens: float
    prefill_flops: int
    dense_prefill_flops: int
    kv_bytes: int
    dense_kv_bytes: int


@dataclasses.dataclass(frozen=True)
class PruningRecipe:
    """For each decoder layer, the fraction of an image's visual tokens still present after it.

    Attributes:
        keep: one fraction per layer, between 0 and 1, non-increasing.
        model: the model that the recipe was fitted for.
        visual_tokens: the visual-token count that the budget was met for.
        provenance: how it came to be (budget, tolerance, samples, source, version).
        enter: one fraction per layer, of the tokens that enter it, where some leave between layers or before the first
            (as methods other than FitPrune have it); empty where each layer gets what the one before it kept.
        scorer: how tokens are ranked, {"name": ..., "parameters": {...}}; see `fitprune.scoring.scorers`.

    Raises:
        ValueError: `keep` or `enter` has another length than the model has layers, is not a number, leaves 0..1, or
            increases; `visual_tokens` is not positive; `scorer` has another form; JSON cannot hold `provenance` or
            `scorer`.
    """

    keep: tuple[float, ...]
    model: ModelFingerprint
    visual_tokens: int
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    enter: tuple[float, ...] = ()
    scorer: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "fitprune"}, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelFingerprint):
            raise ValueError(f"model is a {type(self.model).__name__}: must be a ModelFingerprint, as stats.model is")
        for name in ("keep", "enter"):
            if not isinstance(getattr(self, name), Iterable):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}: must be a list of numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != self.model.decoder.layers and (name == "keep" or self.enter):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries: must be one for each of the model's "
                    f"{self.model.decoder.layers} layers"
                )
        before, named = 1.0, "1"
        for name, fraction in self._steps():
            if isinstance(fraction, bool) or not isinstance(fraction, Real) or fraction != fraction:
                raise ValueError(f"{name}={reprlib.repr(fraction)}: must be a finite number")
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name}={reprlib.repr(fraction)}: must be between 0 and 1")
            if fraction > before:
                raise ValueError(f"{name}={fraction}: must not exceed {named}={before}; removed tokens cannot return")
            before, named = fraction, name
        for name in ("keep", "enter"):
            object.__setattr__(self, name, tuple(float(fraction) for fraction in getattr(self, name)))
        _, parameters = scorer_parts(self.scorer)
        if (count := len(parameters)) > MOST_PARAMETERS:
            raise ValueError(f"scorer has {count} parameters: must have at most {MOST_PARAMETERS}")
        rounding.require_tokens("visual_tokens", self.visual_tokens, 1)
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"provenance is a {type(self.provenance).__name__}: must be a mapping")
        for name in ("provenance", "scorer"):  # found here, and not when the recipe is saved, or results that hold it
            try:
                json.dumps(dict(getattr(self, name)), allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{name} is no JSON ({error}): must hold text, finite numbers, lists, objects"
                ) from None

    def __repr__(self) -> str:
        left, cut = self.kept(self.visual_tokens)[-1], 100 * self._flops_reduction
        name = str(self.scorer["name"])[:40]
        return (
            f"PruningRecipe({self.model.model_type}, visual FLOPs -{cut:.1f}%, {self.visual_tokens} -> {left} visual "
            f"tokens, {len(self.keep)} layers, scorer {name})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (str(layer), str(before), str(left), left / self.visual_tokens)
            for layer, (before, left) in enumerate(
                zip(rounding.kept_counts(self.entering, self.visual_tokens), self.kept(self.visual_tokens), strict=True)
            )
        ]
        return text_tables.bars(repr(self), ("layer", "visual tokens that enter", "are left", ""), rows)

    @property
    def _flops_reduction(self) -> float:
        """Of an image of the recipe's own size, in the paper's accounting."""
        n = self.visual_tokens
        return flops.visual_flops_reduction(self.model.decoder, n, self.counts(n), self.counts_before(n))

    def _steps(self) -> list[tuple[str, float]]:
        """Name the fractions in the order in which tokens leave: into a layer, inside it."""
        keep = [(f"keep[{layer}]", fraction) for layer, fraction in enumerate(self.keep)]
        if not self.enter:
            return keep
        enter = [(f"enter[{layer}]", fraction) for layer, fraction in enumerate(self.enter)]
        return [step for pair in zip(enter, keep, strict=True) for step in pair]

    @property
    def entering(self) -> tuple[float, ...]:
        """The fraction of the image's visual tokens that enters each layer."""
        return self.enter or (1.0, *self.keep[:-1])

    @property
    def removing(self) -> list[int]:
        """The layers that tokens leave, inside or before them."""
        before = (1.0, *self.keep[:-1])
        return [layer for layer, (had, keeps) in enumerate(zip(before, self.keep, strict=True)) if keeps < had]

    def kept(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens present after each layer, for an image of `visual_tokens`."""
        return rounding.kept_counts(self.keep, visual_tokens)

    def counts(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens removed inside each layer, for an image of `visual_tokens`."""
        entering = rounding.kept_counts(self.entering, visual_tokens)
        return [a - b for a, b in zip(entering, self.kept(visual_tokens), strict=True)]

    def counts_before(self, visual_tokens: int) -> list[int]:
        """Count the visual tokens that leave before each layer, for an image of `visual_tokens`."""
        before = [visual_tokens, *self.kept(visual_tokens)[:-1]]
        return [a - b for a, b in zip(before, rounding.kept_counts(self.entering, visual_tokens), strict=True)]

    def cost(
        self,
        *,
        visual_tokens: int | None = None,
        text_before: int = 0,
        text_tokens: int = 64,
        crops: int | None = None,
        value_bytes: int = 2,
    ) -> Cost:
        """Price the recipe for one sample.

        Args:
            visual_tokens: visual tokens of the sample; by default the recipe's own.
            text_before: text tokens before the image, part of `text_tokens`.
            text_tokens: text tokens of the prompt.
            crops: image crops that the vision tower sees; by default as few as give that many tokens.
            value_bytes: bytes of one cached value, 2 for 16-bit types.

        Raises:
            ValueError: a number is no integer or out of range, or text counts do not fit each other.
        """
        n = self.visual_tokens if visual_tokens is None else visual_tokens
        rounding.require_tokens("visual_tokens", n, 1)
        rounding.require_tokens("text_tokens", text_tokens, 0)
        rounding.require_tokens("crops", 1 if crops is None else crops, 1)
        if not isinstance(value_bytes, Integral) or not 1 <= value_bytes <= 16:
            raise ValueError(f"value_bytes={reprlib.repr(value_bytes)}: must be an integer from 1 to 16")
        if not 0 <= text_before <= text_tokens:
            raise ValueError(f"text_before={text_before}: must be between 0 and text_tokens={text_tokens}")
        if crops is None:
            crops = -(-n // self.model.vision.patches) if self.model.vision else 1
        decoder = self.model.decoder
        pruned, dense = (self.counts(n), self.counts_before(n)), ([0] * len(self.keep), None)

        def prefill(counts: tuple[list[int], list[int] | None]) -> int:
            after = text_tokens - text_before
            return flops.prefill_flops(
                self.model,
                n,
                *counts,
                text_before=text_before,
                text_after=after,
                crops=crops,
                value_bytes=value_bytes,
            ).total

        def held(counts: tuple[list[int], list[int] | None], text: int) -> int:
            return flops.kv_bytes(decoder, n, *counts, text_tokens=text, value_bytes=value_bytes)

        return Cost(
            visual_tokens=n,
            text_tokens=text_tokens,
            kept=tuple(self.kept(n)),
            flops_reduction=flops.visual_flops_reduction(decoder, n, *pruned),
            kv_cache_reduction=1 - held(pruned, 0) / held(dense, 0),
            mean_visual_tokens=flops.mean_visual_tokens(n, *pruned),
            prefill_flops=prefill(pruned),
            dense_prefill_flops=prefill(dense),
            kv_bytes=held(pruned, text_tokens),
            dense_kv_bytes=held(dense, text_tokens),
        )

    @classmethod
    def dense(cls, model: ModelFingerprint, visual_tokens: int) -> PruningRecipe:
        """Make the recipe that keeps everything."""
        return cls((1.0,) * model.decoder.layers, model, visual_tokens, {"source": "keeps all"})

    @classmethod
    def published(cls, name: str, percent: int) -> PruningRecipe:
        """Take a recipe that the FitPrune authors published.

        Args:
            name: "llava-1.5-7b", "llava-next-7b" or "llava-hr-7b".
            percent: the visual-token FLOPs reduction in percent that the authors name the recipe by.

        Raises:
            ValueError: there is no such recipe; the message lists those that there are.

        Source: arXiv:2409.10197 and the authors' code.
        """
        table = _published()
        if name not in table:
            raise ValueError(f"name={name!r}: no published recipe; must be one of {sorted(table)}")
        entry = table[name]
        if str(percent) not in entry["removals"]:
            there = sorted(int(p) for p in entry["removals"])
            raise ValueError(f"percent={reprlib.repr(percent)}: no published recipe of {name}; must be one of {there}")
        model_type, vision = _PUBLISHED_TYPES[name]
        decoder = DecoderSizes(entry["layers"], entry["hidden"], entry["intermediate"], *_LLAMA_7B)
        provenance = {
            "source": "arXiv:2409.10197, recipe published by the authors",
            "name": name,
            "nominal_percent": int(percent),
        }
        keep = rounding.keep_fractions(entry["removals"][str(percent)], entry["visual_tokens"])
        return cls(keep, ModelFingerprint(model_type, decoder, vision), entry["visual_tokens"], provenance)

    @classmethod
    def named(cls, name: str | os.PathLike[str]) -> PruningRecipe:
        """Find a recipe by what a user would call it.

        Args:
            name: a file, a folder that holds fitprune_recipe.json, a published recipe such as "llava-1.5-7b:60", or a
                hub repository "owner/name", or "owner/name@revision". What exists on this machine goes first.

        Raises:
            OSError: the file cannot be read, nothing has that name, or the hub is out of reach.
            ValueError: as `load` and `published`, or the percent is missing.
        """
        files.require_path(name)
        path, name = Path(name), os.fspath(name)
        if path.is_dir():
            return cls.from_pretrained(path)
        if path.exists():
            return cls.load(path)
        published = cls.published_names()
        model, *percent = name.split(":")
        if model in published and len(percent) == 1:
            # What is no number goes on as it is, for `published` to name it in its error.
            whole = percent[0].isdecimal() and len(percent[0]) < 4
            return cls.published(model, int(percent[0]) if whole else percent[0])  # type: ignore[arg-type]
        if name in published:
            raise ValueError(f"{name}: say which of its recipes, such as {name}:60; {published[name]}")
        if place := hub.split_name(name):
            return cls.from_pretrained(place[0], revision=place[1])
        raise FileNotFoundError(
            f"{name}: no such file or folder, no published recipe (those of {', '.join(published)} are named like "
            "llava-1.5-7b:60) and no hub name (owner/name)"
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> PruningRecipe:
        """Read fitprune_recipe.json of a folder or of a hub repository: the recipe's own, or its model's.

        Args:
            name_or_dir: folder, or "owner/name" on the hub; a folder goes first.
            revision: branch, tag or commit on the hub; by default the main branch.
            token: access token; by default the one that is logged in.
            cache_dir: instead of huggingface_hub's cache.
            local_files_only: look into the cache alone.
            force_download: fetch it though the cache has it.

        Raises:
            FileNotFoundError: there is no such folder or repository, or no recipe in it.
            ConnectionError: the hub is out of reach (offline mode too), and the cache has no such file.
            OSError: the file cannot be read, or the hub refuses.
            ValueError: as `load`; or a revision of a folder.
        """
        files.require_path(name_or_dir)
        path, name = Path(name_or_dir), os.fspath(name_or_dir)
        if path.is_dir():
            if revision is not None:
                raise ValueError(f"revision={revision!r}: {name} is a folder, which has none; leave it out")
            if not (path / hub.RECIPE_FILE).exists():
                entries = [entry for entry in sorted(path.glob("*.json"))[:200] if entry.is_file()]
                small = [entry for entry in entries if entry.stat().st_size <= files.MOST_BYTES]
                others = [entry.name for entry in small if files.kind_of(entry) == files.RECIPE]
                held = f"; name one of its recipes: {', '.join(others)}" if others else ""
                raise FileNotFoundError(f"folder {name} has no {hub.RECIPE_FILE}{held}")
            return cls.load(path / hub.RECIPE_FILE)
        place = hub.split_name(name)
        if place is None or place[1] is not None:
            raise FileNotFoundError(f"{name}: no such folder, and no hub name (owner/name)")
        found = hub.download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        try:
            return cls.from_json(files.read_text(found))
        except ValueError as error:
            raise ValueError(f"{hub.RECIPE_FILE} of {name} on the hub: {error}") from None

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str | None:
        """Write fitprune_recipe.json into a folder: beside a model's weights, or into one of its own with a card.

        The card, README.md, says what the recipe cuts and what it was fitted on. None is written beside a model's
        config.json, nor over a README.md that is not fitprune's.

        Args:
            directory: is made where it is missing.
            base_model: hub name of the model, for the card; by default the name that the model was measured under.
            push_to_hub: do that too; the arguments below are its own.
            repo_id: by default the folder's name.

        Returns:
            None, or `push_to_hub`'s address.

        Raises:
            OSError: a file cannot be written; each is written whole or not at all. Or as `push_to_hub`.
            ValueError: an argument of `push_to_hub` without it.
        """
        more: dict[str, Any] = {
            "private": private, "token": token, "commit_message": commit_message, "revision": revision
        }  # fmt: skip
        given = {k: v for k, v in {**more, "repo_id": repo_id, "create_pr": create_pr or None}.items() if v is not None}
        if given and not push_to_hub:
            name = next(iter(given))
            raise ValueError(f"{name}: is for the hub; state push_to_hub=True too, or leave it out")
        files.require_path(directory)
        folder = Path(directory)
        self.save(folder / hub.RECIPE_FILE)
        readme = folder / hub.CARD_FILE
        there = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else None
        if model_card.wanted(os.listdir(folder), there):
            text = model_card.card_of(self, repo_id or folder.resolve().name, self._base_model(base_model))
            files.write_text(readme, text)
        if not push_to_hub:
            return None
        name = repo_id or folder.resolve().name
        return self.push_to_hub(name, base_model=base_model, create_pr=create_pr, **more)

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
            repo_id: "owner/name", or "name" for one's own; made where it is missing. A model's repository is as good.
            base_model: as for `save_pretrained`.
            private: whether a new repository is private; by default as its owner has set.
            token: access token; by default the one that is logged in.
            commit_message: by default says what is pushed.
            revision: branch, made where it is missing; by default main. Budgets may live on branches of their own.
            create_pr: propose it to the owner as a pull request.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ConnectionError: the hub is out of reach.
            OSError: the hub refuses, as without a token.
        """
        repository = hub.Repository.open(repo_id, private=private, token=token, revision=revision)
        texts = {hub.RECIPE_FILE: self.to_json()}
        if model_card.wanted(repository.names, repository.card):
            name = repository.repo_id if revision is None else f"{repository.repo_id}@{revision}"
            texts[hub.CARD_FILE] = model_card.card_of(self, name, self._base_model(base_model))
        message = commit_message or f"FitPrune recipe: {100 * self.cost().flops_reduction:.1f}% of visual FLOPs cut"
        return repository.commit(texts, message, create_pr=create_pr)

    def _base_model(self, stated: str | None) -> str | None:
        """The hub name of the recipe's model: as stated, or as it was measured, unless that was a folder."""
        measured = self.provenance.get("measured")
        name = str(measured.get("model", "")) if isinstance(measured, Mapping) else ""
        return stated or (name if hub.split_name(name) == (name, None) and not Path(name).exists() else None)

    @staticmethod
    def published_names() -> dict[str, list[int]]:
        """List the published recipes: model name -> nominal percents."""
        return {name: [int(p) for p in entry["removals"]] for name, entry in _published().items()}

    def to_json(self) -> str:
        """Give the recipe as JSON text."""
        stated = self.scorer != {"name": "fitprune"} or _left_out(self.provenance)
        data = {
            "schema": SCHEMA,
            "model": self.model.to_dict(),
            "visual_tokens": self.visual_tokens,
            "keep": list(self.keep),
            **({"enter": list(self.enter)} if self.enter else {}),
            **({"scorer": dict(self.scorer)} if stated else {}),
            "provenance": dict(self.provenance),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningRecipe:
        """Read `to_json`'s text.

        Raises:
            ValueError: no JSON object, another schema version, a missing or unknown key, values out of the rules, or
                a published method without its scorer, as older versions wrote it.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}: must be JSON text; load reads a file")
        try:
            data = files.parse_json(text, object_pairs_hook=_without_duplicates)
        except ValueError as error:
            raise ValueError(f"recipe is {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"recipe is a JSON {type(data).__name__}: must be an object")
        required = {"schema", "model", "visual_tokens", "keep", "provenance"}
        known = required | {"enter", "scorer"}
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ValueError(
                f"schema={reprlib.repr(data.get('schema'))}: this version reads schema {SCHEMA}; is it a recipe?"
            )
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"unknown key {reprlib.repr(unknown[0])} in recipe: must be among {sorted(known)}; remove it"
            )
        if missing := sorted(required - set(data)):
            raise ValueError(f"key {missing[0]!r} is missing from the recipe; fit it again")
        enter = data.get("enter", [])
        if (
            not isinstance(data["keep"], list)
            or not isinstance(enter, list)
            or not isinstance(data["provenance"], dict)
        ):
            raise ValueError("recipe's 'keep' (and 'enter') must be a list and 'provenance' an object; fit it again")
        model = ModelFingerprint.from_dict(data["model"])
        if "scorer" not in data and (name := _left_out(data["provenance"])):
            spec = {"name": name, **({"parameters": {"seed": 0}} if name == "random" else {})}
            raise ValueError(
                f"the recipe of method {short(data['provenance']['method'])} names no scorer (an older version left it "
                f'out), and would rank by FitPrune\'s: make it again, or add "scorer": {json.dumps(spec)}'
            )
        scorer = data.get("scorer", {"name": "fitprune"})
        return cls(tuple(data["keep"]), model, data["visual_tokens"], data["provenance"], tuple(enter), scorer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON, whole or not at all.

        Raises:
            OSError: `path` cannot be written.
        """
        files.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningRecipe:
        """Read a recipe file, of at most 4 MB.

        Raises:
            OSError: the file cannot be read.
            ValueError: as `from_json`, with the file's name; or it is something else, such as statistics.
        """
        files.require_path(path)
        if not Path(path).exists():
            raise files.missing(path, files.RECIPE)
        try:
            return cls.from_json(files.read_text(path))
        except ValueError as error:
            raise ValueError(files.explained(path, files.RECIPE, error)) from None


def scorer_parts(scorer: Any) -> tuple[str, dict[str, Any]]:
    """Take a scorer, as a recipe holds it, apart into its name and its parameters.

    Raises:
        ValueError: it has another form. Whether there is such a scorer, `fitprune.scoring.scorers` knows.
    """
    if isinstance(scorer, Mapping) and set(scorer) <= {"name", "parameters"}:
        name, parameters = scorer.get("name"), scorer.get("parameters", {})
        if isinstance(name, str) and isinstance(parameters, Mapping):
            return name, dict(parameters)
    raise ValueError(f"scorer={short(scorer)}: must be an object with a 'name' and perhaps 'parameters'")


def short(value: Any) -> str:
    """Show a value in a message, in at most 60 characters whatever its size."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# What ranks the tokens of methods whose recipes were once written without their scorer.
_SCORERS_LEFT_OUT = {
    "random": "random", "random-input": "random", "fastv": "last", "pyramiddrop": "last", "vtw": "place",
    "divprune": "max-min", "cdpruner": "dpp", "dart": "duplication", "visionzip": "cls",
}  # fmt: skip


def _left_out(provenance: Mapping[str, Any]) -> str | None:
    """The scorer that a recipe of this provenance must state; None where FitPrune's may go without saying."""
    method = provenance.get("method")
    name = method.partition(":")[0].strip().lower().replace("_", "-") if isinstance(method, str) else ""
    return _SCORERS_LEFT_OUT.get(name)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"wrong: a key stands twice among {reprlib.repr([key for key, _ in pairs])}; remove one")
    return found


@functools.cache
def _published() -> dict[str, Any]:
    text = importlib.resources.files("fitprune").joinpath("data/published_recipes.json").read_text()
    return {name.split(" (")[0]: entry for name, entry in json.loads(text)["models"].items()}
