"""Load a model and its processor: by hub name or folder, whole, spread over devices, or quantized."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from fitprune import adapters, embedded

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

    Args:
        name: folder or hub name; "digit-scenes" is the embedded model.
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
        ValueError: the family is not supported, an argument is out of range, two contradict each other, or a folder is
            given with a revision.
        ImportError: `quantization` or `device_map` needs a package that is missing.
        OSError: the files are not there.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
    from transformers.utils.hub import resolve_revision

    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if quantization is not None:
        _require_quantizer(quantization)
    if device_map is not None and device is not None:
        raise ValueError(f"device_map={device_map!r} and device={str(device)!r}: state one; a map says where parts go")
    place = None if device_map is not None else _device("cpu" if device is None else device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    folder = embedded.resolve(os.fspath(name))
    if revision is not None and os.path.isdir(folder):
        raise ValueError(f"revision={revision!r}: {name} is a folder, which has none; leave it out")
    pinned = resolve_revision(folder, revision, token=token)  # config, weights and processor come from one commit
    hub = {"revision": pinned, "trust_remote_code": trust_remote_code, "token": token}
    said = PreTrainedConfig.get_config_dict(folder, **hub)[0]
    if "mm_vision_tower" in said and "text_config" not in said:  # transformers would build a 7B of random weights
        remedy = "fitprune convert-llava-hr" if said.get("is_multipath_encoder") else "transformers' conversion script"
        raise ValueError(f"{name}: is in the layout of LLaVA's authors; convert it with {remedy} (docs/llava-hr.md)")
    if said.get("model_type") == "llava_hr":
        from fitprune.models import llava_hr

        llava_hr.register()
    # Before the weights: the wrong family is found in a second.
    config = AutoConfig.from_pretrained(folder, **hub)
    adapters.model_shape(config)
    if quantization is not None:
        computed = config.dtype if options["dtype"] == "auto" else options["dtype"]
        options["quantization_config"] = quantization_config(quantization, computed or torch.float32)
    if device_map is not None:
        options["device_map"] = device_map
    elif quantization is not None or getattr(config, "quantization_config", None) is not None:
        options["device_map"] = {"": place}  # put there while it is loaded: not all that is quantized can be moved
    if "device_map" in options and importlib.util.find_spec("accelerate") is None:
        raise ImportError("device_map and quantized weights need accelerate: pip install accelerate")
    model = AutoModelForImageTextToText.from_pretrained(folder, **hub, **options).eval()
    if "device_map" not in options:
        model = model.to(place)
    # What results say of it: the embedded model's folder differs from machine to machine.
    model.name_or_path = os.fspath(name)
    model.config._commit_hash = getattr(pinned, "resolved", None)  # which transformers does not keep
    return model, AutoProcessor.from_pretrained(folder, **hub)


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
