"""Read and write a recipe in a folder or a hub repository, its own or its model's: `PruningRecipe.from_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fitprune._support import files
from fitprune.recipes import hub, model_card

REMEDY = "; name a recipe's file, which 'fitprune fit' makes, or a published one, such as llava-1.5-7b:60"


def locate(name_or_dir: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> tuple[Path, bool]:
    """Find the recipe file of a folder, or download it with `hub.download`'s options; say whether it is a download."""
    files.require_path(name_or_dir)
    path, name = Path(name_or_dir), os.fspath(name_or_dir)
    if not path.is_dir():
        place = hub.split_name(name)
        if place is None or place[1] is not None:
            raise FileNotFoundError(f"{name}: no such folder, and no hub name (owner/name)")
        return hub.download(name, revision=revision, **options), True
    if revision is not None:
        raise ValueError(f"revision={revision!r}: {name} is a folder, which has none; leave it out")
    if not (path / hub.RECIPE_FILE).exists():
        entries = [entry for entry in sorted(path.glob("*.json"))[:200] if entry.is_file()]
        small = [entry for entry in entries if entry.stat().st_size <= files.MOST_BYTES]
        others = [entry.name for entry in small if files.kind_of(entry) == files.RECIPE]
        remedy = f"; name one of its recipes: {', '.join(others)}" if others else REMEDY
        raise FileNotFoundError(f"folder {name} has no {hub.RECIPE_FILE}{remedy}")
    return path / hub.RECIPE_FILE, False


def write_folder(directory: str | os.PathLike[str], text: str, card: Callable[[], str]) -> None:
    """Write a recipe's text into a folder, with its card unless the folder is a model's or has another README.md."""
    files.require_path(directory)
    folder = Path(directory)
    files.write_text(folder / hub.RECIPE_FILE, text)
    readme = folder / hub.CARD_FILE
    present = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else None
    if model_card.wanted(os.listdir(folder), present):
        files.write_text(readme, card())


def push(
    repository: hub.Repository, text: str, card: Callable[[str], str], message: str, *, create_pr: bool = False
) -> str:
    """Commit a recipe's text, with its card as `write_folder`; `card` takes the name that finds the recipe."""
    texts = {hub.RECIPE_FILE: text}
    if model_card.wanted(repository.names, repository.card):
        revision = repository.revision
        texts[hub.CARD_FILE] = card(repository.repo_id if revision is None else f"{repository.repo_id}@{revision}")
    return repository.commit(texts, message, create_pr=create_pr)


def base_model_of(provenance: Mapping[str, Any]) -> str | None:
    """Give the hub name of the model that was measured; None where that was a folder, or is not known."""
    measured = provenance.get("measured")
    name = str(measured.get("model", "")) if isinstance(measured, Mapping) else ""
    return name if hub.split_name(name) == (name, None) and not Path(name).exists() else None
