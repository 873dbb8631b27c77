"""Bridges to other programs, lmms-eval and vLLM, of which nothing is imported until they ask for it."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """Say where lmms-eval finds its model "fitprune"; the entry point `lmms_eval.models` calls this.

    lmms-eval loads every entry point on every start, and the model's own file imports torch: so this is apart from it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fitprune", chat_class_path="fitprune.integrations.lmms_eval.FitPrune")


def vllm_plugin() -> None:
    """Have vLLM prune by the recipe that is configured; the entry point `vllm.general_plugins` calls this.

    vLLM calls it in every process.
    """
    from fitprune.integrations.vllm.plugin import install

    install()
