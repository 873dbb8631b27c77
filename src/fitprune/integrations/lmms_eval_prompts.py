"""From lmms-eval's messages and generation arguments to a model's prompt, images and `generate` arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_eval.protocol import ChatMessages
from PIL import Image

from fitprune.calibration.pictures import load_picture
from fitprune.calibration.prompts import chat_prompt

MAX_NEW_TOKENS = 1024  # where a task names no limit: that of lmms-eval's own LLaVA models
_SAMPLING = ("temperature", "top_p", "top_k")
# `until` is left out, as in lmms-eval's own LLaVA models: these models end their answers themselves, and the default of
# `until`, the blank line between few-shot examples, would cut long answers. `image_aspect_ratio` is LLaVA's own code's.
_NOT_OURS = ("until", "image_aspect_ratio")


def prompt_of(messages: ChatMessages, processor: Any, template: str | None) -> tuple[str, list[Image.Image]]:
    """Put messages into the form that the model was trained on.

    Args:
        messages: of one question.
        processor: the model's.
        template: used instead of its chat template.

    Returns:
        The prompt, and its images in order.

    Raises:
        ValueError: there is video or audio, the text places another number of images than there are, or there is
            neither chat template nor `template`.
    """
    images, videos, audios = messages.extract_media()
    if videos or audios:
        raise ValueError("the question has video or audio: these models see images alone; choose an image task")
    token = processor.image_token
    parts = [part for message in messages.messages for part in message.content]
    placed = sum(part.text.count(token) for part in parts if part.type == "text")
    if placed not in (0, len(images)):
        raise ValueError(f"the text places {placed} images by {token!r}, but {len(images)} come with the question")
    if template is not None:
        text = _filled(template, token, messages, placed)
    else:
        turns = [
            {
                "role": message.role,
                # Where the text places the images itself, they are not placed again.
                "content": [_text_or_image(part) for part in message.content if part.type == "text" or not placed],
            }
            for message in messages.messages
        ]
        text = chat_prompt(processor, turns)
    return text, [load_picture(image) for image in images]


def read_template(text_or_file: str | None, image_token: str) -> str | None:
    """Read a prompt template from text or file.

    Args:
        text_or_file: with a backslash and n for a line break; None for none.
        image_token: the model's.

    Raises:
        ValueError: it lacks the place of the question or of the image.
    """
    if text_or_file is None:
        return None
    is_file = Path(text_or_file).is_file()
    text = Path(text_or_file).read_text(encoding="utf-8") if is_file else text_or_file.strip("'\"")
    text = text.rstrip("\n").replace("\\n", "\n")
    for place in ("{question}", image_token):
        if place not in text:
            raise ValueError(
                f"prompt_template={text!r}: must contain {place!r}, "
                "for example 'USER: <image>\\n{question} ASSISTANT:'"
            )
    return text


def generation_arguments(task: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a task's `generation_kwargs` into transformers' arguments. Temperature 0 means greedy."""
    kept = {name: value for name, value in task.items() if name not in _NOT_OURS and value is not None}
    sampled = bool(kept.pop("do_sample", True)) and kept.get("temperature", 0) > 0
    if not sampled:
        kept = {name: value for name, value in kept.items() if name not in _SAMPLING}
    return {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **kept, "do_sample": sampled}


def _filled(template: str, token: str, messages: ChatMessages, placed: int) -> str:
    """Fill a template with one message: an image token for each image, the texts as the question."""
    if [message.role for message in messages.messages] != ["user"]:
        raise ValueError("the question has several messages: a prompt_template holds one; leave it out")
    content = messages.messages[0].content
    count = 0 if placed else sum(part.type == "image" for part in content)
    around = template if count else template.replace(f"{token}\n", "").replace(token, "")
    around = around.replace(token, "\n".join([token] * count), 1)
    return around.replace("{question}", "\n".join(part.text for part in content if part.type == "text"))


def _text_or_image(part: Any) -> dict[str, str]:
    return {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
