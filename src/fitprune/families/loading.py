"""Load a model and its processor: by hub name or folder, whole, spread over devices, or quantized."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fitprune._support import assets
from fitprune.families.config import fingerprint_of
from fitprune.recipes import hub

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Name -> the package that does it. docs/quantization.md says what was tried.
QUANTIZATIONS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}


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

    A PEFT adapter is merged into its base model. What does not need the weights is looked at before them. A tokenizer
    without a padding token pads with its end of text: padding is masked.

    Args:
        name: folder or hub name (owner/name); "digit-scenes" is the embedded model.
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
        ValueError: the family is not supported, an argument is out of range, two contradict each other, a folder is
            given with a revision, or the checkpoint lacks weights of its model, or has them in another shape.
        ImportError: the processor, an adapter, `quantization` or `device_map` needs a package that is missing.
        OSError: the files are not there, or broken, or the hub is out of reach.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import find_adapter_config_file

    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if quantization is not None:
        _require_quantizer(quantization)
    if device_map is not None and device is not None:
        raise ValueError(f"device_map={device_map!r} and device={str(device)!r}: state one; a map says where parts go")
    place = None if device_map is not None else _device("cpu" if device is None else device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"name is a {type(name).__name__}: must be a model's folder or hub name, as text or Path")
    name = os.fspath(name)
    folder = _place(name)
    if revision is not None and os.path.isdir(folder):
        raise ValueError(f"revision={revision!r}: {name} is a folder, which has none; leave it out")
    # Config, weights and processor come from one commit.
    commit = None if os.path.isdir(folder) else hub.pin(folder, revision, token=token)
    source = {"revision": commit, "trust_remote_code": trust_remote_code, "token": token}
    if find_adapter_config_file(folder, revision=commit, token=token) and not _is_whole(folder, commit, token):
        if quantization is not None:
            raise ValueError(
                f"quantization={quantization!r}: {name} is a PEFT adapter, which is merged into whole weights; "
                "save the merged model, and quantize that"
            )
        more = {"device_map": device_map, "attn_implementation": attn_implementation}
        model, processor = _merge_adapter(name, folder, source, dtype=dtype, device=device, **more)
        return _name_it(model, name, commit), processor
    # Before the weights: what is wrong with the family or the processor is found in a second.
    config = _config(name, folder, source)
    processor = _processor(name, folder, source, config.model_type)
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
        model, found = AutoModelForImageTextToText.from_pretrained(folder, **source, **options)
    except Exception as error:  # whatever a broken file raises
        _require_whole_files(name, folder, error)
        raise
    _require_weights(name, model, found)
    model = model.eval()
    if "device_map" not in options:
        model = model.to(place)
    return _name_it(model, name, commit), processor


def _require_weights(name: str, model: Any, found: dict[str, Collection[Any]]) -> None:
    """Refuse a model with parameters that transformers had to make up; it knows those that are tied or quantized."""
    made_up = {key for key, _ in model.named_parameters()}
    wrong = {key: f"{tuple(there)}, not {tuple(here)}" for key, there, here in found["mismatched_keys"]}
    for keys, what in (
        (sorted(made_up & set(found["missing_keys"])), "are missing"),
        (sorted(wrong), "have another shape than config.json says"),
    ):
        if keys:
            shown = ", ".join(f"{key} {wrong.get(key, '')}".strip() for key in keys[:3])
            more = ", ..." if len(keys) > 3 else ""
            raise ValueError(
                f"{name}: {len(keys)} of its weights {what}: {shown}{more}; random ones would stand there: "
                "download or save the model again"
            )


def _require_whole_files(name: str, folder: str, error: Exception) -> None:
    """Name the broken file of a folder that something failed to load from, where one is.

    Raises:
        OSError: there is one.
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
                fault = f"is truncated or broken ({_first_line(broken)}): download it again"
        if fault:
            raise OSError(f"{name}: {path.name} {fault}") from error
    if isinstance(error, SafetensorError):
        raise OSError(f"{name}: its weights cannot be read ({_first_line(error)})") from error


def _name_it(model: Any, name: str, commit: Any) -> Any:
    """Let a model know what results say of it: the embedded model's folder differs from machine to machine."""
    model.name_or_path = name
    model.config._commit_hash = getattr(commit, "resolved", None)  # which transformers does not keep
    return model


def _place(name: str) -> str:
    """Find the folder or hub name that is meant, without asking the hub.

    Hub names without an owner, such as "gpt2", are from before there were multimodal models: there is none to load.
    """
    if name in assets.DATA and not os.path.exists(name):
        raise FileNotFoundError(f"{name} is embedded data, not a model: the embedded model is {assets.MODEL}")
    try:
        place = assets.resolve(name)
    except FileNotFoundError:  # nearly an embedded name; only one is a model's
        raise FileNotFoundError(
            f"{name}: no such file or folder; did you mean {assets.MODEL}? It is the one embedded model"
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
            f"{name}: no such folder, and no hub name, which is owner/name; the embedded model is {assets.MODEL}"
        )
    if parts[1] is not None:
        raise ValueError(f"{name}: a model's revision is stated apart: {parts[0]} with revision={parts[1]!r}")
    return place


def _is_whole(folder: str, revision: str | None, token: Any) -> bool:
    """Whether a folder has weights, or a repository a config, that are not an adapter's."""
    from transformers.utils import cached_file

    if os.path.isdir(folder):
        names = (file for file in os.listdir(folder) if file.startswith(("model", "pytorch_model")))
        return any(file.endswith((".safetensors", ".bin", ".index.json")) for file in names)
    missing = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(folder, "config.json", revision=revision, token=token, **missing) is not None


def _config(name: str, folder: str, source: dict[str, Any]) -> Any:
    """Read the config.

    Raises:
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
        _require_whole_files(name, folder, error)
        raise OSError(f"{name}: its config.json cannot be read ({_first_line(error)})") from error
    if "mm_vision_tower" in entries and "text_config" not in entries:  # transformers would build a 7B of random weights
        remedy = (
            "fitprune convert-llava-hr" if entries.get("is_multipath_encoder") else "transformers' conversion script"
        )
        raise ValueError(f"{name}: is in the layout of LLaVA's authors; convert it with {remedy} (docs/llava-hr.md)")
    model_type, remote = entries.get("model_type"), "auto_map" in entries
    if model_type == "llava_hr":
        from fitprune.families import llava_hr

        llava_hr.register()
    if model_type is None:
        raise ValueError(f"{name} has no config.json with a model_type, so it is no model of transformers")
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


def _processor(name: str, folder: str, source: dict[str, Any], model_type: str) -> Any:
    """Load the processor.

    Raises:
        ImportError: it needs a package that is missing.
        OSError: a file of it is missing.
    """
    from transformers import AutoProcessor

    remedy = "copy the processor's files from the model that this one was tuned from"
    try:
        processor = AutoProcessor.from_pretrained(folder, **source)
    except Exception as error:  # whatever the parts of a processor raise
        reason = _first_line(error)
        # A class that torchvision's absence leaves out may be looked for without end.
        without = "torchvision" in str(error).lower() or isinstance(error, RecursionError)
        if without and importlib.util.find_spec("torchvision") is None:
            raise ImportError(
                f"{name}: the processor of {model_type} needs torchvision, in a build for torch {torch.__version__}: "
                "pip install torchvision (fitprune's extra 'torchvision')"
            ) from error
        if isinstance(error, ImportError):
            raise ImportError(f"{name}: its processor needs a package that is missing ({reason})") from error
        _require_whole_files(name, folder, error)
        raise OSError(f"{name}: its processor cannot be loaded ({reason}); {remedy}") from error
    for part, file in (("image_processor", "preprocessor_config.json"), ("tokenizer", "tokenizer.json")):
        if getattr(processor, part, None) is None:
            raise FileNotFoundError(f"{name}: its processor has no {part} ({file}); {remedy}")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _merge_adapter(name: str, folder: str, source: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """Load a PEFT adapter's base model and merge the adapter into it."""
    from transformers.utils import cached_file, find_adapter_config_file

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
    parts = ("processor_config.json", "preprocessor_config.json")
    own = any(cached_file(folder, part, _raise_exceptions_for_missing_entries=False, **place) for part in parts)
    processor = _processor(name, folder, source, "this adapter") if own else None  # before the weights too
    try:
        model, other = load_model(
            base,
            revision=entries.get("revision"),
            trust_remote_code=source["trust_remote_code"],
            token=source["token"],
            **options,
        )
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name} is a PEFT adapter of {base}, which does not load: {error}") from error
    try:
        with warnings.catch_warnings():  # else half an adapter is merged
            warnings.filterwarnings("error", ".*Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, folder, **place)
    except Exception as error:
        _require_whole_files(name, folder, error)
        if isinstance(error, UserWarning):
            raise ValueError(f"{name} is a PEFT adapter of {base}: {str(error)[:200]}; save it again") from None
        raise
    return tuned.merge_and_unload().eval(), processor or other


def _first_line(error: Exception) -> str:
    """An error's first sentence in one line: those of transformers go on with advice."""
    return " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device}: unknown; for example cpu, cuda or cuda:1") from None
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes: each has a GPU of its own
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this torch sees no CUDA device; use cpu")
    return found


def _require_quantizer(name: str) -> None:
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r}: must be one of {', '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec(QUANTIZATIONS[name]) is None:
        raise ImportError(f"quantization {name} needs {QUANTIZATIONS[name]}: pip install {QUANTIZATIONS[name]}")


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """Give transformers' configuration for a name in QUANTIZATIONS.

    Args:
        name: what is meant.
        dtype: what the weights are expanded to where they are used.

    Raises:
        ValueError: there is no such name.
        ImportError: its package is missing.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    _require_quantizer(name)
    if name == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
