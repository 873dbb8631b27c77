"""Load a model and its processor: by hub name or folder, whole, spread over devices, or quantized."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from fitprune._support.host import set_commit
from fitprune.families.checkpoint import (
    find_checkpoint,
    has_own_weights,
    read_config,
    require_weights,
    require_whole_files,
)
from fitprune.families.peft_adapter import merge_adapter
from fitprune.families.processor import load_processor
from fitprune.families.quantization import quantization_config, require_quantizer
from fitprune.recipes import hub

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    token: str | bool | None = None,
) -> tuple[Any, Any]:
    """Load a supported model for inference, with its processor, all of one commit.

    A PEFT adapter is merged into its base model. All that does not need the weights is checked before they are loaded.
    A tokenizer without a padding token pads with its end of text: padding is masked.

    Args:
        name: folder or hub name (owner/name); "digit-scenes" is the bundled model.
        revision: branch, tag or commit on the hub; by default the main branch.
        dtype: "auto" (the checkpoint's), float32, bfloat16 or float16.
        device: where the whole model goes, such as "cuda:1"; by default the CPU.
        device_map: how accelerate spreads it over devices instead, such as "auto".
        attn_implementation: attention of the model; by default transformers' choice.
        trust_remote_code: run the code that a hub repository brings.
        quantization: a name in QUANTIZATIONS: quantize the weights while they are loaded. A checkpoint that is
            quantized already needs none.
        token: hub token; by default the one that is logged in.

    Returns:
        The model, which knows its name and commit (`prune` looks there for a recipe), and the processor.

    Raises:
        ValueError: the family is not supported, an argument is out of range, two contradict each other, a folder comes
            with a revision, or the checkpoint lacks weights of its model, or has them in another shape.
        ImportError: the processor, an adapter, `quantization` or `device_map` needs a package that is missing.
        OSError: the files are not there, or broken, or the hub is out of reach.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import find_adapter_config_file

    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if quantization is not None:
        require_quantizer(quantization)
    if device_map is not None and device is not None:
        raise ValueError(f"device_map={device_map!r} and device={str(device)!r}: pass one; a map says where parts go")
    place = None if device_map is not None else _device("cpu" if device is None else device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"name is a {type(name).__name__}: must be a model's folder or hub name, as text or Path")
    name = os.fspath(name)
    folder = find_checkpoint(name)
    if revision is not None and os.path.isdir(folder):
        raise ValueError(f"revision={revision!r}: {name} is a folder, which has none; leave it out")
    # Config, weights and processor come from one commit.
    commit = None if os.path.isdir(folder) else hub.pin(folder, revision, token=token)
    source = {"revision": commit, "trust_remote_code": trust_remote_code, "token": token}
    if find_adapter_config_file(folder, revision=commit, token=token) and not has_own_weights(folder, commit, token):
        if quantization is not None:
            raise ValueError(
                f"quantization={quantization!r}: {name} is a PEFT adapter, which is merged into whole weights; "
                "save the merged model, and quantize that"
            )
        load_base = functools.partial(
            load_model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            token=token,
        )
        model, processor = merge_adapter(name, folder, source, load_base)
        return _named(model, name, commit), processor
    # Before the weights: what is wrong with the family or the processor is found in a second.
    config = read_config(name, folder, source)
    processor = load_processor(name, folder, source, config.model_type)
    if quantization is not None:
        computed = config.dtype if options["dtype"] == "auto" else options["dtype"]
        options["quantization_config"] = quantization_config(quantization, computed or torch.float32)
    if device_map is not None:
        options["device_map"] = device_map
    elif quantization is not None or getattr(config, "quantization_config", None) is not None:
        options["device_map"] = {"": place}  # put there while it is loaded: not all that is quantized can be moved
    if "device_map" in options and importlib.util.find_spec("accelerate") is None:
        raise ImportError("device_map and quantized weights need accelerate: pip install accelerate")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by their names
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, **source, **options)
    except Exception as error:  # whatever a broken file raises
        require_whole_files(name, folder, error)
        raise
    require_weights(name, model, report)
    model = model.eval()
    if "device_map" not in options:
        model = model.to(place)
    return _named(model, name, commit), processor


def _named(model: Any, name: str, commit: Any) -> Any:
    """Give a model the name that results record: the bundled model's folder differs from machine to machine."""
    model.name_or_path = name
    set_commit(model, getattr(commit, "resolved", None))
    return model


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device}: unknown; for example cpu, cuda or cuda:1") from None
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes: each has a GPU of its own
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this torch sees no CUDA device; use cpu")
    return place
