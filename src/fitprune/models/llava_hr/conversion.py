"""Convert the authors' LLaVA-HR checkpoints to this package's format: names, configuration, processor.

A shard is read, renamed and written at a time; what is written is named after where it comes from, so a killed run goes
on where it stopped. All weights are accounted for, by name and shape, before any is written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import load_state_dict

from fitprune import files
from fitprune.models.llava_hr.configuration import LlavaHrConfig
from fitprune.models.llava_hr.names import GROWN, account, config_of
from fitprune.models.llava_hr.processing import make_processor

_SMALLEST = 64 * 2**20  # bytes of an output shard, unless a single weight is larger
_REQUIRED = {"is_multipath_encoder": True, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
_INDEX = "model.safetensors.index.json"


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Convert a checkpoint. May be called again after it was cut off: what is done is kept.

    Needs little more memory than the largest shard of the source has bytes, and as much disk as the source.

    Args:
        source: folder with the authors' config.json, weights (.bin or .safetensors) and tokenizer.
        destination: folder to write; what `from_pretrained` loads.

    Returns:
        The destination.

    Raises:
        ValueError: the source is no LLaVA-HR checkpoint, weights are missing, unexpected or of other shapes, or the
            destination holds something else.
        OSError: a file is missing, or cannot be written.
        ImportError: the tokenizer needs sentencepiece and protobuf.
    """
    source, destination = Path(source), Path(destination)
    given = _read_config(source)
    shards = _shards(source)
    held = {shard: load_state_dict(shard, map_location="meta") for shard in shards}
    tokenizer = _tokenizer(source)
    config = config_of(given, {name: w for part in held.values() for name, w in part.items()}, len(tokenizer))
    names = account(held, config)
    identity = _identity(source, shards)
    _require_ours(destination, identity)

    limit = max(_SMALLEST, max(os.path.getsize(shard) for shard in shards) // 8)
    plan = [(shard, group) for shard in shards for group in _groups(names[shard], held[shard], limit)]
    weight_map: dict[str, str] = {}
    total = 0
    read: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
    for number, (shard, group) in enumerate(tqdm(plan, desc="convert", unit="file"), 1):
        path = destination / f"model-{number:05}-of-{len(plan):05}.safetensors"
        weight_map |= dict.fromkeys(group, path.name)
        total += sum(held[shard][name].nbytes for name in group.values())
        if _source_of(path) == identity:
            continue
        if read[0] != shard:
            read = (None, {})  # let go of the last one first
            read = (shard, load_state_dict(shard))
        weights = {target: _grown(target, read[1][name], config) for target, name in group.items()}
        with files.replacing(path) as temporary:
            save_file(weights, temporary, metadata={"format": "pt", "source": identity})
        del weights  # which hold the shard
    index = {"metadata": {"total_size": total, "source": identity}, "weight_map": weight_map}
    with files.replacing(destination / _INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")
    make_processor(config, tokenizer, pad=given.get("image_aspect_ratio") == "pad").save_pretrained(destination)
    text = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(destination)
    config.save_pretrained(destination)  # last: a folder with a config is whole
    return destination


def _read_config(source: Path) -> dict[str, Any]:
    """Read the authors' config.json and refuse what is no LLaVA-HR."""
    path = source / "config.json"
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; fetch a checkpoint first, with 'hf download NAME --local-dir'"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{source}: has no config.json; must be a whole checkpoint of the authors")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); fetch it again") from None
    if not isinstance(given, dict) or given.get("model_type") != "llava":
        found = given.get("model_type") if isinstance(given, dict) else given
        raise ValueError(
            f"{path}: model_type={found!r}: must be 'llava', as in the authors' checkpoints on Llama; one that is "
            "converted already ('llava_hr') needs no conversion"
        )
    for name, rule in _REQUIRED.items():
        if given.get(name, False) != rule:
            hint = "; for LLaVA-1.5 and LLaVA-NeXT see docs/llava-hr.md" if name == "is_multipath_encoder" else ""
            raise ValueError(
                f"{path}: {name}={given.get(name)!r}: must be {rule!r}, as in every LLaVA-HR checkpoint{hint}"
            )
    if (ratio := given.get("image_aspect_ratio", "square")) not in ("pad", "square"):
        raise ValueError(f"{path}: image_aspect_ratio={ratio!r}: must be 'pad' or 'square' (one view of each image)")
    for name in ("input_image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if type(given.get(name)) is not int or given[name] < 1:
            raise ValueError(f"{path}: {name}={given.get(name)!r}: must be a positive integer")
    return given


def _shards(source: Path) -> list[Path]:
    """Find the files with weights: what an index names, or the single one."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{single}.index.json"
        if index.is_file():
            named = sorted({source / file for file in json.loads(index.read_text())["weight_map"].values()})
            if lacking := [path.name for path in named if not path.is_file()]:
                raise FileNotFoundError(f"{source}: lacks {', '.join(lacking)}, which {index.name} names; fetch them")
            return named
        if (source / single).is_file():
            return [source / single]
    raise FileNotFoundError(
        f"{source}: has no weights; must hold pytorch_model.bin or model.safetensors, or shards with their index.json "
        "(LoRA weights must be merged first, with the authors' scripts/merge_lora_weights.py)"
    )


def _tokenizer(source: Path) -> Any:
    """Load Llama's tokenizer and add what LLaVA needs; saved and loaded again it stays as it is."""
    wanted = ("sentencepiece", "google.protobuf")
    if not (source / "tokenizer.json").is_file() and any(importlib.util.find_spec(name) is None for name in wanted):
        raise ImportError(
            "to read tokenizer.model, sentencepiece and protobuf are needed: pip install 'fitprune[llava-hr]'"
        )
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{source}: has no tokenizer.model; fetch the whole checkpoint")
    loaded = LlamaTokenizer.from_pretrained(source)
    return PreTrainedTokenizerFast(
        # LlamaTokenizer forgets how it begins a text when it is saved; this keeps what was loaded.
        tokenizer_object=loaded.backend_tokenizer,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        unk_token=loaded.unk_token,
        pad_token=loaded.pad_token or loaded.unk_token,
        add_bos_token=True,
        model_max_length=loaded.model_max_length,
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )


def _groups(names: dict[str, str], held: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, str]]:
    """Cut a shard's weights into groups of at most `limit` bytes, or of one weight."""
    group: dict[str, str] = {}
    size = 0
    for target, name in names.items():
        if group and size + held[name].nbytes > limit:
            yield group
            group, size = {}, 0
        group[target] = name
        size += held[name].nbytes
    if group:
        yield group


def _grown(target: str, weight: torch.Tensor, config: LlavaHrConfig) -> torch.Tensor:
    """Give a weight as it is written; a new token's row is the mean of the others', which no answer prefers to them."""
    more = config.text_config.vocab_size - weight.shape[0] if target in GROWN else 0
    if more:
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        weight = torch.cat([weight, mean.expand(more, -1)])
    return weight.contiguous()


def _identity(source: Path, shards: list[Path]) -> str:
    """Tell one source from another: by its config, and by sizes and times of its shards."""
    said = [(source / "config.json").read_text(encoding="utf-8")]
    said += [f"{shard.name} {shard.stat().st_size} {shard.stat().st_mtime_ns}" for shard in shards]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _source_of(path: Path) -> str | None:
    """The identity of the source that a written shard names; None if it is not there."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as written:
            return str((written.metadata() or {}).get("source", ""))
    except SafetensorError:
        return ""


def _require_ours(destination: Path, identity: str) -> None:
    """Refuse a destination with anything but what an earlier run of the same conversion left; make it if need be."""
    destination.mkdir(parents=True, exist_ok=True)
    for left in destination.glob(".model-*.part"):
        left.unlink()  # of a killed run
    there = sorted(destination.iterdir())
    foreign = [path.name for path in there if path.suffix == ".safetensors" and _source_of(path) != identity]
    if there and not foreign and not any(path.suffix == ".safetensors" for path in there):
        foreign = [path.name for path in there]
    if foreign:
        raise ValueError(
            f"{destination}: holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}, not of this "
            "conversion; choose another folder, or delete it"
        )
