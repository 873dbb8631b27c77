"""Load the processor of a model, and say what it lacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from fitprune.families.checkpoint import first_sentence, require_whole_files


def load_processor(name: str, folder: str, source: Mapping[str, Any], model_type: str) -> Any:
    """Load a processor; one without a padding token pads with its end of text.

    Args:
        name: as the user wrote it, for messages.
        folder: folder or hub name.
        source: transformers' keywords `revision`, `trust_remote_code` and `token`.
        model_type: what it is the processor of, for messages.

    Raises:
        ImportError: it needs a package that is missing.
        OSError: a file of it is missing.
    """
    from transformers import AutoProcessor

    remedy = "copy the processor's files from the model that this one was tuned from"
    try:
        processor = AutoProcessor.from_pretrained(folder, **source)
    except Exception as error:  # whatever the parts of a processor raise
        reason = first_sentence(error)
        # transformers may search without end for a class that only torchvision brings.
        without = "torchvision" in str(error).lower() or isinstance(error, RecursionError)
        if without and importlib.util.find_spec("torchvision") is None:
            raise ImportError(
                f"{name}: the processor of {model_type} needs torchvision, in a build for torch {torch.__version__}: "
                "pip install torchvision (fitprune's extra 'torchvision')"
            ) from error
        if isinstance(error, ImportError):
            raise ImportError(f"{name}: its processor needs a package that is missing ({reason})") from error
        require_whole_files(name, folder, error)
        raise OSError(f"{name}: its processor cannot be loaded ({reason}); {remedy}") from error
    for part, file in (("image_processor", "preprocessor_config.json"), ("tokenizer", "tokenizer.json")):
        if getattr(processor, part, None) is None:
            raise FileNotFoundError(f"{name}: its processor has no {part} ({file}); {remedy}")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor
