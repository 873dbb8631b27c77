"""The vLLM plug-in without an engine: settings it makes, what it refuses by name, and what of vLLM it hooks."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm import EngineArgs
from vllm.v1.worker.worker_base import WorkerWrapperBase

from fitprune import PruningRecipe
from fitprune.baselines.table import BASELINES
from fitprune.engine.choose import quotas_by
from fitprune.integrations.vllm import plugin
from fitprune.integrations.vllm.configured import configured_recipe
from fitprune.integrations.vllm.hooks import HOOKS, Hook
from fitprune.integrations.vllm.images import can_number, images_in
from fitprune.integrations.vllm.pruner import Pruner
from fitprune.integrations.vllm.ranks import TensorRanks
from fitprune.integrations.vllm.rules import require_supported
from fitprune.integrations.vllm.runners import PromptFacts, reader_of
from fitprune.integrations.vllm.scheduler import MARK
from helpers.served import OPTIONS

SETTLED = {**OPTIONS, "enforce_eager": True}
DRAFTS = {"num_speculative_tokens": 2, "prompt_lookup_max": 2}
BETWEEN = "takes tokens away between layers"
REFUSED = {
    "random-input": ("random", BETWEEN), "pyramiddrop": ("last", BETWEEN), "divprune": ("max-min", BETWEEN),
    "cdpruner": ("dpp", BETWEEN), "dart": ("duplication", BETWEEN), "visionzip": ("cls", "reads the vision tower"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_methods_recipe_is_served_or_its_scorer_is_named(digits, name, monkeypatch):
    config = EngineArgs(str(digits / "model"), **SETTLED).create_engine_config()
    monkeypatch.setenv("FITPRUNE_RECIPE", str(digits / f"{name}.json"))
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
def test_a_scorer_that_cannot_work_is_named_before_the_first_request(digits, scorer, message):
    config = EngineArgs(str(digits / "model"), **SETTLED).create_engine_config()
    recipe = dataclasses.replace(PruningRecipe.load(digits / "60.json"), scorer=scorer)
    with pytest.raises(ValueError, match=message):
        require_supported(config, recipe)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enforce_eager": False}, "enforce_eager"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram_gpu", **DRAFTS}}, "speculation by 'ngram_gpu'"),
        ({"speculative_config": {"method": "custom_class", "model": "a.b", **DRAFTS}}, "speculation by 'custom_class'"),
        ({"kv_offloading_size": 1}, "KV connector"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connector"),
        ({"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}}, "encoder connector"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"attention_backend": "FLEX_ATTENTION"}, "attention_backend=FLEX_ATTENTION: must be one of"),
        ({"model_impl": "transformers"}, "model_impl='transformers'"),
        ({"scheduler_cls": "builtins.dict"}, "scheduler_cls=builtins.dict: must be a child"),
        ({"mm_encoder_only": True}, "mm_encoder_only"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate=0.5"),
        ({"runner": "pooling"}, "runner_type='pooling'"),
    ],
)
def test_what_is_not_supported_is_named(digits, options, named):
    config = EngineArgs(str(digits / "model"), **{**SETTLED, **options}).create_engine_config()
    with pytest.raises(ValueError, match="cannot prune in this vLLM engine") as caught:
        require_supported(config, PruningRecipe.load(digits / "60.json"))
    assert named in str(caught.value)
    assert str(caught.value).count("\n- ") == 1


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("speculative_config", SimpleNamespace(method="eagle3"), "speculation by 'eagle3'"),
        ("aux_output_config", SimpleNamespace(enable_return_routed_experts=True), "enable_return_routed_experts"),
        ("parallel_config.use_ubatching", True, "dual batch overlap"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
    ],
)
def test_what_this_machine_does_not_start_is_named(digits, place, value, named):
    """Settings that vLLM refuses or drops on a CPU, or with this model."""
    config = EngineArgs(str(digits / "model"), **SETTLED).create_engine_config()
    *parts, name = place.split(".")
    whole = functools.reduce(getattr, parts, config)
    mocked = SimpleNamespace(**{each: getattr(whole, each) for each in dir(whole) if not each.startswith("_")})
    setattr(mocked, name, value)
    if parts:
        mocked = SimpleNamespace(**{**vars(config), parts[0]: mocked})
    with pytest.raises(ValueError, match=named):
        require_supported(mocked, PruningRecipe.load(digits / "60.json"))


def test_a_decoder_with_windows_is_named(digits, tmp_path):
    """Where the config says it, before any worker starts."""
    shutil.copytree(digits / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 64, "architectures": ["MistralForCausalLM"]}
    file.write_text(json.dumps(config))
    config = EngineArgs(str(tmp_path / "model"), **SETTLED).create_engine_config()
    with pytest.raises(ValueError, match="layers with sliding windows"):
        require_supported(config, PruningRecipe.load(digits / "60.json"))


def test_what_is_no_recipe_is_named(digits, monkeypatch):
    config = EngineArgs(str(digits / "model"), **SETTLED).create_engine_config()
    assert configured_recipe(config) is None
    monkeypatch.setenv("FITPRUNE_RECIPE", str(digits / "none.json"))
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
def test_a_layer_of_another_form_is_named(layer, named, monkeypatch):
    monkeypatch.setattr(TensorRanks, "of", lambda config: None)
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"))
    decoder = SimpleNamespace(layers=[layer], norm=None)
    model = SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=decoder))
    with pytest.raises(ValueError, match=f"layer 0, a .*{named}"):
        Pruner(SimpleNamespace(attn_groups=[[group]], get_model=lambda: model, vllm_config=None), None)


def test_what_is_neither_an_image_nor_frames_is_not_numbered():
    """Audio; videos of a family without a rule for them; and videos whose grid vLLM does not pass on."""
    place = SimpleNamespace(offset=1, length=5, is_embed=torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool))
    audio, video = (SimpleNamespace(modality=each, mm_position=place, data=None) for each in ("audio", "video"))
    of_runs, of_grids = tf.Qwen3VLConfig(), tf.Qwen2_5_VLConfig()
    assert not can_number([audio], of_runs)
    assert not can_number([video], tf.LlavaConfig())
    assert not can_number([video], of_grids)
    assert can_number([video], of_runs)
    assert images_in([video], 7, of_runs).tolist() == [[-1, 0, 0, -1, 1, 1, -1]]
    video.data = {"video_grid_thw": SimpleNamespace(data=torch.tensor([2, 2, 4]))}
    assert can_number([video], of_grids)
    assert images_in([video], 7, of_grids).tolist() == [[-1, 0, 0, -1, 1, 1, -1]]


def test_a_prompt_that_comes_in_part_stays_dense():
    """The scheduler never lets it; also if it is preempted, and its whole prompt comes at once when it goes on."""
    place = SimpleNamespace(offset=1, length=4, is_embed=None)

    def request():
        feature = SimpleNamespace(modality="image", mm_position=place, **{MARK: True})
        return PromptFacts(6, [feature], lambda: torch.tensor([1, 3, 3, 3, 3, 5]))

    rows = [request(), request()]
    pruner = Pruner.__new__(Pruner)
    pruner._reader = SimpleNamespace(prompt=lambda row, common: rows[row])
    pruner._runner = SimpleNamespace(device=torch.device("cpu"), model_config=SimpleNamespace(hf_config=None))
    pruner._query_aware, pruner._quotas, pruner._norm = True, lambda image: image, None
    pruner._nothing = [0]
    assert pruner._request(0, 0, 4, None) is None
    assert pruner._request(0, 0, 6, None) is None
    assert pruner._request(1, 0, 6, None).prompt.quotas.tolist() == [[-1, 0, 0, 0, 0, -1]]
    begun = [False] * 5 + [True] + [False] * 2  # with two tokens of an answer
    assert pruner._request(1, 0, 8, None).question.tolist() == [begun]
    assert pruner._request(1, 1, 6, None).kept.tolist() == [1, 2, 3, 4, 5]  # its first token is in the cache


def test_what_a_prompt_has_lost_that_takes_blocks_over_follows_from_its_recipe():
    """At a step behind its images; those of an answer, and of text before an image, say nothing."""
    places = [SimpleNamespace(offset=offset, length=length, is_embed=None) for offset, length in ((2, 4), (7, 8))]
    features = [SimpleNamespace(modality="image", mm_position=place, **{MARK: True}) for place in places]
    pruner = Pruner.__new__(Pruner)
    pruner._reader = SimpleNamespace(
        prompt=lambda row, common: PromptFacts(20, features, None),
        name=lambda row, common: "abc"[row],
        holds=lambda name: name != "a",
    )
    pruner._runner = SimpleNamespace(model_config=SimpleNamespace(hf_config=None))
    keep = (1.0, 0.5, 0.5, 0.25)
    pruner._removing, pruner._lost = (1, 3), {}
    pruner._quotas = quotas_by(SimpleNamespace(keep=keep, entering=(1.0, 1.0, 0.5, 0.5)))
    for row, computed, length in ((0, 16, 20), (1, 18, 20), (2, 20, 23), (2, 0, 2)):
        assert pruner._request(row, computed, length, None) is None
    assert pruner._lost == {"b": (2, [0, 6, 9])}


def test_another_attention_backend_is_named():
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "FLEX_ATTENTION"))
    with pytest.raises(ValueError, match="FLEX_ATTENTION: must be one of CPU_ATTN"):
        Pruner(SimpleNamespace(attn_groups=[[group]]), None)


def test_a_model_runner_of_another_kind_is_named():
    with pytest.raises(ValueError, match="model runner object of builtins: must be GPUModelRunner"):
        reader_of(object())


def test_what_is_left_at_its_default_is_set(digits, monkeypatch):
    """And nothing without a recipe."""
    monkeypatch.setenv("FITPRUNE_RECIPE", str(digits / "60.json"))
    config = EngineArgs(str(digits / "model"), **OPTIONS).create_engine_config()
    scheduler = config.scheduler_config
    assert config.model_config.enforce_eager
    assert scheduler.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert scheduler.max_num_batched_tokens == config.model_config.max_model_len + scheduler.max_num_seqs
    assert scheduler.get_scheduler_cls().__name__.startswith("Pruning")
    config = EngineArgs(str(digits / "model"), max_num_batched_tokens=400, **OPTIONS).create_engine_config()
    assert config.scheduler_config.max_num_batched_tokens == 400
    monkeypatch.delenv("FITPRUNE_RECIPE")
    assert not EngineArgs(str(digits / "model"), **OPTIONS).create_engine_config().model_config.enforce_eager


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_what_is_hooked_is_there(hook):
    assert hook.problem() is None


def test_a_vllm_that_lacks_what_is_hooked_is_named(monkeypatch):
    takes_less = Hook("vllm.forward_context", "get_forward_context", ("other",), "")
    gone = Hook("vllm.v1.request", "Request.other", (), "")
    monkeypatch.setattr("fitprune.integrations.vllm.hooks.HOOKS", (*HOOKS, takes_less, gone))
    monkeypatch.setattr(WorkerWrapperBase, "init_device", lambda self: None)  # as where nothing is hooked yet
    plugin.install()  # no recipe is named: vLLM serves dense
    assert not hasattr(WorkerWrapperBase.init_device, "__wrapped__")
    monkeypatch.setenv("FITPRUNE_RECIPE", "llava-1.5-7b:60")
    with pytest.raises(ValueError, match="lacks what it hooks") as caught:
        plugin.install()
    assert str(caught.value).splitlines()[1:] == [
        "- vllm.forward_context.get_forward_context does not take other",
        "- vllm.v1.request.Request.other is missing",
    ]
