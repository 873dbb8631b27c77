"""From samples to the batches that models take: prompts, padding, and what a processor refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from PIL import Image

from fitprune._support.processes import Processes
from fitprune.calibration.samples import BadSample, Sample, require_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REMEDY = "state prompt_template (--prompt-template), such as 'USER: <image>\\n{question} ASSISTANT:'"
_AS_IT_IS = "{{ messages[0]['prompt'] }}"  # the chat template of a prompt that is written already
_PROBE = "question 7319?"  # no template has it in a text of its own
_PRINTED = re.compile(r"\{['\"]type['\"]: ['\"](text|image)")  # a message's content, as Python or JSON prints it


def chat_prompt(processor: Any, conversation: Sequence[Mapping[str, Any]]) -> str:
    """Write a conversation as the chat template of the processor, or else of its tokenizer, does.

    Args:
        processor: the model's processor.
        conversation: messages, each with a `role` and a list as its `content`.

    Raises:
        ValueError: there is no chat template, or it fails, prints the content as a list, or leaves out the last
            message's text.
    """
    template = getattr(processor, "chat_template", None)
    template = template or getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f"the chat templates are {', '.join(template)}: one must be called 'default'; {_REMEDY}")
        template = template["default"]
    if not template:
        raise ValueError(f"the processor has no chat template; {_REMEDY}")

    def written(messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            prompt: str = processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        except ImportError:
            raise
        except Exception as error:  # Jinja's errors, and whatever a template meets
            raise ValueError(f"the chat template fails ({_short(error)})") from error
        return prompt

    prompt = written(conversation)
    texts = [part.get("text", "") for message in conversation for part in message["content"]]
    if _PRINTED.search(prompt) and not any(_PRINTED.search(text) for text in texts):
        raise ValueError(f"the chat template is at fault: it prints a message's content as a list; {_REMEDY}")
    *before, last = conversation
    asked = [part["text"].strip() for part in last["content"] if "text" in part]
    if any(asked) and not any(text and text in prompt for text in asked):
        # Changed on the way, such as to upper case, or left out? Then another text makes no difference.
        other = [{**part, "text": "x" + part["text"]} if "text" in part else part for part in last["content"]]
        if written([*before, {**last, "content": other}]) == prompt:
            raise ValueError(f"the chat template is at fault: it does not write the question; {_REMEDY}")
    return prompt


def format_prompt(processor: Any, text: str, prompt_template: str | None = None) -> str:
    """Put a question with one image into the form that the model was trained on.

    Args:
        processor: the model's processor.
        text: the question.
        prompt_template: used instead of the chat template: text with `{question}` and the image token.

    Raises:
        ValueError: the question contains the image token or one that begins or ends text, the template is no text,
            lacks `{question}` or the image token, or as `chat_prompt`.
    """
    token, tokens = getattr(processor, "image_token", None), getattr(processor, "tokenizer", None)
    if token and token in text:
        raise ValueError(
            f"question {text[:80]!r} contains the image token {token!r}: the image is put in for you; remove it"
        )
    for name in ("bos_token", "eos_token"):
        mark = getattr(tokens, name, None)
        if mark and mark.strip() and mark in text:
            raise ValueError(f"question {text[:80]!r} contains {mark!r}, the tokenizer's {name}: remove it")
    if not isinstance(prompt_template, (str, NoneType)):
        raise ValueError(f"prompt_template={prompt_template!r}: must be text with {{question}} and the image token")
    if prompt_template is None:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return chat_prompt(processor, [{"role": "user", "content": content}])
    if "{question}" not in prompt_template:
        raise ValueError(
            f"prompt_template={prompt_template!r}: must contain {{question}}, "
            "for example 'USER: <image>\\n{question} ASSISTANT:'"
        )
    if token and prompt_template.count(token) != 1:
        fault = "more than one" if token in prompt_template else "no"
        raise ValueError(
            f"prompt_template={prompt_template!r}: {fault} visual token in it; put {token!r} where the image is"
        )
    return prompt_template.replace("{question}", text)


def encode(
    processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], names: Sequence[str]
) -> Mapping[str, Any]:
    """Make a batch of prompts and images by the processor's own call, padded on the left.

    What the tokenizer or processor adds is not added where a prompt has it already: the processor's call sees to its
    start, and a BOS or EOS that would still stand twice in a row is taken out of the prompt here.

    Args:
        processor: the model's processor.
        prompts: texts, as `chat_prompt` and `format_prompt` write them.
        images: of each prompt, in order; an empty list for text alone.
        names: of the prompts, for messages.

    Returns:
        `input_ids`, `attention_mask`, `pixel_values`, ... as the model takes them.

    Raises:
        BadSample: a prompt has another number of image tokens than of images, or the processor refuses it also alone.
        ValueError: no prompt has the image's token, so that the chat template is at fault.
    """
    token = getattr(processor, "image_token", None)
    if token and any(images) and not any(token in prompt for prompt in prompts):
        raise ValueError(f"the chat template is at fault: it writes no {token!r} where the image is; {_REMEDY}")
    for name, prompt, own in zip(names, prompts, images, strict=True):
        if token and prompt.count(token) != len(own):
            raise BadSample(f"{name}: its prompt has {prompt.count(token)} {token!r} for {len(own)} images")
    try:
        return _encode(processor, prompts, images)
    except (ImportError, MemoryError):
        raise
    except Exception:  # whatever a processor raises: which of them is it?
        for name, prompt, own in zip(names, prompts, images, strict=True):
            try:
                _encode(processor, [prompt], [own])
            except Exception as refusal:
                raise BadSample(f"{name}: {_short(refusal)}") from refusal
        raise


def _encode(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
    tokens = processor.tokenizer
    if len({bool(tokens.bos_token) and prompt.startswith(tokens.bos_token) for prompt in prompts}) > 1:
        raise ValueError(f"some prompts of a batch begin with {tokens.bos_token!r} and some do not: use batches of 1")
    inputs = _own_call(processor, prompts, images)
    for token in filter(None, (tokens.bos_token, tokens.eos_token)):
        twice = _stands_twice(inputs, tokens.convert_tokens_to_ids(token))
        once = [
            "".join(prompt.rsplit(token, 1)) if two and token * 2 not in prompt else prompt
            for two, prompt in zip(twice, prompts, strict=True)
        ]
        if once != list(prompts):
            prompts = once
            inputs = _own_call(processor, prompts, images)
    return inputs


def _own_call(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image} for image in own], "prompt": prompt}]
        for prompt, own in zip(prompts, images, strict=True)
    ]
    inputs: Mapping[str, Any] = processor.apply_chat_template(
        conversations,
        chat_template=_AS_IT_IS,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # On the left, whatever the tokenizer's own: a dense model cannot generate after right padding.
        processor_kwargs={"padding": len(prompts) > 1, "padding_side": "left"},
    )
    return inputs


def _stands_twice(inputs: Mapping[str, Any], token_id: int) -> list[bool]:
    """For each row, whether the token stands twice in a row."""
    there = inputs["input_ids"] == token_id
    if "attention_mask" in inputs:  # padding may be the same token
        there &= inputs["attention_mask"].bool()
    rows: list[bool] = (there[:, 1:] & there[:, :-1]).any(1).tolist()
    return rows


def make_batches(
    samples: Iterable[Sample],
    processor: Any,
    *,
    batch_size: int = 1,
    prompt_template: str | None = None,
    processes: Processes | None = None,
    model: Any = None,
    skip_bad: bool = False,
) -> Iterator[Mapping[str, Any]]:
    """Turn samples into the processor's batches, padded on the left, in order.

    Args:
        samples: what to load.
        processor: the model's processor.
        batch_size: samples in a batch.
        prompt_template: see `format_prompt`.
        processes: those that share the batches, as in `fitprune.measure`. A batch of another process is not made: it
            comes as an empty mapping, so that batches keep their numbers.
        model: refuse samples with more tokens than it has positions; None knows no limit.
        skip_bad: leave out what cannot be used, as `usable` does before the first batch, instead of raising.

    Yields:
        `input_ids`, `attention_mask`, `pixel_values`, ... as the model takes them.

    Raises:
        ValueError: `batch_size` below 1, an argument of another type, or a template that forms no prompt.
        BadSample: an image that cannot be read, or a sample that the processor refuses; not with `skip_bad`.
    """
    require_whole("batch_size", batch_size, 1)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise ValueError(f"processor is a {type(processor).__name__}: must be a model's, as load_model gives it")
    if not isinstance(samples, Iterable):
        raise ValueError(f"samples is a {type(samples).__name__}: must be a list of Samples, as load_samples gives it")
    if isinstance(samples, Sequence):
        samples = list(_checked(samples))
    format_prompt(processor, _PROBE, prompt_template)  # a template's own fault is found before the first sample
    if skip_bad:
        samples = usable(samples, processor, prompt_template=prompt_template, model=model)
    return (
        _batch(chunk, processor, prompt_template, model) if processes is None or processes.has(number) else {}
        for number, chunk in enumerate(_chunks(_checked(samples), batch_size))
    )


def usable(
    samples: Iterable[Sample], processor: Any, *, prompt_template: str | None = None, model: Any = None
) -> list[Sample]:
    """Leave out what the processor refuses, with a warning for each and a count: `--skip-bad` after the model is known.

    Each sample is processed once, before there are batches: so batches are the same in every process and every run.

    Args:
        samples: what was loaded.
        processor, prompt_template, model: as in `make_batches`.

    Raises:
        ValueError: no sample is left, or as `make_batches`.
    """
    samples = list(samples)
    batches = (make_batches([sample], processor, prompt_template=prompt_template, model=model) for sample in samples)
    good = []
    for sample, batch in zip(samples, batches, strict=True):
        try:
            next(batch)
            good.append(sample)
        except BadSample as error:
            logger.warning("skipped: %s", error)
    if not good:
        raise ValueError(f"none of {len(samples)} samples is usable: the processor refuses them all")
    if len(good) < len(samples):
        logger.warning("%d of %d samples skipped", len(samples) - len(good), len(samples))
    return good


def _batch(chunk: Sequence[Sample], processor: Any, prompt_template: str | None, model: Any) -> Mapping[str, Any]:
    prompts, names = [], []
    for sample in chunk:
        place = sample.where or f"sample {sample.id!r}"
        try:
            prompts.append(format_prompt(processor, sample.text, prompt_template))
        except ValueError as error:
            raise BadSample(f"{place}: {error}") from error
        names.append(f"{place}: {sample.image.name}" if isinstance(sample.image, Path) else place)
    # Nested, since some ask whose each image is.
    inputs = encode(processor, prompts, [[sample.load_image()] for sample in chunk], names)
    if model is not None:
        _require_positions(inputs, names, model.config)
    return inputs


def _require_positions(inputs: Mapping[str, Any], names: Sequence[str], config: Any) -> None:
    """Refuse a sample with more tokens than the model has positions."""
    text = config.get_text_config()
    if (most := getattr(text, "max_position_embeddings", None)) is None:
        return
    places = inputs["attention_mask"].bool() if "attention_mask" in inputs else inputs["input_ids"] >= 0
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):  # an image takes few of its positions
        places = places & (inputs["input_ids"] != config.image_token_id)
    for name, count in zip(names, places.sum(1).tolist(), strict=True):
        if count > most:
            raise BadSample(f"{name}: a prompt of {count} tokens, and the model has {most} positions; shorten it")


def _short(error: Exception) -> str:
    """An error's message in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _checked(samples: Iterable[Sample]) -> Iterator[Sample]:
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise ValueError(
                f"samples[{number}] is a {type(sample).__name__}: must be a Sample, as fitprune.load_samples gives it"
            )
        yield sample


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
