"""Process images and prompts for LLaVA-HR as its authors do: pixels, token ids and the chat template.

Source: github.com/luogen1996/LLaVA-HR, commit 1212ffb (`process_images`, `tokenizer_image_token`, "vicuna_v1").
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fitprune.families.llava_hr.configuration import LlavaHrConfig

# Vicuna's system prompt and separators, which the released models were tuned with.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}"
    '{% set system = "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\" %}"
    "{% endif %}"
    "{% if system is string %}{{ system }}{% else %}{% for part in system %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class LlavaHrProcessor(LlavaProcessor):
    """LLaVA's processor, which tokenizes as the authors do: the text between two images apart.

    Args:
        image_processor: LLaVA's, which pads to a square.
        tokenizer: of the text model, with the token "<image>".
        patch_size: pixels of an image to a visual token, in each direction.
        vision_feature_select_strategy: "full": no token of the tower is left out.
        chat_template: Jinja.
        image_token: placeholder of an image in a prompt.
        num_additional_image_tokens: 0: the tower has no class token.
        adds_space: whether the tokenizer begins the text after a special token with a space by itself.
        **kwargs: as for LLaVA's processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        adds_space: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.adds_space = adds_space

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Process images and prompts; arguments and result as transformers' LlavaProcessor."""
        if isinstance(text, str):
            text = self._apart(text)
        elif isinstance(text, (list, tuple)):
            text = [self._apart(prompt) if isinstance(prompt, str) else prompt for prompt in text]
        return super().__call__(images=images, text=text, **kwargs)

    def _apart(self, prompt: str) -> str:
        """Begin the text after an image with a space, as the authors' tokenizer begins every text."""
        special = "|".join(map(re.escape, {self.image_token, *self.tokenizer.all_special_tokens}))
        # A tokenizer that adds a space adds none to a text that begins with one.
        where = "(?= )" if self.adds_space else rf"(?!{special}|\Z)"
        gap = " " if prompt.startswith(" ") else ""
        return gap + re.sub(re.escape(self.image_token) + where, f"{self.image_token} ", prompt)


def make_processor(config: LlavaHrConfig, tokenizer: Any, *, pad: bool = True) -> LlavaHrProcessor:
    """Make the processor: images made square, resized, normalized; Vicuna's chat template.

    Args:
        config: of the model, with size and number of visual tokens.
        tokenizer: of the text model, with the special token "<image>" under the config's `image_token_index`.
        pad: make images square by padding with the mean colour, as the released models do; else by cutting edges off.

    Raises:
        ValueError: the tokenizer's "<image>" has another id.
    """
    number = tokenizer.convert_tokens_to_ids("<image>")
    if number != config.image_token_index:
        raise ValueError(
            f"tokenizer has id {number} for '<image>', the config image_token_index={config.image_token_index}: must "
            "be the same; add '<image>' to the tokenizer as a special token"
        )
    size = config.vision_config.input_image_size
    images = LlavaImageProcessorPil(do_pad=pad, size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    after, first = (tokenizer(text, add_special_tokens=False).input_ids for text in ("<image>a", "a"))
    return LlavaHrProcessor(
        images,
        tokenizer,
        patch_size=size // config.vision_config.grid,
        chat_template=CHAT_TEMPLATE,
        adds_space=after[1:] == first,
    )
