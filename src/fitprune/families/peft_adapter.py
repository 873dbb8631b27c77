"""Load a PEFT adapter: its base model, into which the adapter is merged."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fitprune._support.host import has_file
from fitprune.families.checkpoint import require_whole_files
from fitprune.families.processor import load_processor


def merge_adapter(
    name: str, folder: str, source: Mapping[str, Any], load_base: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Load an adapter's base model and merge the adapter into it.

    Args:
        name: as the user wrote it, for messages.
        folder: folder or hub name of the adapter.
        source: transformers' keywords `revision`, `trust_remote_code` and `token`.
        load_base: `load_model` but for the adapter's own entries: takes the base's name and its revision.

    Returns:
        The merged model, and the adapter's processor if it has one, else the base's.

    Raises:
        ImportError: peft is missing.
        ValueError: the adapter names no base model, only adds tokens, or lacks weights.
        OSError: the base or a file is missing or broken.
    """
    from transformers.utils import find_adapter_config_file

    place = {"revision": source["revision"], "token": source["token"]}
    with open(find_adapter_config_file(folder, **place), encoding="utf-8") as file:
        entries = json.load(file)
    base = entries.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name} is a PEFT adapter whose adapter_config.json names no base model: merge it into its own"
        )
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            f"{name} is a PEFT adapter of {base}: pip install peft, or merge it (merge_and_unload) and save that model"
        )
    from peft import PeftConfig, PeftModel

    if PeftConfig.from_pretrained(folder, **place).is_prompt_learning:
        raise ValueError(
            f"{name} is a PEFT adapter of {base} that only adds tokens ({entries['peft_type']}): not supported"
        )
    own = any(has_file(folder, part, **place) for part in ("processor_config.json", "preprocessor_config.json"))
    processor = load_processor(name, folder, source, "this adapter") if own else None  # before the weights too
    try:
        model, other = load_base(base, revision=entries.get("revision"))
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name} is a PEFT adapter of {base}, which does not load: {error}") from error
    try:
        with warnings.catch_warnings():  # else half an adapter is merged
            warnings.filterwarnings("error", ".*Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, folder, **place)
    except Exception as error:
        require_whole_files(name, folder, error)
        if isinstance(error, UserWarning):
            raise ValueError(f"{name} is a PEFT adapter of {base}: {str(error)[:200]}; save it again") from None
        raise
    return tuned.merge_and_unload().eval(), processor or other
