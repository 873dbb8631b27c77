"""The beginning of a prefill: find its images, its question and its prompt, before the first layer runs.

Shapes: B batch, P columns of the past, Q columns of this call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fitprune._support import host
from fitprune.engine import arguments
from fitprune.engine.arguments import Call
from fitprune.engine.cache import adopt
from fitprune.engine.calls import Calls
from fitprune.engine.layer_inputs import LayerInputs
from fitprune.engine.running import Choose, RunningPrefill
from fitprune.families.adapter import AdaptedModel
from fitprune.families.clip_tower import Tower
from fitprune.families.images import PIXELS, Images, given_images, read_images
from fitprune.scoring.received import text_after
from fitprune.scoring.view import Prompt, Quotas


@dataclasses.dataclass(frozen=True)
class Removal:
    """What removes tokens from a model's prefills.

    Attributes:
        adapted: the model.
        choose: says, of a view, which rows stay.
        quotas: makes, from a prefill's images [B, Q], what views have as `quotas`; None for views without.
        needs_question: whether `choose` reads cross attention, so that a prompt without a question is refused.
        tower: watches the vision tower, whose [CLS] attention `choose` reads; None if it does not.
    """

    adapted: AdaptedModel
    choose: Choose
    quotas: Callable[[torch.Tensor], Quotas] | None
    needs_question: bool
    tower: Tower | None

    def cls_attention(self, images: Images) -> torch.Tensor:
        """The [CLS] attention of a call's visual tokens, [B, Q]; see `fitprune.families.clip_tower`."""
        assert self.tower is not None  # a Scorer that reads it without declaring it is refused
        return self.tower.deal(images.features, images.visual)


def begin_prefill(removal: Removal, call: Call, calls: Calls) -> tuple[RunningPrefill, dict[str, Any]]:
    """Begin a call with images.

    Args:
        removal: what removes its tokens.
        call: its arguments.
        calls: the model's calls so far.

    Returns:
        The running prefill, and the arguments of the call that change.

    Raises:
        ValueError: the call cannot be pruned exactly.
    """
    adapted = removal.adapted
    arguments.require_uncompiled_call()
    _require_layers_run_once(adapted)
    images = read_images(adapted, call.arguments, call.cache)
    visual, image, present = images.visual, images.image, call.own_valid
    column = torch.arange(call.length, device=visual.device).expand_as(visual)
    prompt_length, kept = _prompt_length(adapted, call, calls), column
    if present is not None:
        visual, image, kept = visual & present, image.masked_fill(~present, -1), kept.masked_fill(~present, -1)
    after_images = text_after(visual, present)
    arguments.require_rows(
        visual, after_images, "has no text after its last visual token; put the question after the images"
    )
    predicted = arguments.predicted_rows(call.arguments, visual)
    in_prompt = (column < prompt_length) & (column < arguments.first_answer(call.arguments, visual, predicted))
    question = after_images & in_prompt if removal.needs_question else torch.zeros_like(after_images)
    if removal.needs_question:
        arguments.require_rows(
            visual,
            question,
            "has no question: no text between its last visual token and the first requested logit or label; request "
            "fewer logits or labels, or prune with scorer='self', which needs no question",
        )
    if call.cache is not None:
        adopt(call.cache, adapted)  # before masks are made: the model reads their sizes from the cache
    prompt = Prompt(
        ids=call.arguments.get("input_ids"),
        valid=in_prompt if present is None else in_prompt & present,
        vision=lambda: removal.cls_attention(images),
        images=image,
        norm=adapted.norm,
        quotas=None if removal.quotas is None else removal.quotas(image),
    )
    running = RunningPrefill(LayerInputs(adapted, call), removal.choose, prompt, kept, image, question)
    return running, images.changed


def _require_layers_run_once(adapted: AdaptedModel) -> None:
    if adapted.model.training and getattr(adapted.decoder, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing runs layers again in the backward pass, when their tokens are gone: "
            "disable it, or call model.eval()"
        )


def _prompt_length(adapted: AdaptedModel, call: Call, calls: Calls) -> int:
    """Length of the prompt, also where the call repeats the last one with one more token.

    generate(use_cache=False) passes prompt and answer so far at every step, and the answer must not become question.
    Its steps are known by their images, which it encodes once; where it does not (some models in transformers 5.19),
    each step has the same pixels.
    """
    values = call.arguments
    encoded = values.get(host.ENCODED) or not host.generate_encodes(adapted.model, PIXELS)
    images, ids = given_images(values) if encoded else None, values.get("input_ids")
    cached = call.cache is not None or values.get("use_cache") is not False
    return call.length if cached or ids is None or images is None else calls.prompt_length(images, ids)
