"""Record with which weights and versions something was measured."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from fitprune._support.host import inner_tensors, offloaded_weight
from fitprune._version import __version__


def provenance_of(model: Any) -> dict[str, str]:
    """Give the model's name, a digest of its weights, its dtype, and the versions of the libraries."""
    import transformers

    return {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fitprune": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def weights_digest(model: Any) -> str:
    """Tell weights of one shape apart, also offloaded ones: hash each parameter's first values and sum of bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = offloaded_weight(model, name) if parameter.device.type == "meta" else parameter.detach()
        if values is not None:
            digest.update(name.encode())
            parts = [values]
            if inner := inner_tensors(values):  # torchao's weights have no views, but rows
                parts, values = inner, values[:1].dequantize()
            digest.update(values.flatten()[:8].float().cpu().numpy().tobytes())
            digest.update(json.dumps([_sum_of_bits(part) for part in parts]).encode())
    return digest.hexdigest()[:16]


def _sum_of_bits(values: torch.Tensor) -> int:
    """Sum a tensor as whole numbers, 8 bytes each: at the speed of memory, and the same in any order, on any device."""
    flat = values.flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    even = len(octets) // 8 * 8
    return int(octets[:even].view(torch.int64).sum()) + int(octets[even:].sum())
