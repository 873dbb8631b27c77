"""What the model looked at when it wrote a word: attention of the word's rows to the visual tokens that were there.

Shapes: N columns of the prompt, H heads, m rows present at a layer, r rows of the word, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fitprune.engine.choose import choose_by, quotas_by
from fitprune.engine.remover import removing
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import visual_mask
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import Scorer
from fitprune.scoring.tiles import row_blocks
from fitprune.scoring.view import LayerView


@torch.no_grad()
def attention_of_word(
    adapted: AdaptedModel,
    recipe: PruningRecipe,
    scorer: Scorer,
    inputs: Mapping[str, Any],
    answer: Sequence[int],
    word: Sequence[int],
) -> torch.Tensor:
    """Run prompt and answer in one pass under a recipe, and watch the rows that the word's tokens were predicted from.

    Args:
        adapted: the model.
        recipe: of the model.
        scorer: ranks the tokens.
        inputs: of one sample, on the model's device.
        answer: its tokens.
        word: places of the word's tokens in the answer.

    Returns:
        [visual tokens] fp32, in the order of the prompt: mean over the word's rows, heads and layers with attention;
        0 in the layers that a token does not enter.

    Raises:
        ValueError: the answer holds the token of an image, for which there are no pixels.
    """
    if not set(adapted.token_ids.values()).isdisjoint(answer[: max(word)]):
        raise ValueError("before this word the answer holds an image token, so it cannot be read again: press another")
    prompt = inputs["input_ids"].shape[1]
    call = _continued(inputs, answer[: max(word)])
    wanted = torch.tensor([prompt - 1 + place for place in word], device=call["input_ids"].device)
    total = torch.zeros(call["input_ids"].shape[1])
    layers = sum(attention is not None for attention in adapted.attentions)
    choose = choose_by(scorer)

    def watch(view: LayerView) -> torch.Tensor | None:
        if not view.before:
            at, column = view.states, view.column[0]
            needed = torch.isin(column, wanted.to(column.device))
            past = at.key.shape[2] - at.query.shape[2]
            for _, own, weights in row_blocks(at.query, at.key, needed, at.softmax):
                received = weights.mean(1)[0, :, past:].sum(0) / (len(word) * layers)
                present = column[:own] >= 0
                total.index_add_(0, column[:own][present].cpu(), received[present].cpu())
        return choose(view)

    with removing(
        adapted, watch, quotas_by(recipe), needs_question=scorer.query_aware, reads_vision=scorer.reads_vision
    ):
        # The first requested logit is that of the prompt's last row, so the question ends there, as in `generate`.
        adapted.model(**call, use_cache=False, logits_to_keep=len(call["input_ids"][0]) - prompt + 1)
    visual = visual_mask(adapted, inputs["input_ids"])[0].cpu()
    return total[:prompt][visual]


def _continued(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """Put an answer after a prompt; what else there is of each token goes on as text."""
    ids = inputs["input_ids"]
    tail = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    call = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            more = functools.partial(
                torch.ones_like if name == "attention_mask" else torch.zeros_like, dtype=value.dtype
            )
            call[name] = torch.cat([value, tail if name == "input_ids" else more(tail)], 1)
    return call
