"""From samples to the batches that models take: prompts and padding. Knows processors, no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from fitprune.calibration import Sample
from fitprune.processes import Processes

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
    processes: Processes | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Turn samples into the processor's batches, padded on the left, in order.

    Args:
        samples: what to load.
        processor: the model's processor.
        batch_size: samples in a batch.
        prompt_template: see `format_prompt`.
        processes: those that share the batches, as in `fitprune.measure`. A batch of another process is not made: it
            comes as an empty mapping, so that batches keep their numbers.

    Yields:
        `input_ids`, `attention_mask`, `pixel_values`, ... as the model takes them.

    Raises:
        ValueError: `batch_size` below 1, a bad image (BadSample), or a prompt that cannot be formed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    return (
        processor(
            images=[[sample.load_image()] for sample in chunk],  # nested, since some ask whose each is
            text=[format_prompt(processor, sample.text, prompt_template) for sample in chunk],
            padding=len(chunk) > 1,
            padding_side="left",  # whatever the tokenizer's own: a dense model cannot generate behind right padding
            return_tensors="pt",
        )
        if processes is None or processes.has(number)
        else {}
        for number, chunk in enumerate(_chunks(samples, batch_size))
    )


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
