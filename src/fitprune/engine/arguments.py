"""Read the arguments of a call of the model, and refuse calls that cannot be pruned exactly. Knows nothing of layers.

Shapes: B batch, P columns of the past (as many as before pruning), Q columns of this call, N = P + Q.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from fitprune._support import host
from fitprune.families.adapter import AdaptedModel
from fitprune.families.images import PIXELS, modality_of, visual_mask

_COMPILED = (
    "compiled code does not see the hooks that prune puts on, and would run dense; use the model before torch.compile "
    "(a wrapper has it as _orig_mod)"
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        arguments: what it passes, by the names that the model's `forward` has for it.
        cache: its KV cache; None if it has none.
        valid: [B, N] bool, False at padding; None where there is none.
        past: P.
    """

    arguments: dict[str, Any]
    cache: Any
    valid: torch.Tensor | None
    past: int

    @functools.cached_property
    def length(self) -> int:
        """Q."""
        return call_length(self.arguments)

    @property
    def total(self) -> int:
        """N."""
        return self.past + self.length

    @property
    def own_valid(self) -> torch.Tensor | None:
        """`valid` of this call's columns, [B, Q]."""
        return None if self.valid is None else self.valid[:, self.past :]


def require_uncompiled(adapted: AdaptedModel) -> None:
    """Refuse a model that torch.compile has wrapped, or whose decoder it has compiled in place."""
    for module in (adapted.model, adapted.model.base_model, *adapted.decoder.modules()):
        if host.is_compiled(module):
            raise ValueError(f"{type(module).__name__} is compiled: {_COMPILED}")


def require_uncompiled_call() -> None:
    """Refuse a call that comes from a torch.compile'd wrapper around the model."""
    if host.called_by_compiled_code():
        raise ValueError(f"the model was called through torch.compile: {_COMPILED}")


def call_length(arguments: dict[str, Any]) -> int:
    """Count the columns of a call: Q."""
    return int(_tokens(arguments).shape[1])


def _tokens(arguments: dict[str, Any]) -> torch.Tensor:
    """Ids [B, Q], or the embeddings [B, Q, d] in their place."""
    ids = arguments.get("input_ids")
    tokens: torch.Tensor = arguments["inputs_embeds"] if ids is None else ids
    return tokens


def valid_columns(arguments: dict[str, Any], cache: Any = None) -> tuple[torch.Tensor | None, int]:
    """Read the padding and the length of the past, which `cache` holds.

    Args:
        arguments: of the call.
        cache: its KV cache, if it has one.

    Returns:
        [B, N] bool, False at padding, or None where there is none; and P.

    Raises:
        ValueError: attention_mask has another form than [B, N].
    """
    mask = arguments.get("attention_mask")
    length, past = call_length(arguments), 0 if cache is None else cache.get_seq_length()
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
    batch = len(_tokens(arguments))
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"attention_mask has {mask.shape[0]} rows for {batch} samples: must be as many")
    valid = mask.bool().expand(batch, -1)
    return None if bool(valid.all()) else valid, past


def require_left_padding(adapted: AdaptedModel, valid: torch.Tensor | None) -> None:
    """Refuse padding between tokens, for families in which it changes the tokens after it.

    Args:
        adapted: the model.
        valid: [B, N] bool, False at padding; None where there is none.
    """
    if valid is None or not (why := adapted.needs_left_padding):
        return
    # Tokens in more than one run; padding after the last token changes nothing yet.
    between = valid[:, 0].long() + (~valid[:, :-1] & valid[:, 1:]).sum(1) > 1
    if bool(between.any()):
        raise ValueError(
            f"attention_mask: sample {int(between.int().argmax())} has padding between tokens, and from a "
            f"{adapted.fingerprint.model_type} model such a row is not what its sample is alone, since {why}: pad "
            "on the left (tokenizer.padding_side = 'left')"
        )


def require_no_visual_tokens(adapted: AdaptedModel, arguments: dict[str, Any], cache: Any) -> None:
    """Refuse a call without images that has visual tokens, or may have some.

    A decoding step may have an image token that the model wrote, or a draft that proposes some.
    """
    ids = arguments.get("input_ids")
    begins = cache is None or cache.get_seq_length() == 0
    if ids is None:
        if begins or call_length(arguments) > 1:
            raise ValueError(
                "inputs_embeds are given without pixel_values: which of them are visual tokens is unknown; pass "
                "input_ids, or pixel_values and inputs_embeds that hold the image token's embedding"
            )
        return
    logits = arguments.get("logits_to_keep")
    draft = max(int(logits) - 1, 0) if isinstance(logits, int) else 0
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


def counted_positions(call: Call) -> torch.Tensor | None:
    """Correct the positions with which generate continues after right padding.

    generate counts on from the last column: where that is padding, whose position is 0, the row continues at 1. Other
    positions are the caller's own and stay.

    Args:
        call: the call.

    Returns:
        [B, Q] int64; None where the call's own are correct, or where it has none.
    """
    valid, positions = call.valid, call.arguments.get("position_ids")
    if valid is None or positions is None or positions.ndim != 2:
        return None
    counted = valid.long().cumsum(1)
    inside = ~valid & (counted > 0)
    column = torch.arange(valid.shape[1], device=valid.device)
    last_padding = torch.where(inside, column, -1).amax(1, keepdim=True)
    new = slice(call.past, None)
    from_padding = (column - last_padding)[:, new]
    after = (last_padding >= 0) & (column[new] > last_padding)
    wrong = (positions == from_padding) & after
    if not bool(wrong.any()):
        return None
    # All of a row's columns after the padding count on from it, or none does.
    wrong = wrong & ((positions == from_padding) | ~after).all(1, keepdim=True)
    return torch.where(wrong, counted[:, new] - 1, positions)


def predicted_rows(arguments: dict[str, Any], visual: torch.Tensor) -> torch.Tensor:
    """Mark the rows that labels give a target to, [B, Q]; refuse targets of rows that may leave."""
    if (target := arguments.get("shift_labels")) is None:
        if arguments.get("labels") is None:
            return torch.zeros_like(visual)
        target = nn.functional.pad(arguments["labels"][:, 1:], (0, 1), value=-100)
    predicted = (target != -100).to(visual.device)
    if bool((predicted & visual).any()):
        sample, column = (predicted & visual).nonzero()[0].tolist()
        raise ValueError(
            f"labels: sample {sample} has a target to be predicted by the visual token at {column}, which may be "
            "pruned; set labels to -100 at visual tokens and at the token after each image"
        )
    return predicted


def first_answer(arguments: dict[str, Any], visual: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Find each row's first column of the answer, [B, 1]; Q where there is none.

    It is the one after the first column, after the images, that has a target or whose logit is requested (in a
    right-padded prompt that may be padding).

    Args:
        arguments: of the call.
        visual: [B, Q] bool.
        predicted: [B, Q] bool, columns with a target.
    """
    length = visual.shape[1]
    column = torch.arange(length, device=visual.device)
    requested = _requested_columns(arguments.get("logits_to_keep"), visual)
    if not bool(requested.all()):  # a call that requests all logits says nothing about the answer
        predicted = predicted | requested
    after = column > torch.where(visual, column, -1).amax(1, keepdim=True)
    return torch.where(predicted & after, column + 1, length).amin(1, keepdim=True)


def _requested_columns(logits_to_keep: Any, like: torch.Tensor) -> torch.Tensor:
    """Mark the columns that `logits_to_keep` keeps, [B, Q], in any form that transformers takes."""
    batch, length = like.shape
    requested = torch.zeros_like(like)
    if isinstance(logits_to_keep, torch.Tensor):
        logits_to_keep = logits_to_keep.to(like.device)
        if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
            requested |= logits_to_keep
            return requested
        if logits_to_keep.ndim == 2:
            return requested.scatter(1, logits_to_keep.expand(batch, -1) % length, True)
    elif logits_to_keep is None or isinstance(logits_to_keep, int):
        logits_to_keep = slice(-(logits_to_keep or 0), None)
    requested[:, logits_to_keep] = True
    return requested


def require_rows(visual: torch.Tensor, rows: torch.Tensor, problem: str) -> None:
    """Refuse samples with an image but without such rows, [B, Q] both."""
    lacking = visual.any(1) & ~rows.any(1)
    if bool(lacking.any()):
        raise ValueError(f"sample {int(lacking.int().argmax())} of the batch {problem}")
