"""How far a pruned model's answers are from the dense model's: the measure that `search` minimises.

The dense model answers every calibration prompt once, greedily. Its answer is then put after the prompt, so that one
forward gives the distribution of each of its tokens, dense or pruned. Layers before a recipe's first removal compute
what the dense model's compute: they run once for all recipes.

Shapes: B samples of a batch, T tokens of its longest answer, V vocabulary, Q columns, H query heads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fitprune.costs import flops
from fitprune.engine.attention_tap import tap_attention
from fitprune.engine.prune import prune
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.images import read_images, visual_mask
from fitprune.families.inputs import to_model
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.by_head import HEAD_KINDS, head_attention
from fitprune.scoring.received import Attention, text_after
from fitprune.scoring.scorers import get_scorer


def kl(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Compute the divergence KL(dense, pruned) of log-probabilities [..., V], in nats: [...]."""
    share = dense.exp()
    # Where the dense probability is 0 the term is 0, whatever the pruned one is.
    return torch.where(share > 0, share * (dense - pruned), 0).sum(-1)


@dataclasses.dataclass(frozen=True)
class Reference:
    """One batch with the dense model's answers.

    Attributes:
        inputs: the call: prompts, after them all answer tokens but the last; images encoded.
        log_probs: [B, T, V] fp32, the dense model's.
        valid: [B, T] bool, False after an answer's end.
        answers: [B, T] int64.
        prompt: columns of the prompt.
        visual_tokens: mean of the batch's samples.
        text_tokens: the same, with the answer.
    """

    inputs: dict[str, Any]
    log_probs: torch.Tensor
    valid: torch.Tensor
    answers: torch.Tensor
    prompt: int
    visual_tokens: int
    text_tokens: int

    def __len__(self) -> int:
        return len(self.answers)

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Compute each sample's mean divergence KL(dense, pruned) over its answer's tokens, in nats: [B]."""
        terms = kl(self.log_probs, logits[:, -self.log_probs.shape[1] :].float().log_softmax(-1))
        return (terms * self.valid).sum(1) / self.valid.sum(1)


@torch.inference_mode()
def reference(model: Any, batch: Mapping[str, Any], *, max_new_tokens: int) -> Reference:
    """Let the dense model answer a batch of prompts.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        batch: as the processor makes it; rows padded on the left, if at all.
        max_new_tokens: longest answer.

    Raises:
        ValueError: a row is padded on the right, a prompt has no image or no text after its last one, or logits are
            NaN.
    """
    adapted = adapt(model)
    model = adapted.model
    inputs = to_model(batch, model)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError("a prompt is padded on the right: pad on the left, so that its answer can follow it")
    visual = visual_mask(adapted, ids)
    if not bool(visual.any(1).all()):
        number = int(visual.any(1).int().argmin())
        raise ValueError(f"sample {number} of the batch has no visual token: each calibration prompt needs an image")
    if not bool((questions := text_after(visual, mask.bool()).any(1)).all()):
        number = int(questions.int().argmin())
        raise ValueError(
            f"sample {number} of the batch has no text after its last visual token; put the question after the images"
        )
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers = output.sequences[:, ids.shape[1] :]
    log_probs = torch.stack(output.logits, 1).float().log_softmax(-1)
    if bool(log_probs.isnan().any()):
        raise ValueError(f"the dense model's logits are NaN in {model.dtype}: use another dtype, such as bfloat16")
    ends = getattr(model.generation_config, "eos_token_id", None)
    ended = torch.isin(
        answers, torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends]).to(ids)
    )
    # An image token in an answer has no image: what would follow it cannot be computed.
    ended |= visual_mask(adapted, answers)
    valid = ended.int().cumsum(1) - ended.int() == 0
    changed = read_images(adapted, inputs).changed
    answer = answers[:, :-1]
    harmless = min({0, 1, 2} - set(adapted.token_ids.values()))
    answer = answer.masked_fill(visual_mask(adapted, answer), harmless)
    call = {
        **inputs,
        **changed,
        "input_ids": torch.cat([ids, answer], 1),
        "attention_mask": torch.cat([mask, valid[:, :-1].to(mask)], 1),
        "logits_to_keep": answers.shape[1],
        "use_cache": False,
    }
    for name, value in inputs.items():  # what a processor makes for each token besides its id: what kind of token it is
        if name not in ("input_ids", "attention_mask") and isinstance(value, torch.Tensor) and value.shape == ids.shape:
            call[name] = torch.cat([value, value.new_full(answer.shape, adapted.family.answer_type)], 1)
    visual_tokens = round(float(visual.sum(1).float().mean()))
    text_tokens = round(float(call["attention_mask"].sum(1).float().mean())) - visual_tokens
    return Reference(call, log_probs, valid, answers, ids.shape[1], visual_tokens, text_tokens)


class Judge:
    """Measures recipes by their divergence from the dense model, a batch at a time.

    Args:
        model: a supported `...ForConditionalGeneration` model, without pruning.
        references: the batches.
        unit: samples whose dense prefills cost 1; by default all of them.
    """

    def __init__(self, model: Any, references: Sequence[Reference], unit: int | None = None) -> None:
        self.adapted = adapt(model)
        self.model = self.adapted.model
        self.references = references
        self.unit = unit or sum(map(len, references))

    def divergences(self, number: int, recipes: Sequence[PruningRecipe]) -> list[list[float]]:
        """Measure several recipes on one batch: for each the samples' divergences, in nats."""
        batch, layers = self.references[number], len(self.adapted.layers)
        firsts = [self._first(recipe) for recipe in recipes]
        entering = self._entering(batch, sorted({first for first in firsts if 0 < first < layers}))
        values: list[list[float]] = []
        with torch.inference_mode():
            for recipe, first in zip(recipes, firsts, strict=True):
                if first >= layers:  # removes nothing
                    values.append([0.0] * len(batch))
                    continue
                with prune(self.model, recipe), _resumed(self.adapted, first, entering.get(first)):
                    values.append(batch.divergence(self.model(**batch.inputs).logits).tolist())
        return values

    def price(self, number: int, recipes: Sequence[PruningRecipe]) -> float:
        """Price `divergences` in dense prefills of `unit` samples: the decoder layers that run, and scoring."""
        batch, layers = self.references[number], len(self.adapted.layers)
        n, text = batch.visual_tokens, batch.text_tokens
        dense = flops.prefill_flops(self.adapted.fingerprint, n, [0] * layers, text_after=text).decoder
        total = max((first for first in map(self._first, recipes) if first < layers), default=0) / layers
        for recipe in recipes:
            if (first := self._first(recipe)) < layers:
                counts = recipe.counts(n), recipe.counts_before(n)
                pruned = flops.prefill_flops(recipe.model, n, *counts, text_after=text)
                total += (pruned.decoder + pruned.scoring) / dense - first / layers
        return total * len(batch) / self.unit

    def _first(self, recipe: PruningRecipe) -> int:
        """The first layer that does not run as in the dense model; the number of layers if all do."""
        if get_scorer(recipe.scorer).accumulates:
            return 0
        steps = zip(recipe.entering, recipe.keep, strict=True)
        return next((layer for layer, (enter, keep) in enumerate(steps) if min(enter, keep) < 1), len(recipe.keep))

    def _entering(self, batch: Reference, firsts: Sequence[int]) -> dict[int, Any]:
        """Run the dense layers up to the last of `firsts` and keep what enters each of them."""
        if not firsts:
            return {}
        entering: dict[int, Any] = {}
        layers = self.adapted.layers
        with contextlib.ExitStack() as stack:
            for first in firsts:

                def keep(_: Any, __: Any, output: Any, first: int = first) -> None:
                    entering[first] = output

                stack.callback(layers[first - 1].register_forward_hook(keep).remove)
            for layer in layers[firsts[-1] :]:
                stack.enter_context(_replaced(layer, _same))
            with torch.inference_mode():
                self.model(**{**batch.inputs, "logits_to_keep": 1})
        return entering

    def watch(self, number: int) -> Iterator[tuple[int, Heads]]:
        """Run the dense model on one batch, and give for each layer its number and what visual tokens receive there."""
        batch = self.references[number]
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        images = read_images(self.adapted, batch.inputs)
        image = images.image
        after = text_after(images.visual, mask)
        question = after & (torch.arange(ids.shape[1], device=ids.device) < batch.prompt)
        by_layer: list[tuple[int, Heads]] = []

        def look(layer: int, at: Attention) -> None:
            softmax = dataclasses.replace(at.softmax, valid=mask)
            here = head_attention(at.query, at.key, image, question, softmax)
            used = head_attention(at.query, at.key, image, after, softmax, ("max",))["max"].amax(1)
            joined = torch.stack([here[kind] for kind in HEAD_KINDS], 1).flatten(1, 2).transpose(1, 2)
            by_layer.append((layer, Heads(joined, used, image)))

        with torch.inference_mode(), tap_attention(self.adapted, lambda layer, _: functools.partial(look, layer)):
            self.model(**batch.inputs)
        yield from by_layer


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the visual tokens of a batch receive in one dense layer.

    Attributes:
        received: [B, Q, kinds * H], head by head, for each kind of HEAD_KINDS.
        used: [B, Q], the most that any head of any row after the image, the answer's too, pays to the token.
        image: [B, Q] int64, number of the image that each token belongs to, -1 for text.
    """

    received: torch.Tensor
    used: torch.Tensor
    image: torch.Tensor


@contextlib.contextmanager
def _replaced(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace what a layer computes; no hook can keep a layer from running."""
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _same(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


@contextlib.contextmanager
def _resumed(adapted: AdaptedModel, first: int, entering: Any) -> Iterator[None]:
    """Begin forwards at layer `first`, with what entered it in the dense model."""
    with contextlib.ExitStack() as stack:
        for layer in adapted.layers[:first]:
            stack.enter_context(_replaced(layer, _same))
        if first:
            stack.enter_context(_replaced(adapted.layers[first - 1], lambda *_, **__: entering))
        yield
