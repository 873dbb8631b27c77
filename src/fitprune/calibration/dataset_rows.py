"""Read the rows of a Hugging Face dataset: saved to disk, a folder of images, or a hub name."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitprune._support import assets
from fitprune._support.messages import line
from fitprune.calibration.pictures import InDataset

logger = logging.getLogger(__name__)


def read_rows(path: Path, name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) for each row of a dataset; pictures are not read yet.

    Args:
        path: the dataset's folder, if it is one.
        name: the dataset as the user wrote it.
        split: the split's name; "" takes the first.

    Raises:
        FileNotFoundError: the name is a path, and nothing is there.
        ValueError: `datasets` is missing or cannot load it, it is a model's folder, or there is no such split.
    """
    if not os.path.isdir(path) and (path.suffix or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(2, f"{name}: no such file or folder")
    if os.path.isfile(path / "config.json"):
        raise ValueError(f"{name}: is a model's folder, must be data; bundled are {', '.join(assets.DATA)}")
    splits = _load_splits(path, name)
    if not split and len(splits) > 1:
        first, other, *_ = splits
        logger.warning("%s has splits %s: %r is used; name another as %s:%s", name, [*splits], first, name, other)
    if split and split not in splits:
        names = ", ".join(filter(None, splits))
        rule = f"no such split; there are {names}" if names else f"the dataset has no splits; name {name}"
        raise ValueError(f"{name}:{split}: {rule}")
    rows = (splits[split] if split else next(iter(splits.values()))).with_format("arrow")
    # A picture that nobody asks for costs nothing, and a bad one is named when it is asked for.
    number = itertools.count()
    classes = {column: kind for column, kind in rows.features.items() if "ClassLabel" in repr(kind)}
    for table in rows.iter(batch_size=1000):
        heavy = [c.name for c in table.schema if c.name in ("image", "file_name") and not _is_text(c.type)]
        present = {column: table[column].is_valid().to_pylist() for column in heavy}
        for offset, row in enumerate(table.drop_columns(heavy).to_pylist()):
            place = next(number)
            pictures = {c: InDataset(rows, place, c) if present[c][offset] else None for c in heavy}
            words = {column: _with_class_names(row.get(column), kind) for column, kind in classes.items()}
            yield f"{name}, row {place}", {**row, **words, **pictures}


def _load_splits(path: Path, name: str) -> dict[str, Any]:
    """Load the dataset: split -> rows."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: reading a dataset needs the datasets package: pip install datasets") from None
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except Exception as error:  # datasets raises many kinds; all mean that the name does not load
        reason = "it has no rows" if isinstance(error, IndexError) else " ".join(str(error).split())
        raise ValueError(
            f"{name}: datasets cannot load it ({line(reason, 300)}); give a JSONL file, a folder or a hub name"
        ) from None
    return loaded if isinstance(loaded, dict) else {str(loaded.split or ""): loaded}


def _with_class_names(value: Any, kind: Any) -> Any:
    """Replace a ClassLabel's number by its name, also inside of lists and dicts; -1 stands for no class."""
    if value is None:
        return None
    if isinstance(kind, dict):
        return {key: _with_class_names(value[key], inner) for key, inner in kind.items()}
    if (inner := kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)) is not None:
        return [_with_class_names(each, inner) for each in value]
    if hasattr(kind, "int2str"):
        return kind.int2str(value) if value >= 0 else None
    return value


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "null")
