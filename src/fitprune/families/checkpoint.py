"""Find a checkpoint and read its config; say which of its files or weights is missing or broken."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fitprune._support import assets
from fitprune._support.host import has_file
from fitprune._support.messages import line
from fitprune.families.config import fingerprint_of
from fitprune.families.table import find_family
from fitprune.recipes import hub


def find_checkpoint(name: str) -> str:
    """Find the folder or hub name that `name` stands for, without a request to the hub.

    Hub names without an owner, such as "gpt2", are older than multimodal models: there is none to load.

    Args:
        name: folder, hub name, or a bundled model's name.

    Raises:
        FileNotFoundError: there is no such folder, or it has no config.json.
        ValueError: it is a file, or a hub name with a revision in it.
    """
    if name in assets.DATA and not os.path.exists(name):
        raise FileNotFoundError(f"{name} is bundled data, not a model: the bundled model is {assets.MODEL}")
    try:
        place = assets.resolve(name)
    except FileNotFoundError:  # nearly a bundled name; only one is a model's
        raise FileNotFoundError(
            f"{name}: no such file or folder; did you mean {assets.MODEL}? It is the one bundled model"
        ) from None
    gguf = "; GGUF is not read: name the model that it was made of" if name.endswith(".gguf") else ""
    if os.path.isfile(place):
        raise ValueError(f"{name} is a file: must be a model's folder or a hub name{gguf}")
    if os.path.isdir(place):
        if not any(os.path.isfile(os.path.join(place, file)) for file in ("config.json", "adapter_config.json")):
            inner = sorted({path.parent.name for path in Path(place).glob("*/*config.json")})
            remedy = f"; name a folder in it: {', '.join(inner[:5])}" if inner else ""
            raise FileNotFoundError(f"{name} has no config.json: must be a folder that save_pretrained wrote{remedy}")
        return place
    parts = hub.split_name(name)
    if parts is None:
        raise FileNotFoundError(
            f"{name}: no such folder, and no hub name, which is owner/name; the bundled model is {assets.MODEL}"
        )
    if parts[1] is not None:
        raise ValueError(f"{name}: a model's revision is passed apart: {parts[0]} with revision={parts[1]!r}")
    return place


def has_own_weights(folder: str, revision: str | None, token: Any) -> bool:
    """Whether a folder has weights, or a repository a config, that are not an adapter's."""
    if os.path.isdir(folder):
        names = (file for file in os.listdir(folder) if file.startswith(("model", "pytorch_model")))
        return any(file.endswith((".safetensors", ".bin", ".index.json")) for file in names)
    return has_file(folder, "config.json", revision=revision, token=token)


def read_config(name: str, folder: str, source: Mapping[str, Any]) -> Any:
    """Read the config of a checkpoint.

    Args:
        name: as the user wrote it, for messages.
        folder: folder or hub name.
        source: transformers' keywords `revision`, `trust_remote_code` and `token`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of no supported family, or in another layout.
    """
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        PreTrainedConfig,
        __version__,
    )

    try:
        entries = PreTrainedConfig.get_config_dict(folder, **source)[0]
    except OSError as error:
        require_whole_files(name, folder, error)
        raise OSError(f"{name}: its config.json cannot be read ({first_sentence(error)})") from error
    if "mm_vision_tower" in entries and "text_config" not in entries:  # transformers would build a 7B of random weights
        remedy = (
            "fitprune convert-llava-hr" if entries.get("is_multipath_encoder") else "transformers' conversion script"
        )
        raise ValueError(f"{name}: is in the layout of LLaVA's authors; convert it with {remedy} (docs/llava-hr.md)")
    model_type, remote = entries.get("model_type"), "auto_map" in entries
    if model_type is None:
        raise ValueError(f"{name} has no config.json with a model_type, so it is no model of transformers")
    if (register := find_family(model_type).register) is not None:
        register()
    if model_type not in CONFIG_MAPPING and not remote:
        raise ValueError(f"{name}: model_type={model_type!r} is unknown to transformers {__version__}; upgrade it")
    config = AutoConfig.from_pretrained(folder, **source)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (remote and source["trust_remote_code"]):
        raise ValueError(
            f"{name}: model_type={model_type!r}: not supported, because it does not answer in text about images; "
            "'fitprune families' lists what is"
        )
    fingerprint_of(config)
    return config


def require_whole_files(name: str, folder: str, error: Exception) -> None:
    """Name the broken file of a folder that something failed to load from, where there is one.

    Args:
        name: as the user wrote it, for messages.
        folder: folder or hub name; only a folder's files are looked at.
        error: the failure.

    Raises:
        OSError: a file is broken.
    """
    known = (".safetensors", ".bin", ".json", ".model", ".jinja")
    for path in sorted(Path(folder).glob("*") if os.path.isdir(folder) else ()):
        if path.suffix not in known or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(64)
        fault = "" if head else "is empty: download it again"
        if head.startswith(b"version https://git-lfs"):
            fault = "is a git-LFS pointer, not the file itself: run git lfs pull there"
        elif head and path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as broken:
                fault = f"is truncated or broken ({first_sentence(broken)}): download it again"
        if fault:
            raise OSError(f"{name}: {path.name} {fault}") from error
    if isinstance(error, SafetensorError):
        raise OSError(f"{name}: its weights cannot be read ({first_sentence(error)})") from error


def require_weights(name: str, model: Any, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model with parameters that its checkpoint has not.

    Args:
        name: as the user wrote it, for messages.
        model: as loaded; transformers has filled such parameters with random values.
        report: transformers' account of the keys, which knows those that are tied or quantized.

    Raises:
        ValueError: weights are missing, or have another shape.
    """
    parameters = {key for key, _ in model.named_parameters()}
    wrong = {key: f"{tuple(stored)}, not {tuple(shape)}" for key, stored, shape in report["mismatched_keys"]}
    for keys, what in (
        (sorted(parameters & set(report["missing_keys"])), "are missing"),
        (sorted(wrong), "have another shape than config.json says"),
    ):
        if keys:
            first = ", ".join(f"{key} {wrong.get(key, '')}".strip() for key in keys[:3])
            more = ", ..." if len(keys) > 3 else ""
            raise ValueError(
                f"{name}: {len(keys)} of its weights {what}: {first}{more}; random ones would stand there: "
                "download or save the model again"
            )


def first_sentence(error: Exception) -> str:
    """Give an error's first sentence on one line: transformers' errors go on with advice."""
    return line(error, 300).partition(". ")[0]
