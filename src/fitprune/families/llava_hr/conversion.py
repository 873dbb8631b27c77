"""Convert the authors' LLaVA-HR checkpoints to this package's format: names, configuration, processor.

One shard at a time is read, renamed and written. Each written shard names its source, so a killed run goes on where it
stopped. All weights are accounted for, by name and shape, before any is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import load_state_dict
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from fitprune._support import files
from fitprune.families.llava_hr.configuration import LlavaHrConfig
from fitprune.families.llava_hr.names import GROWN, account, config_of
from fitprune.families.llava_hr.processing import make_processor

_SMALLEST = 64 * 2**20  # bytes of an output shard, unless a single weight is larger
_REQUIRED = {"is_multipath_encoder": True, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
)  # fmt: skip
_FORMAT = 1  # raised whenever the same source is converted to other files
_INDEX = "model.safetensors.index.json"


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Convert a checkpoint. After a killed run, call it again: what is done is kept.

    Needs little more memory than the bytes of the source's largest shard, and as much disk as the source.

    Args:
        source: folder with the authors' config.json, weights (.bin or .safetensors) and tokenizer.
        destination: folder to write, which `from_pretrained` then loads.

    Returns:
        The destination.

    Raises:
        ValueError: the source is no LLaVA-HR checkpoint, weights are missing, unexpected or of other shapes, or the
            destination has other files.
        OSError: a file is missing, or cannot be written.
        ImportError: the tokenizer needs sentencepiece and protobuf.
    """
    source, destination = Path(source), Path(destination)
    settings = _read_config(source)
    shards = _shards(source)
    on_meta = {shard: _read(shard, "meta") for shard in shards}
    tokenizer = _tokenizer(source)
    weights = {name: weight for part in on_meta.values() for name, weight in part.items()}
    with _named(source / "config.json", "fetch it again, or mend it", passing=(ValueError,)):
        config = config_of(settings, weights, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
        names = account(on_meta, config, settings["vocab_size"])
    processor = make_processor(config, tokenizer, pad=settings.get("image_aspect_ratio") == "pad")
    identity = _identity(source, shards)
    unfinished = _require_ours(destination, identity)

    limit = max(_SMALLEST, max(os.path.getsize(shard) for shard in shards) // 8)
    pieces = [(shard, group) for shard in shards for group in _groups(names[shard], on_meta[shard], limit)]
    weight_map: dict[str, str] = {}
    total = 0
    read: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
    for number, (shard, group) in enumerate(tqdm(pieces, desc="convert", unit="file", disable=None), 1):
        path = destination / f"model-{number:05}-of-{len(pieces):05}.safetensors"
        weight_map |= dict.fromkeys(group, path.name)
        total += sum(on_meta[shard][name].nbytes for name in group.values())
        if _source_of(path) == identity:
            continue
        if read[0] != shard:
            read = (None, {})  # free the last one first
            read = (shard, _read(shard, "cpu"))
        weights = {target: _grown(target, read[1][name], config) for target, name in group.items()}
        try:
            save_file(weights, unfinished / path.name, metadata={"format": "pt", "source": identity})
            files.make_readable(unfinished / path.name)
            os.replace(unfinished / path.name, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write {path}: {error}; what is done is kept: run it again to go on") from error
        weights = {}  # they keep the shard in memory
    index = {"metadata": {"total_size": total, "source": identity}, "weight_map": weight_map}
    files.write_json(destination / _INDEX, index)
    processor.save_pretrained(destination)
    text = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(destination)
    shutil.rmtree(unfinished)
    config.save_pretrained(destination)  # last: a folder with a config is complete
    return destination


@contextlib.contextmanager
def _named(path: Path, remedy: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Name the file in any error that reading it raises, but for those of the types `passing`."""
    try:
        yield
    except passing:
        raise
    except Exception as error:  # tokenizers and strict configs fail in ways of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: cannot be used ({reason}); {remedy}") from error


def _read(shard: Path, device: str) -> dict[str, torch.Tensor]:
    """Read a shard; on the device "meta" its names, shapes and types alone."""
    try:
        read = load_state_dict(shard, map_location=device)
    except Exception as error:  # torch's own advice, to load without its check, is no remedy
        raise ValueError(f"{shard}: damaged, or no file of weights ({type(error).__name__}); fetch it again") from error
    if not isinstance(read, dict) or not all(isinstance(weight, torch.Tensor) for weight in read.values()):
        raise ValueError(f"{shard}: must hold weights by name, as model.save_pretrained writes them")
    return read


def _read_config(source: Path) -> dict[str, Any]:
    """Read the authors' config.json; refuse any other model's."""
    path = source / "config.json"
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; fetch a checkpoint first, with 'hf download NAME --local-dir'"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{source}: has no config.json; must be a whole checkpoint of the authors")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); fetch it again") from None
    if not isinstance(settings, dict) or settings.get("model_type") != "llava":
        model_type = settings.get("model_type") if isinstance(settings, dict) else settings
        raise ValueError(
            f"{path}: model_type={model_type!r}: must be 'llava', as in the authors' checkpoints on Llama; one that is "
            "converted already ('llava_hr') needs no conversion"
        )
    for name, rule in _REQUIRED.items():
        if settings.get(name, False) != rule:
            hint = "; for LLaVA-1.5 and LLaVA-NeXT see docs/llava-hr.md" if name == "is_multipath_encoder" else ""
            raise ValueError(
                f"{path}: {name}={settings.get(name)!r}: must be {rule!r}, as in every LLaVA-HR checkpoint{hint}"
            )
    if (ratio := settings.get("image_aspect_ratio", "square")) not in ("pad", "square"):
        raise ValueError(f"{path}: image_aspect_ratio={ratio!r}: must be 'pad' or 'square' (one view of each image)")
    for name in (
        "vocab_size",
        "input_image_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ):
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise ValueError(f"{path}: {name}={settings.get(name)!r}: must be a positive integer")
    return settings


def _shards(source: Path) -> list[Path]:
    """Find the files with weights: what an index names, or the single one."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{single}.index.json"
        if index.is_file():
            with _named(index, "fetch it again"):
                named = sorted({source / file for file in json.loads(index.read_text())["weight_map"].values()})
            if not named:
                raise ValueError(f"{index}: names no weights; fetch it again")
            if lacking := [path.name for path in named if not path.is_file()]:
                raise FileNotFoundError(f"{source}: lacks {', '.join(lacking)}, which {index.name} names; fetch them")
            return named
        if (source / single).is_file():
            return [source / single]
    raise FileNotFoundError(
        f"{source}: has no weights; must hold pytorch_model.bin or model.safetensors, or shards with their index.json "
        "(the first stage of training saves mm_projector.bin alone, which is no model; LoRA weights must be merged "
        "first, with the authors' scripts/merge_lora_weights.py)"
    )


def _tokenizer(source: Path) -> Any:
    """Load Llama's tokenizer and add what LLaVA needs, so that saving and loading do not change it."""
    reads_model = is_sentencepiece_available() and is_protobuf_available()
    if not (source / "tokenizer.json").is_file() and not reads_model:
        raise ImportError(
            "to read tokenizer.model, sentencepiece and protobuf are needed: pip install sentencepiece protobuf"
        )
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{source}: has no tokenizer.model; fetch the whole checkpoint")
    with _named(source / "tokenizer.model", "fetch the files of the tokenizer again"):
        loaded = LlamaTokenizer.from_pretrained(source)
    return PreTrainedTokenizerFast(
        # LlamaTokenizer does not save how it begins a text; this one does.
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


def _groups(names: dict[str, str], weights: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, str]]:
    """Cut a shard's weights into groups of at most `limit` bytes, or of one weight."""
    group: dict[str, str] = {}
    size = 0
    for target, name in names.items():
        if group and size + weights[name].nbytes > limit:
            yield group
            group, size = {}, 0
        group[target] = name
        size += weights[name].nbytes
    if group:
        yield group


def _grown(target: str, weight: torch.Tensor, config: LlavaHrConfig) -> torch.Tensor:
    """Add the rows of new tokens to a weight: the mean of the others, which the argmax never prefers to them."""
    more = config.text_config.vocab_size - weight.shape[0] if target in GROWN else 0
    if more:
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        weight = torch.cat([weight, mean.expand(more, -1)])
    return weight.contiguous()


def _identity(source: Path, shards: list[Path]) -> str:
    """Hash what tells one source from another: its config, sizes and times of its other files, and this format."""
    parts = [(source / "config.json").read_text(encoding="utf-8"), str(_FORMAT)]
    others = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    parts += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in (*shards, *others)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source_of(path: Path) -> str | None:
    """Read the identity of the source that a written shard names; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as written:
            return str((written.metadata() or {}).get("source", ""))
    except SafetensorError:
        return ""


def _require_ours(destination: Path, identity: str) -> Path:
    """Refuse a destination with other files than those of an earlier run of this conversion; make it if need be.

    Args:
        destination: the folder.
        identity: that of the source.

    Returns:
        An empty folder in it, for files that are not finished.
    """
    if os.path.lexists(destination) and not destination.is_dir():
        raise ValueError(f"{destination}: is there and is no folder; choose another destination")
    unfinished = destination / ".unfinished"
    there = [path for path in sorted(destination.iterdir()) if path != unfinished] if destination.is_dir() else []
    shards = [path for path in there if path.suffix == ".safetensors"]
    foreign = [path for path in shards if _source_of(path) != identity] or ([] if shards else there)
    if foreign:
        named = ", ".join(path.name for path in foreign[:3])
        raise ValueError(
            f"{destination}: has {named}{' and more' if len(foreign) > 3 else ''}, not of this conversion; choose "
            "another folder, or delete it"
        )
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {destination}: {error.strerror}; choose another destination"
        ) from None
    return unfinished
