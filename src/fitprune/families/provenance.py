"""What was measured with which weights and versions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from fitprune._version import __version__


def provenance_of(model: Any) -> dict[str, str]:
    """Say what was measured with which versions."""
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
    """Tell weights of one shape apart, also on disk: a hash of each parameter's first values and sum of bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = _offloaded(model, name) if parameter.device.type == "meta" else parameter.detach()
        if values is not None:
            digest.update(name.encode())
            parts = [values]
            if inner := getattr(type(values), "tensor_data_names", ()):  # torchao's have no views, but rows
                parts = [getattr(values, part) for part in inner]
                values = values[:1].dequantize()
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


def _offloaded(model: Any, name: str) -> torch.Tensor | None:
    """Give a weight that accelerate keeps elsewhere until its layer's turn; None if it keeps none of this name."""
    module, _, own = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
    return None if kept is None else kept.get(own)
