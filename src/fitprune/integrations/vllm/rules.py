"""What vLLM must be set to, and a recipe must be, for pruned answers to be right. A rule is a line of a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fitprune._support.host import layer_windows
from fitprune.families.config import fingerprint_of
from fitprune.integrations.vllm.scheduler import schedules_images
from fitprune.recipes.recipe import PruningRecipe, short
from fitprune.scoring.scorers import get_scorer

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")  # of attention


def require_supported(vllm_config: Any, recipe: PruningRecipe) -> None:
    """Refuse settings under which pruned results would be wrong.

    Args:
        vllm_config: the engine's VllmConfig.
        recipe: what is to be served.

    Raises:
        ValueError: names every such setting, and how to change it.
    """
    rules = (*_engine_rules(vllm_config), *_recipe_rules(vllm_config, recipe))
    if messages := [message for broken, message in rules if broken]:
        raise ValueError(
            "fitprune cannot prune in this vLLM engine (VLLM_PLUGINS=none runs it dense):\n- " + "\n- ".join(messages)
        )


def _engine_rules(config: Any) -> Iterator[tuple[bool, str]]:
    """For each setting of the engine, whether it is broken, and what to say."""
    model, parallel = config.model_config, config.parallel_config
    pipeline = parallel.pipeline_parallel_size
    context = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    yield not model.enforce_eager, "enforce_eager=False: compiled graphs have fixed rows; pass --enforce-eager"
    yield (
        pipeline > 1,
        f"pipeline_parallel_size={pipeline}: rows leave between its stages; use 1, and --tensor-parallel-size instead",
    )
    yield (
        parallel.data_parallel_size > 1 and model.is_moe,
        f"data_parallel_size={parallel.data_parallel_size} of a mixture of experts: its ranks exchange the dense rows; "
        "use 1, and --tensor-parallel-size instead",
    )
    yield context > 1, "context parallelism: splits a request's keys; leave it out"
    yield parallel.use_ubatching, "dual batch overlap: splits a step's rows; leave out --enable-dbo"
    method = "ngram" if config.speculative_config is None else config.speculative_config.method
    yield (
        method != "ngram",
        f"speculation by {method!r}: drafts of hidden states lack those of tokens that left; use 'ngram', or leave out "
        "--speculative-config",
    )
    yield config.lora_config is not None, "LoRA: its kernels count the dense rows; merge the adapter into the weights"
    yield (
        config.kv_transfer_config is not None,
        "a KV connector: moves dense caches; leave out --kv-transfer-config and --kv-offloading-size",
    )
    yield (
        config.ec_transfer_config is not None,
        "an encoder connector: images come without what numbers their tokens; leave out --ec-transfer-config",
    )
    yield (
        config.cache_config.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill=True: runs some layers on a prompt's last row; leave it out",
    )
    yield (
        config.aux_output_config.enable_return_routed_experts,
        "enable_return_routed_experts=True: rows that left go to no expert; leave it out",
    )
    backend = config.attention_config.backend
    yield (
        backend is not None and backend.name not in BACKENDS,
        f"attention_backend={getattr(backend, 'name', None)}: must be one of {', '.join(BACKENDS)}",
    )
    scheduler = config.scheduler_config
    yield (
        scheduler.scheduler_cls is not None and not schedules_images(scheduler.get_scheduler_cls()),
        f"scheduler_cls={scheduler.scheduler_cls}: must be a child of vLLM's Scheduler; leave out --scheduler-cls",
    )
    media = model.multimodal_config
    yield media.mm_encoder_only, "mm_encoder_only=True: there is no decoder to prune in"
    yield (
        bool(media.video_pruning_rate),
        f"video_pruning_rate={media.video_pruning_rate}: takes other tokens of videos away before; leave it out",
    )
    yield (
        model.using_transformers_backend(),
        "model_impl='transformers': its layers are not of the form in which rows leave; leave out --model-impl",
    )
    yield model.runner_type != "generate", f"runner_type={model.runner_type!r}: must be 'generate'"


def _recipe_rules(config: Any, recipe: PruningRecipe) -> Iterator[tuple[bool, str]]:
    """For each need of the decoder, the recipe and its scorer, whether it is broken, and what to say."""
    decoder, scorer = fingerprint_of(config.model_config.hf_config).decoder, get_scorer(recipe.scorer)
    name = f"scorer {short(recipe.scorer['name'])}"
    yield (
        bool(decoder.linear_layers),
        "this decoder has layers without softmax attention, which keep a summary of all rows; serve it dense",
    )
    yield (
        any(layer_windows(config.model_config.hf_text_config, decoder.layers)),
        "this decoder has layers with sliding windows, in which vLLM counts the tokens that are left; serve it dense",
    )
    yield (
        decoder.bidirectional,
        "this decoder's image tokens see later ones, which vLLM's attention masks by their dense position; serve it "
        "dense",
    )
    yield (
        bool(recipe.enter),
        f"{name}: its recipe takes tokens away between layers (enter); vLLM's plug-in lets them leave inside layers "
        "alone; use another method",
    )
    yield scorer.reads_vision, f"{name}: reads the vision tower's attention, which vLLM does not give; use another"
    yield (
        scorer.accumulates,
        f"{name}: reads the attention of all layers, also of those that remove nothing; use another",
    )
    yield scorer.reads_previous, f"{name}: reads the layer before, which no token may leave before in vLLM; use another"
