"""How a benchmark's question becomes a model's input: as LLaVA's own evaluation does it, or as the processor does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from fitprune._support.messages import line
from fitprune.calibration.prompts import format_prompt

NAMES = ("llava", "chat")
_TYPES = ("llava", "llava_next", "llava_hr")  # of LLaVA's own line
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How questions become inputs; `protocol_for` makes one.

    Attributes:
        name: "llava" or "chat".
        template: what stands around the question and its image; None for the processor's chat template.
        background: RGB colour with which images are padded to squares; None leaves them to the processor.
    """

    name: str = "chat"
    template: str | None = None
    background: tuple[int, ...] | None = None


def protocol_for(name: str | None, processor: Any, model: Any) -> Protocol:
    """Find how a benchmark's questions are asked.

    Args:
        name: "llava": Vicuna's prompt with its system line, the text on either side of the image tokenized for itself,
            and images made square where the authors of the checkpoint did so. "chat": the processor's chat template
            and call. None: "llava" for a LLaVA, LLaVA-NeXT or LLaVA-HR on Llama with Vicuna's chat template and
            Llama's SentencePiece tokenizer, else "chat".
        processor: the model's processor.
        model: the model.

    Raises:
        ValueError: there is no such protocol, or "llava" is asked for and cannot be had.

    Source: LLaVA's conv_vicuna_v1, tokenizer_image_token and process_images.
    """
    if name not in (*NAMES, None):
        raise ValueError(f"protocol={line(repr(name))}: must be one of {', '.join(NAMES)}, or None for the model's own")
    fault = _fault(processor, model.config)
    if name == "llava" and fault:
        raise ValueError(f"protocol='llava': {fault}; use 'chat'")
    if name == "chat" or fault or (name is None and not _is_vicuna(processor, model.config)):
        return Protocol()
    template = _VICUNA.replace("<image>", processor.image_token)
    return Protocol("llava", template, _background(processor.image_processor, model.config))


def _fault(processor: Any, config: Any) -> str:
    """Say why LLaVA's protocol cannot be had; nothing if it can."""
    if config.model_type not in _TYPES:
        return f"the model is a {config.model_type}: must be one of {', '.join(_TYPES)}"
    tokenizer = processor.tokenizer
    start = tokenizer.convert_ids_to_tokens(tokenizer("\n").input_ids)[:2]
    if tokenizer.bos_token is None or start != [tokenizer.bos_token, "\u2581"]:
        return f"the tokenizer begins a text with {start}: must be BOS and '\u2581', as Llama's SentencePiece begins it"
    return ""


def _is_vicuna(processor: Any, config: Any) -> bool:
    """Whether the text model is a Llama whose chat template is Vicuna's."""
    if config.get_text_config().model_type != "llama":
        return False
    try:
        prompt = format_prompt(processor, "what?")
    except ValueError:
        return False
    return "USER:" in prompt and prompt.rstrip().endswith("ASSISTANT:")


def _background(images: Any, config: Any) -> tuple[int, ...] | None:
    """Find the colour with which images have to be padded before the processor's call.

    LLaVA-NeXT cuts an image into tiles, and LLaVA-HR's processor pads by itself where its checkpoint says so.
    """
    mean = getattr(images, "image_mean", None)
    pads = config.model_type == "llava" and getattr(config, "image_aspect_ratio", "pad") == "pad"
    if not pads or mean is None or getattr(images, "do_pad", False):
        return None
    return tuple(int(share * 255) for share in mean)


def square(image: Image.Image, background: tuple[int, ...] | None) -> Image.Image:
    """Pad an image to a square, itself in the middle; the odd pixel goes to the right or the bottom.

    Args:
        image: any size.
        background: RGB colour; None returns the image as it is.
    """
    if background is None or image.width == image.height:
        return image
    side = max(image.size)
    padded = Image.new(image.mode, (side, side), background)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def by_parts(inputs: Mapping[str, Any], prompts: Sequence[str], processor: Any) -> dict[str, Any]:
    """Tokenize the text on either side of an image for itself, so that it begins with a blank piece as every text does.

    Args:
        inputs: a batch as the processor makes it, which has the number of each image's tokens.
        prompts: of the batch, each with one image or none.
        processor: the model's processor.

    Returns:
        The batch with other ids and mask, padded on the left.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer, token = processor.tokenizer, processor.image_token
    image_id = tokenizer.convert_tokens_to_ids(token)
    rows = []
    for prompt, count in zip(prompts, (inputs["input_ids"] == image_id).sum(1).tolist(), strict=True):
        first, *rest = (tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split(token))
        after = [number for part in rest for number in [image_id] * count + part]
        rows.append(torch.tensor([tokenizer.bos_token_id, *first, *after]))
    changed = {"input_ids": (rows, tokenizer.pad_token_id or 0), "attention_mask": ([*map(torch.ones_like, rows)], 0)}
    others = {name: value for name, value in inputs.items() if name != "token_type_ids"}  # which these models refuse
    return others | {
        name: pad_sequence(values, batch_first=True, padding_value=fill, padding_side="left")
        for name, (values, fill) in changed.items()
    }
