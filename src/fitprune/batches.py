"""From samples to the batches that models take: prompts, padding, groups of equal shape. Knows processors, no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fitprune.calibration import Sample

T = TypeVar("T")


def format_prompt(processor: Any, text: str, prompt_template: str | None = None) -> str:
    """Put a question with one image into the form that the model was trained on.

    Args:
        processor: the model's processor.
        text: the question.
        prompt_template: used instead of the processor's chat template: text with `{question}` and the image token.

    Raises:
        ValueError: the template lacks `{question}` or the image token, or there is no template at all.
    """
    token = getattr(processor, "image_token", None)
    if token and token in text:
        raise ValueError(
            f"question {text!r} contains the image token {token!r}: the image is put in for you; remove it"
        )
    if prompt_template is not None:
        if "{question}" not in prompt_template:
            raise ValueError(
                f"prompt_template={prompt_template!r}: must contain {{question}}, "
                "for example 'USER: <image>\\n{question} ASSISTANT:'"
            )
        if token and token not in prompt_template:
            raise ValueError(
                f"prompt_template={prompt_template!r}: no visual token in it; put {token!r} where the image is"
            )
        return prompt_template.replace("{question}", text)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "the processor has no chat template; state one: --prompt-template 'USER: <image>\\n{question} ASSISTANT:'"
        )
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def make_batches(
    samples: Iterable[Sample],
    processor: Any,
    *,
    batch_size: int = 1,
    prompt_template: str | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Turn samples into the processor's batches, padded, in order.

    Args:
        samples: what to load.
        processor: the model's processor.
        batch_size: samples in a batch.
        prompt_template: see `format_prompt`.

    Yields:
        `input_ids`, `attention_mask`, `pixel_values`, ... as the model takes them.

    Raises:
        ValueError: `batch_size` below 1, a bad image (BadSample), or a prompt that cannot be formed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    return (
        processor(
            images=[sample.load_image() for sample in chunk],
            text=[format_prompt(processor, sample.text, prompt_template) for sample in chunk],
            padding=len(chunk) > 1,
            return_tensors="pt",
        )
        for chunk in _chunks(samples, batch_size)
    )


def equal_batches(
    samples: Sequence[Sample],
    processor: Any,
    *,
    batch_size: int = 1,
    prompt_template: str | None = None,
) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """Batch samples whose inputs have the same shape, so that nothing is padded and every row equals its sample alone.

    Samples are prepared in windows of 32 batches and grouped within each, so memory stays bounded.

    Yields:
        Indices into `samples`, and their batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    for start in range(0, len(samples), 32 * batch_size):
        window = samples[start : start + 32 * batch_size]
        groups: dict[tuple[Any, ...], list[tuple[int, Mapping[str, Any]]]] = {}
        for offset, single in enumerate(make_batches(window, processor, prompt_template=prompt_template)):
            visual = int((single["input_ids"] == getattr(processor, "image_token_id", None)).sum())
            shape = (visual, *((name, tuple(value.shape)) for name, value in single.items()))
            groups.setdefault(shape, []).append((start + offset, single))
        for group in groups.values():
            for chunk in _chunks(group, batch_size):
                yield [i for i, _ in chunk], {name: torch.cat([one[name] for _, one in chunk]) for name in chunk[0][1]}


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
