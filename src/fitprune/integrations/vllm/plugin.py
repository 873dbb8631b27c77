"""The plug-in: has the engine's arguments set, its scheduler hold prompts whole, and each worker prune, by a recipe."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from fitprune.integrations.vllm.checkpoint import accept_newer_names
from fitprune.integrations.vllm.configured import configured_recipe, recipe_for
from fitprune.integrations.vllm.hooks import VERSIONS, problems
from fitprune.integrations.vllm.metrics import PruningStatLogger, receive
from fitprune.integrations.vllm.pruner import Pruner
from fitprune.integrations.vllm.rules import require_supported
from fitprune.integrations.vllm.runners import reader_of
from fitprune.integrations.vllm.scheduler import REASONS, pruning
from fitprune.integrations.vllm.settings import announce, make_room, set_arguments
from fitprune.recipes.find import RECIPE_VARIABLE

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def install() -> None:
    """Have engines and workers of this process prune, if a recipe is configured for the model that they load.

    Raises:
        ValueError: the environment names a recipe, and this vLLM lacks what is hooked.
    """
    from vllm.config.scheduler import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase.init_device, "__wrapped__"):
        return
    if lacks := problems():
        import vllm

        message = (
            f"fitprune cannot prune in vLLM {vllm.__version__}, which lacks what it hooks; install one of "
            f"{', '.join(VERSIONS)}:\n- " + "\n- ".join(lacks)
        )
        if os.environ.get(RECIPE_VARIABLE):
            raise ValueError(message)
        logger.warning(message)
        return
    _wrap(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", _with_room)
    _wrap(EngineArgs, "create_engine_config", _with_arguments)
    _wrap(SchedulerConfig, "get_scheduler_cls", lambda chosen, self: pruning(chosen(self)))
    _wrap(StatLoggerManager, "__init__", _with_counters)
    receive()
    _wrap(WorkerWrapperBase, "init_device", _checked)
    _wrap(WorkerWrapperBase, "initialize_from_config", _hooked)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around`, which takes the method first."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(owner, name, wrapper)


def _with_room(set_defaults: Any, self: Any, usage_context: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
    is_default = self.max_num_batched_tokens is None
    set_defaults(self, usage_context, model_config, *args, **kwargs)
    if is_default and recipe_for(self.model, self.revision) is not None:
        make_room(self, model_config.max_model_len)


def _with_arguments(create: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if recipe_for(self.model, self.revision) is not None:
        set_arguments(self)
    config = create(self, *args, **kwargs)
    if (recipe := configured_recipe(config)) is not None:
        require_supported(config, recipe)
        announce(recipe, os.environ.get(RECIPE_VARIABLE) or f"the recipe beside {self.model}")
    return config


def _with_counters(begin: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    begin(self, vllm_config, *args, **kwargs)
    if configured_recipe(vllm_config) is not None:
        speaks = kwargs.get("client_count", 1) == 1
        self.stat_loggers.append(PruningStatLogger(vllm_config, self.engine_indexes, REASONS, speaks))


def _checked(init_device: Any, self: Any) -> Any:
    recipe = configured_recipe(self.vllm_config)
    if recipe is not None:
        require_supported(self.vllm_config, recipe)
        accept_newer_names(self.vllm_config.model_config)
    result = init_device(self)
    if recipe is not None:
        reader_of(self.worker.model_runner)
    self.fitprune_recipe = recipe
    return result


def _hooked(initialize_from_config: Any, self: Any, kv_cache_configs: list[Any]) -> Any:
    result = initialize_from_config(self, kv_cache_configs)
    if self.fitprune_recipe is not None:
        Pruner(self.worker.model_runner, self.fitprune_recipe)
    return result
