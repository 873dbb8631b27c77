"""vLLM's scheduler, whichever it is, made to prefill a prompt that loses tokens in one step.

Scores need a prompt's images and its question in one step. So its part from the first image on waits until one step can
hold it, while text is split into chunks as before; a prompt whose part no step can hold runs dense. That is decided
here, once for a request, and goes to the workers with its images.

Nothing leaves before a pruned prompt's first image, so blocks wholly before it are read from the prefix cache and
shared as before. Of the others, what a later layer holds is not decided by the tokens that their hashes stand for: it
is moved up, and the answer is written into what is left. No two requests may hold them at a time, so their hashes are
no other request's, nor this one's after a preemption. But what a prompt wrote stays before what its answer wrote: once
the request has ended, one with an equal prompt may take its blocks over, and write its own answer over the old one.
Text and dense prompts share as before.
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import SchedulerInterface

from fitprune.families.images import tokens_of
from fitprune.integrations.vllm.cached_keys import are_readable
from fitprune.integrations.vllm.configured import configured_recipe
from fitprune.integrations.vllm.images import can_number, images_in
from fitprune.integrations.vllm.metrics import Counts
from fitprune.recipes.recipe import PruningRecipe

MARK = "fitprune_prunes"  # attribute of a feature of a request that is to be pruned
ENDED = 4096  # prompts of ended requests that are known; each has a hash and the ids of up to a block and a token

# Why a prompt with images runs dense: names for the counters, sentences for the log.
REASONS = {
    "embeddings": "it has embeddings in place of text",
    "streaming_input": "its prompt comes in parts",
    "other_media": "it has audio, or a video whose frames are not known",
    "no_text_after_image": "no text follows its last image",
    "longer_than_step": "its prompt is longer than a step; raise --max-num-batched-tokens, or leave it out",
    "encoder_budget": "its images are more than the vision tower may encode in a step; raise --max-num-batched-tokens",
}

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def schedules_images(scheduler: type) -> bool:
    """Whether a scheduler's class schedules images as vLLM's own does, so that `pruning` can be made of it."""
    return hasattr(scheduler, "_try_schedule_encoder_inputs")


def pruning(base: type) -> type:
    """Make the scheduler class that holds prompts back where `base` would split them.

    Args:
        base: what vLLM has chosen: its own, also the asynchronous one, or the user's. One that does not schedule images
            as vLLM's own does stays as it is: `rules` refuses it where there is a recipe.
    """
    if not schedules_images(base):
        return base
    return type(f"Pruning{base.__name__}", (WholePrompts, base), {"__module__": __name__})


class WholePrompts(SchedulerInterface):  # type: ignore[misc]  # vLLM is not followed by mypy here: its classes are Any
    """The part of `pruning`'s scheduler that is fitprune's; without a recipe it changes nothing.

    Args:
        *args: of vLLM's scheduler.
        **kwargs: likewise.

    Attributes:
        fitprune_counts: what its statistics have not yet said of pruning.
    """

    _recipe: PruningRecipe | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fitprune_counts = Counts()
        if (recipe := configured_recipe(self.vllm_config)) is None:
            return
        self._recipe = recipe
        config = self.scheduler_config
        drafts = self.vllm_config.speculative_config
        taken = drafts.max_num_new_slots_for_drafting if drafts is not None else 0
        threshold = config.long_prefill_token_threshold or self.max_num_scheduled_tokens
        self._step_tokens = min(self.max_num_scheduled_tokens, threshold, config.max_num_batched_tokens - taken)
        self._step_embeds = min(self.max_num_encoder_input_tokens, self.encoder_cache_manager.cache_size)
        self._shares = are_readable(self.vllm_config)
        self._chunks = self._shares and config.enable_chunked_prefill
        # By what is known of its prompt: whose blocks the last ended request with it had.
        self._ended: dict[Any, bytes] = {}
        logger.info(
            "fitprune: prompts of at most %d tokens%s are pruned, longer ones run dense",
            self._step_tokens,
            " from their first image on" if self._chunks else "",
        )

    def add_request(self, request: Any) -> None:
        """Decide whether the request is pruned, before it is queued."""
        if self._recipe is not None and request.mm_features and request.request_id not in self.requests:
            self._decide(request, self._recipe)
        super().add_request(request)

    def _decide(self, request: Any, recipe: PruningRecipe) -> None:
        reason = self._why_dense(request)
        for feature in request.mm_features:
            setattr(feature, MARK, reason is None)
        if reason is not None:
            self.fitprune_counts.dense(reason)
            logger.warning_once("fitprune: a request runs dense: %s", REASONS[reason])
            return
        places = images_in(request.mm_features, request.num_prompt_tokens, self.vllm_config.model_config.hf_config)
        self.fitprune_counts.pruned(recipe, tokens_of(places)[0])
        request.fitprune_prompt = self._prompt(request)

    def _prompt(self, request: Any) -> tuple[int, Any]:
        """Give how many tokens an equal prompt may take over, and what it is known by; 0 and None if it may not."""
        size, places = self.hash_block_size, [feature.mm_position for feature in request.mm_features]
        end = (request.num_prompt_tokens - 2) // size * size  # a step of one row is an answer's
        if request._block_hasher is None or end < max(place.offset + place.length for place in places):
            return 0, None
        return end, (request.block_hashes[end // size - 1], *request.prompt_token_ids[end:])

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Look for a request's blocks; a pruned one's are those of its text, or all that an ended one had."""
        if not _is_pruned(request) or request._block_hasher is None:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        end, known = request.fitprune_prompt
        if (owner := self._ended.get(known)) is not None:
            first = self._hash_alone(request, owner)
            blocks, computed, *_ = hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
            if computed == end and not any(block.ref_cnt for block in blocks.blocks[0][first:]):
                return hit
        self._hash_alone(request)
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _hash_alone(self, request: Any, owner: bytes | None = None) -> int:
        """Let no living request find the blocks that are not wholly before the first image.

        Args:
            request: one that has no blocks.
            owner: of which ended request it is to find those of its prompt; None for none.

        Returns:
            The first such block.
        """
        size, own = self.hash_block_size, secrets.token_bytes(16)
        first = _first(request) // size if self._shares else 0
        request.fitprune_owner = owner = owner or own
        taken = request.fitprune_prompt[0] // size
        del request.block_hashes[first:]
        request._block_hasher = lambda request: [
            (owner if block < taken else own) + block.to_bytes(16, "big")
            for block in range(len(request.block_hashes), request.num_tokens // size)
        ]
        request.update_block_hashes()
        return first

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step as vLLM does."""
        step = super().schedule(*args, **kwargs)
        for new in step.scheduled_new_reqs:
            if _is_pruned(request := self.requests[new.req_id]):
                # Of images that are not encoded vLLM has dropped the mark, and the pixels, as if none were preempted.
                new.mm_features = request.mm_features
        return step

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        # Not of a preempted one: the step that was to fill its blocks may have gone on without it.
        filled = request.num_output_tokens and request.num_computed_tokens >= request.num_prompt_tokens
        if _is_pruned(request) and filled and (known := request.fitprune_prompt[1]) is not None:
            self._ended.pop(known, None)
            self._ended[known] = request.fitprune_owner
            if len(self._ended) > ENDED:
                del self._ended[next(iter(self._ended))]
        return super()._free_request(request, *args, **kwargs)

    def _why_dense(self, request: Any) -> str | None:
        features = request.mm_features
        if request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
            return "embeddings"
        if request.resumable:
            return "streaming_input"
        if not can_number(features, self.vllm_config.model_config.hf_config):
            return "other_media"
        if max(_last(feature.mm_position) for feature in features) == request.num_prompt_tokens - 1:
            return "no_text_after_image"
        if request.num_prompt_tokens - (_first(request) if self._chunks else 0) > self._step_tokens:
            return "longer_than_step"
        embeds = sum(request.get_num_encoder_embeds(number) for number in range(len(features)))
        if embeds > self._step_embeds:
            return "encoder_budget"
        return None

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's statistics of a step, with what was counted."""
        stats = super().make_stats(*args, **kwargs)
        return stats if self._recipe is None else self.fitprune_counts.sent_with(stats)

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **kwargs: Any
    ) -> Any:
        """Schedule a request's images, or text before them alone where a pruned prompt would come in part."""
        text = max(_first(request) - num_computed_tokens, 0)
        whole = num_computed_tokens < request.num_prompt_tokens and _is_pruned(request)
        least = request.num_prompt_tokens - num_computed_tokens if whole else 0
        if num_new_tokens >= least:
            scheduled = super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
            )
            if scheduled[1] >= least:
                return scheduled
            self.encoder_cache_manager.free(request)  # what it has taken, as vLLM does where there are no blocks
            num_new_tokens = scheduled[1]
        if not hasattr(request, "fitprune_holds"):
            request.fitprune_holds = True
            self.fitprune_counts.hold()
        return [], min(text, num_new_tokens) if self._chunks else 0, encoder_compute_budget, [], []


def _is_pruned(request: Any) -> bool:
    return bool(request.mm_features) and getattr(request.mm_features[0], MARK, False)


def _first(request: Any) -> int:
    """Find the place of the first image in a request's prompt."""
    return int(request.mm_features[0].mm_position.offset)


def _last(place: Any) -> int:
    """Find the place of an image's last token in the prompt."""
    inside = place.length - 1 if place.is_embed is None else int(place.is_embed.nonzero()[-1])
    return int(place.offset) + inside
