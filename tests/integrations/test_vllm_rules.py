"""The vLLM plug-in without an engine: settings it makes, what it refuses by name, and what of vLLM it hooks."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm import EngineArgs
from vllm.v1.worker.worker_base import WorkerWrapperBase

from fitprune import PruningRecipe
from fitprune.baselines.table import BASELINES
from fitprune.integrations.vllm import plugin
from fitprune.integrations.vllm.configured import configured_recipe
from fitprune.integrations.vllm.hooks import HOOKS, Hook
from fitprune.integrations.vllm.pruner import Pruner
from fitprune.integrations.vllm.rules import require_supported
from helpers.served import OPTIONS

BETWEEN = "takes tokens away between layers"
REFUSED = {
    "random-input": ("random", BETWEEN), "pyramiddrop": ("last", BETWEEN), "divprune": ("max-min", BETWEEN),
    "cdpruner": ("dpp", BETWEEN), "dart": ("duplication", BETWEEN), "visionzip": ("cls", "reads the vision tower"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_methods_recipe_is_served_or_its_scorer_is_named(made, name, monkeypatch):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    monkeypatch.setenv("FITPRUNE_RECIPE", str(made / f"{name}.json"))
    recipe = configured_recipe(config)
    assert recipe.scorer["name"] == BASELINES[name].scorer
    if name not in REFUSED:
        require_supported(config, recipe)
        return
    scorer, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"scorer '{scorer}': .*{why}"):
        require_supported(config, recipe)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"name": "duplication"}, "scorer 'duplication': reads the layer before"),
        (
            {"name": "by-stage", "parameters": {"stages": {"3": {"name": "duplication"}}}},
            "scorer 'by-stage': reads the layer before",
        ),
        ({"name": "accumulated"}, "scorer 'accumulated': reads the attention of all layers"),
        ({"name": "cls"}, "scorer 'cls': reads the vision tower"),
        ({"name": "none"}, "scorer='none': must be one of"),
        ({"name": "random"}, "scorer 'random': missing parameter 'seed'"),
    ],
)
def test_a_scorer_that_cannot_work_is_named_before_the_first_request(made, scorer, message):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    recipe = dataclasses.replace(PruningRecipe.load(made / "60.json"), scorer=scorer)
    with pytest.raises(ValueError, match=message):
        require_supported(config, recipe)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill"),
        ({"long_prefill_token_threshold": 100}, "long_prefill_token_threshold=100"),
        ({"enforce_eager": False}, "enforce_eager"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"enable_lora": True}, "LoRA"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
    ],
)
def test_what_is_not_supported_is_named(made, options, named):
    config = EngineArgs(str(made / "model"), **{**OPTIONS, **options}).create_engine_config()
    with pytest.raises(ValueError, match="cannot prune in this vLLM engine") as caught:
        require_supported(config, PruningRecipe.load(made / "60.json"))
    assert named in str(caught.value)
    assert str(caught.value).count("\n- ") == 1


def test_what_is_no_recipe_is_named(made, monkeypatch):
    config = EngineArgs(str(made / "model"), **OPTIONS).create_engine_config()
    assert configured_recipe(config) is None
    monkeypatch.setenv("FITPRUNE_RECIPE", str(made / "none.json"))
    with pytest.raises(ValueError, match=r"FITPRUNE_RECIPE=.*none\.json: no such file or folder"):
        configured_recipe(config)
    monkeypatch.setenv("FITPRUNE_RECIPE", "llava-1.5-7b:60")
    with pytest.raises(
        ValueError, match=r"FITPRUNE_RECIPE=llava-1\.5-7b:60: recipe is of another model: layers 32 there"
    ):
        configured_recipe(config)
    monkeypatch.delenv("FITPRUNE_RECIPE")
    for elsewhere in ("s3://bucket/model", "org/na--me", "model.gguf"):
        monkeypatch.setattr(config.model_config, "model", elsewhere)
        assert configured_recipe(config) is None


class NormsBehind(torch.nn.Module):
    """A decoder layer as Exaone 4's, whose norms stand behind its attention and behind its MLP."""

    def __init__(self):
        super().__init__()
        self.post_attention_layernorm, self.post_feedforward_layernorm = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, positions, hidden_states, residual):
        return hidden_states, residual


@pytest.mark.parametrize(("layer", "named"), [(NormsBehind(), "post_feed"), (torch.nn.Linear(2, 2), "must take pos")])
def test_a_layer_of_another_form_is_named(layer, named):
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"))
    decoder = SimpleNamespace(layers=[layer], norm=None)
    model = SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=decoder))
    with pytest.raises(ValueError, match=f"layer 0, a .*{named}"):
        Pruner(SimpleNamespace(attn_groups=[[group]], get_model=lambda: model), None)


def test_a_prompt_in_several_steps_stays_dense():
    """Also if it is preempted, and its whole prompt comes at once when it goes on."""
    place = SimpleNamespace(offset=1, length=4, is_embed=None)
    features = [SimpleNamespace(modality="image", mm_position=place)]
    request = SimpleNamespace(mm_features=features, prompt_token_ids=[1, 3, 3, 3, 3, 5])
    other = SimpleNamespace(**vars(request))
    batch = SimpleNamespace(req_ids=["a", "b"], num_prompt_tokens=[6, 6])
    pruner = Pruner.__new__(Pruner)
    pruner._runner = SimpleNamespace(input_batch=batch, requests={"a": request, "b": other}, device=torch.device("cpu"))
    pruner._query_aware, pruner._quotas, pruner._norm = True, lambda image: image, None
    assert pruner._request(0, 4) is None
    assert pruner._request(0, 6) is None
    assert pruner._request(1, 6).prompt.quotas.tolist() == [[-1, 0, 0, 0, 0, -1]]
    assert pruner._request(1, 8).question.tolist() == [
        [False] * 5 + [True] + [False] * 2
    ]  # with two tokens of an answer


def test_another_attention_backend_is_named():
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "FLEX_ATTENTION"))
    with pytest.raises(ValueError, match="FLEX_ATTENTION: must be one of CPU_ATTN"):
        Pruner(SimpleNamespace(attn_groups=[[group]]), None)


