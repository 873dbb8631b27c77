"""Write prompts as the model was trained on them, and encode them, with their images, by the processor's own call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from PIL import Image

from fitprune._support.messages import line
from fitprune.calibration.entry import BadSample

_REMEDY = "pass prompt_template (--prompt-template), such as 'USER: <image>\\n{question} ASSISTANT:'"
_AS_IT_IS = "{{ messages[0]['prompt'] }}"  # a chat template that leaves the prompt as it is
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

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            prompt: str = processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        except ImportError:
            raise
        except Exception as error:  # Jinja's errors, and whatever a template meets
            raise ValueError(f"the chat template fails ({line(error, 300)})") from error
        return prompt

    prompt = render(conversation)
    texts = [part.get("text", "") for message in conversation for part in message["content"]]
    if _PRINTED.search(prompt) and not any(_PRINTED.search(text) for text in texts):
        raise ValueError(f"the chat template is at fault: it prints a message's content as a list; {_REMEDY}")
    *before, last = conversation
    own = [part["text"].strip() for part in last["content"] if "text" in part]
    if any(own) and not any(text and text in prompt for text in own):
        # A template may change the text, such as to upper case; if it leaves it out, another text changes nothing.
        other = [{**part, "text": "x" + part["text"]} if "text" in part else part for part in last["content"]]
        if render([*before, {**last, "content": other}]) == prompt:
            raise ValueError(f"the chat template is at fault: it does not write the question; {_REMEDY}")
    return prompt


def format_prompt(processor: Any, text: str, prompt_template: str | None = None, *, has_image: bool = True) -> str:
    """Write a question about one image, or about none, in the form that the model was trained on.

    Args:
        processor: the model's processor.
        text: the question.
        prompt_template: replaces the chat template: text with `{question}` and the image token. A question without an
            image takes it without that token and one line break after it.
        has_image: whether the question has an image.

    Raises:
        ValueError: the question contains the image token or one that begins or ends text, the template is no text,
            lacks `{question}` or the image token, or as `chat_prompt`.
    """
    token, tokens = getattr(processor, "image_token", None), getattr(processor, "tokenizer", None)
    if token and token in text:
        raise ValueError(
            f"question {text[:80]!r} contains the image token {token!r}, which is added for you: remove it"
        )
    for name in ("bos_token", "eos_token"):
        mark = getattr(tokens, name, None)
        if mark and mark.strip() and mark in text:
            raise ValueError(f"question {text[:80]!r} contains {mark!r}, the tokenizer's {name}: remove it")
    if not isinstance(prompt_template, (str, NoneType)):
        raise ValueError(f"prompt_template={prompt_template!r}: must be text with {{question}} and the image token")
    if prompt_template is None:
        content = [*([{"type": "image"}] if has_image else []), {"type": "text", "text": text}]
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
    if token and not has_image:
        prompt_template = re.sub(re.escape(token) + "\n?", "", prompt_template)
    return prompt_template.replace("{question}", text)


def encode(
    processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], names: Sequence[str]
) -> Mapping[str, Any]:
    """Make a batch of prompts and images by the processor's own call, padded on the left.

    A BOS or EOS that the prompt has already is not added again: the processor's call takes care of the prompt's start,
    and one that would still be repeated is taken out of the prompt here.

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
    except Exception:  # a processor may raise anything; find the prompt that it refuses
        for name, prompt, own in zip(names, prompts, images, strict=True):
            try:
                _encode(processor, [prompt], [own])
            except Exception as refusal:
                raise BadSample(f"{name}: {line(refusal, 300)}") from refusal
        raise


def _encode(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
    tokens = processor.tokenizer
    if len({bool(tokens.bos_token) and prompt.startswith(tokens.bos_token) for prompt in prompts}) > 1:
        raise ValueError(f"some prompts of a batch begin with {tokens.bos_token!r} and some do not: use batches of 1")
    inputs = _own_call(processor, prompts, images)
    for token in filter(None, (tokens.bos_token, tokens.eos_token)):
        repeated = _is_repeated(inputs, tokens.convert_tokens_to_ids(token))
        once = [
            "".join(prompt.rsplit(token, 1)) if again and token * 2 not in prompt else prompt
            for again, prompt in zip(repeated, prompts, strict=True)
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


def _is_repeated(inputs: Mapping[str, Any], token_id: int) -> list[bool]:
    """Whether the token follows itself, for each row."""
    places = inputs["input_ids"] == token_id
    if "attention_mask" in inputs:  # padding may be the same token
        places &= inputs["attention_mask"].bool()
    rows: list[bool] = (places[:, 1:] & places[:, :-1]).any(1).tolist()
    return rows
