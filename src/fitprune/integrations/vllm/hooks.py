"""What of vLLM is hooked or called from outside its public interface; a version that lacks one is named at once."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

VERSIONS = ("0.32", "0.33")  # those that were run


@dataclasses.dataclass(frozen=True)
class Hook:
    """One function of vLLM.

    Attributes:
        module: where it is.
        name: in the module.
        takes: its parameters that are used.
        why: what for.
    """

    module: str
    name: str
    takes: tuple[str, ...]
    why: str

    def problem(self) -> str | None:
        """Say what is wrong with it in the vLLM that is installed."""
        where = f"{self.module}.{self.name}"
        try:
            function: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError):
            return f"{where} is missing"
        has = inspect.signature(function).parameters
        if missing := [name for name in self.takes if name not in has]:
            return f"{where} does not take {', '.join(missing)}"
        return None


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_REQUEST = "vllm.v1.request"
_RANKS = "vllm.distributed.parallel_state"
HOOKS = (
    Hook("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",), "arguments are set, or refused"),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        ("self", "usage_context", "model_config"),
        "a step has room for the longest prompt with images",
    ),
    Hook("vllm.config.scheduler", "SchedulerConfig.get_scheduler_cls", ("self",), "a child of its class is used"),
    Hook(_SCHEDULER, "Scheduler.add_request", ("self", "request"), "decides whether a request is pruned"),
    Hook(
        _SCHEDULER,
        "Scheduler._try_schedule_encoder_inputs",
        ("self", "request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget"),
        "holds a prompt until a step has it whole",
    ),
    Hook(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("self", "request"), "which blocks a prompt finds"),
    Hook(_SCHEDULER, "Scheduler._free_request", ("self", "request"), "its blocks may be taken over by an equal prompt"),
    Hook(_SCHEDULER, "Scheduler.schedule", ("self",), "workers learn which prompts are pruned"),
    Hook(_SCHEDULER, "Scheduler.make_stats", ("self",), "carries the counts of pruned and dense prompts"),
    Hook(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        ("self", "vllm_config", "client_count"),
        "adds the counts up for /metrics and the log",
    ),
    Hook("vllm.v1.core.encoder_cache_manager", "EncoderCacheManager.free", ("self", "request"), "a held prompt's"),
    Hook(_REQUEST, "Request.update_block_hashes", ("self",), "hashes of its own for a pruned prompt"),
    Hook(_REQUEST, "Request.get_num_encoder_embeds", ("self", "input_id"), "whether its images fit into a step"),
    Hook("vllm.model_executor.model_loader", "get_model_cls", ("model_config",), "the class whose map of names grows"),
    Hook("vllm.model_executor.models.utils", "WeightsMapper", ("orig_to_new_regex",), "by names of transformers 5"),
    Hook("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", ("self",), "the worker's settings are checked"),
    Hook(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.initialize_from_config",
        ("self", "kv_cache_configs"),
        "the decoder's layers are hooked",
    ),
    Hook(
        "vllm.v1.worker.utils",
        "AttentionGroup.build_metadata",
        ("self", "common_attn_metadata"),
        "layers after a removal get metadata of their own",
    ),
    Hook("vllm.v1.attention.backend", "CommonAttentionMetadata.replace", ("self",), "made of that of all layers"),
    Hook("vllm.forward_context", "get_forward_context", (), "and put where layers look for it"),
    Hook("vllm.config", "ModelConfig.get_total_num_kv_heads", ("self",), "whether ranks have copies of heads"),
    Hook(_RANKS, "get_tp_group", (), "the ranks that hold a layer's heads between them"),
    Hook(_RANKS, "GroupCoordinator.all_gather", ("self", "input_", "dim"), "scores are of all heads"),
    Hook(_RANKS, "GroupCoordinator.all_reduce", ("self", "input_"), "each rank sums a share of the rows"),
    Hook(_RANKS, "GroupCoordinator.broadcast", ("self", "input_", "src"), "all take the first rank's choice"),
)


def problems() -> list[str]:
    """List the hooks that this vLLM lacks, and how."""
    return [problem for hook in HOOKS if (problem := hook.problem()) is not None]
