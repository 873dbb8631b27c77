"""Turn samples into the batches that models take, and leave out what a processor refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from fitprune._support.messages import line
from fitprune._support.processes import Processes
from fitprune.calibration.entry import BadSample
from fitprune.calibration.prompts import encode, format_prompt
from fitprune.calibration.protocol import Protocol, by_parts, square
from fitprune.calibration.samples import Sample, require_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROBE = "question 7319?"  # a question that no template contains


def make_batches(
    samples: Iterable[Sample],
    processor: Any,
    *,
    batch_size: int = 1,
    prompt_template: str | None = None,
    processes: Processes | None = None,
    model: Any = None,
    skip_bad: bool = False,
    protocol: Protocol | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Turn samples into the processor's batches, padded on the left, in order.

    Args:
        samples: what to load.
        processor: the model's processor.
        batch_size: samples in a batch.
        prompt_template: see `format_prompt`.
        processes: those that share the batches, as in `fitprune.measure`. A batch of another process is an empty
            mapping, so that batches keep their numbers.
        model: refuse samples with more tokens than it has positions; None knows no limit.
        skip_bad: leave out what cannot be used, as `usable` does before the first batch, instead of raising.
        protocol: how questions become inputs, as `fitprune.calibration.protocol.protocol_for` finds it; None for the
            processor's chat template or `prompt_template`.

    Yields:
        `input_ids`, `attention_mask`, `pixel_values`, ... as the model takes them.

    Raises:
        ValueError: `batch_size` below 1, an argument of another type, a template that forms no prompt or is given
            beside a protocol with one, or a batch of which some questions have an image and some do not.
        BadSample: an image that cannot be read, or a sample that the processor refuses; not with `skip_bad`.
    """
    require_whole("batch_size", batch_size, 1)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise ValueError(f"processor is a {type(processor).__name__}: must be a model's, as load_model returns it")
    if not isinstance(samples, Iterable):
        raise ValueError(
            f"samples is a {type(samples).__name__}: must be a list of Samples, as load_samples returns it"
        )
    if isinstance(samples, Sequence):
        samples = list(_checked(samples))
    protocol = _protocol(protocol, prompt_template)
    format_prompt(processor, _PROBE, protocol.template)  # a template's own fault is found before the first sample
    if skip_bad:
        samples = usable(samples, processor, model=model, protocol=protocol)
    return (
        _batch(chunk, processor, protocol, model) if processes is None or processes.has(number) else {}
        for number, chunk in enumerate(_chunks(_checked(samples), batch_size))
    )


def usable(
    samples: Iterable[Sample],
    processor: Any,
    *,
    prompt_template: str | None = None,
    model: Any = None,
    protocol: Protocol | None = None,
) -> list[Sample]:
    """Leave out the samples that the processor refuses, with a warning for each and a count (`--skip-bad`).

    Each sample is processed once before batches are made, so that batches are the same in every process and every run.

    Args:
        samples: what was loaded.
        processor: the model's processor.
        prompt_template: as in `make_batches`.
        model: as in `make_batches`.
        protocol: as in `make_batches`.

    Raises:
        ValueError: no sample is left, or as `make_batches`.
    """
    samples = list(samples)
    options: dict[str, Any] = {"prompt_template": prompt_template, "model": model, "protocol": protocol}
    batches = (make_batches([sample], processor, **options) for sample in samples)
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


def _protocol(protocol: Any, prompt_template: str | None) -> Protocol:
    """Make one of the two arguments; a template takes the place of the chat template alone."""
    if not isinstance(protocol, (Protocol, NoneType)):
        raise ValueError(f"protocol={line(repr(protocol))}: must be a Protocol, as protocol_for returns it, or None")
    if prompt_template is None:
        return protocol or Protocol()
    if protocol is not None and protocol.template is not None:
        raise ValueError(
            f"prompt_template={line(repr(prompt_template))}: protocol={protocol.name!r} has its own; leave one out"
        )
    return Protocol("chat", prompt_template)


def _batch(chunk: Sequence[Sample], processor: Any, protocol: Protocol, model: Any) -> Mapping[str, Any]:
    if len({sample.image is None for sample in chunk}) > 1:
        raise ValueError(
            f"samples {chunk[0].id!r} to {chunk[-1].id!r} are one batch, and some of them have no image: must all have "
            "one or none; make batches of each kind"
        )
    prompts, names = [], []
    for sample in chunk:
        place = sample.where or f"sample {sample.id!r}"
        try:
            has_image = sample.image is not None
            prompts.append(format_prompt(processor, sample.text, protocol.template, has_image=has_image))
        except ValueError as error:
            raise BadSample(f"{place}: {error}") from error
        names.append(f"{place}: {sample.image.name}" if isinstance(sample.image, Path) else place)
    # Nested, since some ask whose each image is.
    as_shown = protocol.name != "llava"
    images = [
        [] if sample.image is None else [square(sample.load_image(as_shown=as_shown), protocol.background)]
        for sample in chunk
    ]
    inputs = encode(processor, prompts, images, names)
    if protocol.name == "llava":
        inputs = by_parts(inputs, prompts, processor)
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


def _checked(samples: Iterable[Sample]) -> Iterator[Sample]:
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise ValueError(
                f"samples[{number}] is a {type(sample).__name__}: must be a Sample, as fitprune.load_samples returns it"
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
