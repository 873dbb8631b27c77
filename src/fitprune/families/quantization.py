"""Quantize weights while they are loaded: the names of the ways, and transformers' configuration of each."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

# Name -> the package that does it. docs/quantization.md says what was tried.
QUANTIZATIONS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}


def require_quantizer(name: str) -> None:
    """Refuse a name that is not in QUANTIZATIONS, or whose package is missing.

    Args:
        name: as the user wrote it.

    Raises:
        ValueError: there is no such name.
        ImportError: its package is missing.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r}: must be one of {', '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec(QUANTIZATIONS[name]) is None:
        raise ImportError(f"quantization {name} needs {QUANTIZATIONS[name]}: pip install {QUANTIZATIONS[name]}")


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """Give transformers' configuration for a name in QUANTIZATIONS.

    Args:
        name: one of QUANTIZATIONS.
        dtype: what the weights are expanded to where they are used.

    Raises:
        ValueError: there is no such name.
        ImportError: its package is missing.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    require_quantizer(name)
    if name == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
