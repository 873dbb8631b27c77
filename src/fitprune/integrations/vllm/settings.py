"""Engine arguments that pruning asks for, set where the user left vLLM's default, each with its reason in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger

from fitprune.recipes.recipe import PruningRecipe

LONGEST_PROMPT = 16384  # tokens of a prompt with images that the default step has room for

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def set_arguments(arguments: Any) -> None:
    """Set what a pruning engine needs; vLLM's EngineArgs, before the engine's config is made of them."""
    if not arguments.enforce_eager:
        arguments.enforce_eager = True
        logger.info("fitprune: sets --enforce-eager: rows leave during the forward, compiled graphs have fixed rows")
    if _prefers_flashinfer() and arguments.attention_backend is None and arguments.attention_config.backend is None:
        backend = "FLASH_ATTN" if arguments.kv_cache_dtype == "auto" else "TRITON_ATTN"
        arguments.attention_backend = backend
        logger.info(
            "fitprune: sets --attention-backend %s: vLLM's choice on this GPU, FlashInfer, is not hooked", backend
        )


def make_room(arguments: Any, longest: int) -> None:
    """Raise the default number of tokens of a step, so that the longest prompt with images is prefilled in one.

    Args:
        arguments: vLLM's EngineArgs, with `max_num_batched_tokens` and `max_num_seqs` at their defaults.
        longest: tokens that the model takes.
    """
    # One token more for each running request, so that a prompt does not wait for their answers to end.
    room = min(longest, LONGEST_PROMPT) + arguments.max_num_seqs
    if room > arguments.max_num_batched_tokens:
        logger.info(
            "fitprune: raises --max-num-batched-tokens from %d to %d: a prompt with images is pruned if one step holds "
            "it whole",
            arguments.max_num_batched_tokens,
            room,
        )
        arguments.max_num_batched_tokens = room


def announce(recipe: PruningRecipe, name: str) -> None:
    """Say in the log what is pruned, and what that saves.

    Args:
        recipe: what the engine prunes by.
        name: what the user calls it.
    """
    tokens, cost = recipe.visual_tokens, recipe.cost()
    budget = recipe.provenance.get("budget")
    if isinstance(budget, Mapping):
        budget = ", ".join(f"{key}={value}" for key, value in budget.items())
    logger.info(
        "fitprune: prunes by %s%s: visual tokens leave at layers %s of %d. Of an image of %d tokens %d enter the last "
        "layer's MLP. That saves %.1f%% of the image's FLOPs in the decoder, and %.1f%% of those of a prompt with %d "
        "tokens of text",
        name,
        f" (budget {budget})" if budget else "",
        recipe.removing,
        len(recipe.keep),
        tokens,
        cost.kept[-1],
        100 * cost.flops_reduction,
        100 * (1 - cost.prefill_flops / cost.dense_prefill_flops),
        cost.text_tokens,
    )


def _prefers_flashinfer() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda() and current_platform.is_device_capability_family(100))
