"""What a call of the model asks for, and what of it cannot be pruned rightly.

Reads the arguments of `model(...)` by their names in transformers (`given`); knows nothing of layers.

Shapes: B batch, P columns of the past (as many as before pruning), Q columns of this call.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import PIXELS, modality_of, visual_mask

_COMPILED = (
    "compiled code does not see the hooks that prune puts on, and would run dense; use the model before torch.compile "
    "(a wrapper has it as _orig_mod)"
)


def require_uncompiled(adapted: AdaptedModel) -> None:
    """Refuse a model that torch.compile has wrapped, or whose decoder it has compiled in place."""
    for module in (adapted.model, adapted.model.base_model, *adapted.decoder.modules()):
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{type(module).__name__} is compiled: {_COMPILED}")


def require_uncompiled_call() -> None:
    """Refuse a call that comes from a torch.compile'd wrapper around the model."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]  # None ends the loop, and is not used after it
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"].startswith("torch._dynamo"):
            raise ValueError(f"the model was called through torch.compile: {_COMPILED}")


def call_length(given: dict[str, Any]) -> int:
    """Count the columns of a call: Q."""
    return int(_tokens(given).shape[1])


def _tokens(given: dict[str, Any]) -> torch.Tensor:
    """Ids [B, Q], or the embeddings [B, Q, d] in their place."""
    tokens: torch.Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    return tokens


def valid_columns(given: dict[str, Any], cache: Any = None) -> tuple[torch.Tensor | None, int]:
    """Read padding and the length of the past, which `cache` holds: ([B, P + Q] bool or None, P)."""
    mask = given.get("attention_mask")
    length, past = call_length(given), 0 if cache is None else cache.get_seq_length()
    if mask is None:
        return None, past
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        what = f"has {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else f"is a {type(mask).__name__}"
        raise ValueError(f"attention_mask {what}: must be a tensor [batch, tokens] for prune")
    if mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens: must cover {past + length}, the {past} in the KV cache "
            f"(as many as before pruning) and the {length} of this call"
        )
    batch = len(_tokens(given))
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"attention_mask has {mask.shape[0]} rows for {batch} samples: must be as many")
    valid = mask.bool().expand(batch, -1)
    return None if bool(valid.all()) else valid, past


def require_left_padding(adapted: AdaptedModel, valid: torch.Tensor | None) -> None:
    """Refuse padding between tokens [B, P + Q], for families where it changes what a row is."""
    if valid is None or not (why := adapted.needs_left_padding):
        return
    # Tokens in more than one run; padding behind the last token changes nothing yet.
    between = valid[:, 0].long() + (~valid[:, :-1] & valid[:, 1:]).sum(1) > 1
    if bool(between.any()):
        raise ValueError(
            f"attention_mask: sample {int(between.int().argmax())} has padding between tokens, and from a "
            f"{adapted.fingerprint.model_type} model such a row is not what its sample is alone, since {why}: pad "
            "on the left (tokenizer.padding_side = 'left')"
        )


def require_no_visual_tokens(adapted: AdaptedModel, given: dict[str, Any], cache: Any) -> None:
    """Refuse a call without images that has visual tokens, or does not tell.

    A decoding step may have an image token that the model wrote, or a draft that proposes some.
    """
    ids = given.get("input_ids")
    begins = cache is None or cache.get_seq_length() == 0
    if ids is None:
        if begins or call_length(given) > 1:
            raise ValueError(
                "inputs_embeds are given without pixel_values: which of them are visual tokens is unknown; pass "
                "input_ids, or pixel_values and inputs_embeds that hold the image token's embedding"
            )
        return
    asked = given.get("logits_to_keep")
    draft = max(int(asked) - 1, 0) if isinstance(asked, int) else 0
    if ids.shape[1] - draft <= 1:
        return
    tokens = visual_mask(adapted, ids)[:, : ids.shape[1] - draft]
    if int(tokens.sum()) > len(ids):  # one a row may be the model's own
        what = modality_of(adapted, ids[:, : ids.shape[1] - draft][tokens])
        raise ValueError(
            f"the prompt has {int(tokens.sum())} visual tokens, but no {what} is given: pass the processor's "
            f"{PIXELS[what][0]}, and do not cut the prompt into chunks (prefill_chunk_size); a draft model of assisted "
            "decoding, which gets no images, must not be pruned itself"
        )


def counted_positions(valid: torch.Tensor | None, past: int, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Correct the positions, [B, Q], with which generate goes on behind right padding; None where they are right.

    generate counts on from the last column: where that is padding, whose position is 0, the row goes on at 1. Other
    positions are the caller's own and stay.
    """
    if valid is None or position_ids is None or position_ids.ndim != 2:
        return None
    counted = valid.long().cumsum(1)
    inside = ~valid & (counted > 0)
    column = torch.arange(valid.shape[1], device=valid.device)
    last_padding = torch.where(inside, column, -1).amax(1, keepdim=True)
    own = slice(past, None)
    from_padding = (column - last_padding)[:, own]
    behind = (last_padding >= 0) & (column[own] > last_padding)
    wrong = (position_ids == from_padding) & behind
    if not bool(wrong.any()):
        return None
    # All of a row's columns behind the padding count on from it, or none does.
    wrong = wrong & ((position_ids == from_padding) | ~behind).all(1, keepdim=True)
    return torch.where(wrong, counted[:, own] - 1, position_ids)


def predicted_rows(given: dict[str, Any], visual: torch.Tensor) -> torch.Tensor:
    """Mark the rows that labels give a target to, [B, Q]; refuse targets of rows that may leave."""
    if (target := given.get("shift_labels")) is None:
        if given.get("labels") is None:
            return torch.zeros_like(visual)
        target = nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    predicted = (target != -100).to(visual.device)
    if bool((predicted & visual).any()):
        sample, column = (predicted & visual).nonzero()[0].tolist()
        raise ValueError(
            f"labels: sample {sample} has a target to be predicted by the visual token at {column}, which may be "
            "pruned; set labels to -100 at visual tokens and at the token after each image"
        )
    return predicted


def first_answer(given: dict[str, Any], visual: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Find each row's first column of the answer, [B, 1].

    It lies behind the first column after the images whose logit is asked for (in a right-padded prompt that may be
    padding) or that labels give a target to; Q without such.

    Args:
        given: the arguments of the call.
        visual: [B, Q] bool.
        predicted: [B, Q] bool, columns with a target.
    """
    length = visual.shape[1]
    column = torch.arange(length, device=visual.device)
    asked = _asked_columns(given.get("logits_to_keep"), visual)
    if not bool(asked.all()):  # every logit asked for is none asked for
        predicted = predicted | asked
    behind = column > torch.where(visual, column, -1).amax(1, keepdim=True)
    return torch.where(predicted & behind, column + 1, length).amin(1, keepdim=True)


def _asked_columns(logits_to_keep: Any, like: torch.Tensor) -> torch.Tensor:
    """Mark the columns that `logits_to_keep` keeps, [B, Q], in any form that transformers takes."""
    batch, length = like.shape
    asked = torch.zeros_like(like)
    if isinstance(logits_to_keep, torch.Tensor):
        logits_to_keep = logits_to_keep.to(like.device)
        if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
            asked |= logits_to_keep
            return asked
        if logits_to_keep.ndim == 2:
            return asked.scatter(1, logits_to_keep.expand(batch, -1) % length, True)
    elif logits_to_keep is None or isinstance(logits_to_keep, int):
        logits_to_keep = slice(-(logits_to_keep or 0), None)
    asked[:, logits_to_keep] = True
    return asked


def require_rows(visual: torch.Tensor, rows: torch.Tensor, problem: str) -> None:
    """Refuse samples with an image but without such rows."""
    lacking = visual.any(1) & ~rows.any(1)
    if bool(lacking.any()):
        raise ValueError(f"sample {int(lacking.int().argmax())} of the batch {problem}")
