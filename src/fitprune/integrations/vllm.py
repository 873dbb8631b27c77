"""Serve a recipe in vLLM: visual tokens leave inside the LLM's prefill, as they do under `prune`.

A vLLM plugin (entry point `vllm.general_plugins`). Where a recipe is configured it hooks the decoder's layers in each
worker once the model is loaded; nothing of vLLM is replaced. vLLM runs the tokens of all requests of a step as one list
of rows, and looks up each layer's attention metadata by the layer's name. So a row that leaves is left out of the list,
and the layers behind get metadata of their own, made by vLLM's own builder, for fewer tokens: their keys fill the first
slots of the request's blocks. How many tokens a request lost stands in a table by its first block, which is the
request's alone as long as it lives: written in its prefill, read in its decoding, in tensor operations.

docs/vllm.md says what is supported. What is not is refused when the engine starts.

Words: a stage is a run of layers that the same rows enter; stage 0 is the dense one. T rows of a step, R its requests.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from vllm.logger import init_logger

from fitprune.costs.sizes import ModelFingerprint
from fitprune.engine.choose import choose_by, quotas_by
from fitprune.families.config import fingerprint_of
from fitprune.recipes.find import fitted_to
from fitprune.recipes.recipe import PruningRecipe, short
from fitprune.scoring.received import Attention, text_after
from fitprune.scoring.scorers import get_scorer
from fitprune.scoring.softmax import Softmax
from fitprune.scoring.view import LayerView, Prompt

RECIPE_VARIABLE = "FITPRUNE_RECIPE"
NORMS = (("input_layernorm", "post_attention_layernorm"), ("attention_norm", "ffn_norm"))  # what layers call their two
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def install() -> None:
    """Have workers of this process prune, if a recipe is configured for the model that they load."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase.init_device, "__wrapped__"):
        return

    init_device, initialize_from_config = WorkerWrapperBase.init_device, WorkerWrapperBase.initialize_from_config

    @functools.wraps(init_device)
    def checked(self: Any) -> Any:
        recipe = configured_recipe(self.vllm_config)
        if recipe is not None:
            require_supported(self.vllm_config, recipe)
        result = init_device(self)
        if recipe is not None:
            _require_runner(self.worker.model_runner)
        self.fitprune_recipe = recipe
        return result

    @functools.wraps(initialize_from_config)
    def hooked(self: Any, kv_cache_configs: list[Any]) -> Any:
        result = initialize_from_config(self, kv_cache_configs)
        if self.fitprune_recipe is not None:
            Pruner(self.worker.model_runner, self.fitprune_recipe)
        return result

    WorkerWrapperBase.init_device, WorkerWrapperBase.initialize_from_config = checked, hooked


def configured_recipe(vllm_config: Any) -> PruningRecipe | None:
    """Find the recipe of the environment, or the one beside the model.

    Returns:
        None where the variable is unset and no recipe is beside the model.

    Raises:
        OSError: the file beside the model cannot be read.
        ValueError: nothing has the variable's name, or it is no recipe, or one of another model.
    """
    if name := os.environ.get(RECIPE_VARIABLE):
        try:
            return fitted_to(PruningRecipe.named(name), _shape(vllm_config), force=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{RECIPE_VARIABLE}={name}: {error}\nUnset {RECIPE_VARIABLE} to serve dense.") from error
    place, revision = vllm_config.model_config.model, vllm_config.model_config.revision
    folder = os.path.isdir(place)
    try:
        recipe = PruningRecipe.from_pretrained(place, revision=None if folder else revision)
    except FileNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        if folder:
            raise
        logger.info("fitprune: could not look for a recipe beside %s, which runs dense: %s", place, error)
        return None
    return fitted_to(recipe, _shape(vllm_config), force=False)


def _shape(vllm_config: Any) -> ModelFingerprint:
    return fingerprint_of(vllm_config.model_config.hf_config)


def require_supported(vllm_config: Any, recipe: PruningRecipe) -> None:
    """Refuse settings under which pruned results would be wrong.

    Raises:
        ValueError: names every such setting, and how to change it.
    """
    model, cache, scheduler = vllm_config.model_config, vllm_config.cache_config, vllm_config.scheduler_config
    parallel, scorer = vllm_config.parallel_config, get_scorer(recipe.scorer)
    name, decoder = short(recipe.scorer["name"]), _shape(vllm_config).decoder
    wrong = {
        "enable_chunked_prefill=True: a prompt must be prefilled in one step; pass --no-enable-chunked-prefill": (
            scheduler.enable_chunked_prefill
        ),
        f"long_prefill_token_threshold={scheduler.long_prefill_token_threshold}: splits longer prompts; leave it out": (
            0 < scheduler.long_prefill_token_threshold < model.max_model_len
        ),
        "enable_prefix_caching=True: what is cached depends on the question; pass --no-enable-prefix-caching": (
            cache.enable_prefix_caching
        ),
        "enforce_eager=False: compiled graphs have fixed rows; pass --enforce-eager": not model.enforce_eager,
        "Model Runner V2: is not supported yet; set VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        f"tensor_parallel_size={parallel.tensor_parallel_size}: scores need all heads; use 1, and --data-parallel-size "
        "for more devices": parallel.tensor_parallel_size > 1,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}: rows leave between stages; use 1": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism: splits a request's keys; leave it out": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "dual batch overlap: splits a step's rows; leave out --enable-dbo": bool(parallel.use_ubatching),
        "speculative decoding: drafts are made from dense states; leave out --speculative-config": (
            vllm_config.speculative_config is not None
        ),
        "LoRA: its kernels count the dense rows; merge the adapter into the weights": (
            vllm_config.lora_config is not None
        ),
        "a KV connector: moves dense caches; leave out --kv-transfer-config": (
            vllm_config.kv_transfer_config is not None
        ),
        f"runner_type={model.runner_type!r}: must be 'generate'": model.runner_type != "generate",
        "this decoder has layers without softmax attention, which keep a state of all rows": bool(
            decoder.linear_layers
        ),
        "this decoder's image tokens see later ones, which vLLM's attention masks by their dense position": (
            decoder.bidirectional
        ),
        f"scorer {name}: its recipe takes tokens away between layers (enter); vLLM's plugin lets them leave inside "
        "layers alone": bool(recipe.enter),
        f"scorer {name}: reads the vision tower's attention, which vLLM does not give": scorer.reads_vision,
        f"scorer {name}: reads the attention of all layers, also of those that remove nothing": scorer.accumulates,
        f"scorer {name}: reads the layer before, which no token may leave before in vLLM": scorer.reads_previous,
        f"recipe removes tokens at layers {recipe.removing}, of which this family lets tokens leave "
        f"{list(decoder.prunable)} alone; fit a recipe from this model's statistics": (
            not set(recipe.removing) <= set(decoder.prunable)
        ),
    }
    if found := [what for what, holds in wrong.items() if holds]:
        raise ValueError(
            "fitprune cannot prune in this vLLM engine (VLLM_PLUGINS=none runs it dense):\n- " + "\n- ".join(found)
        )


def _require_runner(runner: Any) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not isinstance(runner, GPUModelRunner):
        raise ValueError(
            f"fitprune cannot prune in this vLLM engine:\n- model runner {type(runner).__qualname__} of "
            f"{type(runner).__module__}: must be GPUModelRunner of vllm.v1.worker.gpu_model_runner, or a child of it"
        )


@dataclasses.dataclass
class _Layer:
    """One decoder layer of vLLM's.

    Attributes:
        module: the layer.
        norm: the norm behind its attention, whose two results, hidden states and residual, go into and around the MLP.
        attention: its vLLM attention.
        takes: names of the module's arguments.
    """

    module: Any
    norm: Any
    attention: Any
    takes: tuple[str, ...]

    @classmethod
    def of(cls, number: int, module: Any) -> _Layer:
        from vllm.model_executor.layers.attention import Attention as VllmAttention

        where = f"layer {number}, a {type(module).__name__}"
        takes = tuple(inspect.signature(module.forward).parameters)
        if takes[:3] != ("positions", "hidden_states", "residual"):
            raise ValueError(f"{where}: takes {takes}; must take positions, hidden_states, residual")
        norms = tuple(name for name, _ in module.named_children() if "norm" in name)
        if norms not in NORMS:
            raise ValueError(f"{where}: has norms {norms}; must have one before its attention and one before its MLP")
        inside = [child for child in module.modules() if isinstance(child, VllmAttention)]
        if len(inside) != 1:
            raise ValueError(f"{where}: has {len(inside)} attentions; must have one")
        impl = inside[0].impl
        if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
            raise ValueError(f"{where}: looks back {impl.sliding_window} tokens; must see all")
        if getattr(impl, "alibi_slopes", None) is not None or inside[0].kv_sharing_target_layer_name is not None:
            raise ValueError(f"{where}: has ALiBi or another layer's keys; must have rotary positions and its own")
        return cls(module, getattr(module, norms[1]), inside[0], takes)

    def softmax(self) -> Softmax:
        impl = self.attention.impl
        softcap = getattr(impl, "logits_soft_cap", None) or None  # backends say "none" by 0
        return Softmax(float(impl.scale), softcap=softcap, sinks=getattr(impl, "sinks", None))


@dataclasses.dataclass
class _Request:
    """A request whose prompt with images is prefilled in this step.

    Attributes:
        row: its number in the step's batch.
        prompt: as scorers see it.
        question: [1, Q] bool.
        kept: [m] int64, its rows that are present, numbered from its first.
    """

    row: int
    prompt: Prompt
    question: torch.Tensor
    kept: torch.Tensor


@dataclasses.dataclass
class _Step:
    """One forward of the model.

    Attributes:
        common: attention metadata of stage 0, as vLLM's builder takes it.
        context: vLLM's forward context.
        lengths: of each request, the rows that are present.
        pruned: requests that lose tokens in this step.
        first: [R] int64, first block of each request.
        rows: [T'] int64, the dense rows that are present; None for all.
        total: how many dense rows there are.
        hidden: [T', d], input of the present layer, where tokens may leave.
        states: query, key and value of the present layer, [T', heads * D] each, where tokens may leave.
        places: of all stages, keys of each request and slots of the step's; where no row leaves.
    """

    common: Any
    context: Any
    lengths: list[int]
    pruned: list[_Request]
    first: torch.Tensor
    total: int
    rows: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None


class Pruner:
    """Hooks on a vLLM model runner's decoder, by which a recipe's tokens leave.

    Args:
        runner: vLLM's GPUModelRunner or CPUModelRunner, with its KV cache.
        recipe: one fitted to its model.

    Raises:
        ValueError: the attention backend or the decoder's layers are not supported.
    """

    def __init__(self, runner: Any, recipe: PruningRecipe) -> None:
        groups = [group for groups in runner.attn_groups for group in groups]
        if len(groups) != 1:
            raise ValueError(f"fitprune: the model has {len(groups)} kinds of attention; must have one")
        (group,) = groups
        if (backend := group.backend.get_name()) not in BACKENDS:
            raise ValueError(f"fitprune: attention backend {backend}: must be one of {', '.join(BACKENDS)}")
        decoder = runner.get_model().get_language_model().model
        self._runner, self._norm = runner, decoder.norm
        self._layers = [_Layer.of(number, layer) for number, layer in enumerate(decoder.layers)]
        scorer = get_scorer(recipe.scorer)
        self._quotas, self._choose, self._query_aware = quotas_by(recipe), choose_by(scorer), scorer.query_aware
        self._removing = recipe.removing
        # Tokens that a request has lost before each stage, by the request's first block.
        table, (kind,) = runner.input_batch.block_table[0], runner.kv_cache_config.kv_cache_groups
        self._block_size = table.block_size
        blocks = runner.kv_cache_config.num_blocks * max(kind.kv_cache_spec.block_size // table.block_size, 1)
        self._lost = torch.zeros(blocks + 1, len(self._removing) + 1, dtype=torch.int32, device=runner.device)
        self._any_lost = False
        self._common: Any = None
        self._step: _Step | None = None
        self._build = group.build_metadata
        group.build_metadata = self._watched
        self._hook()
        logger.info("fitprune: visual tokens leave at layers %s of %d", self._removing, len(self._layers))

    def _watched(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        """Build vLLM's metadata as ever, and remember of what."""
        self._common = common
        return self._build(common, *args, **kwargs)

    def _hook(self) -> None:
        for number, layer in enumerate(self._layers):
            enter = functools.partial(self._enter, number)
            layer.module.register_forward_pre_hook(enter, with_kwargs=True)
        for stage, number in enumerate(self._removing):
            layer = self._layers[number]
            layer.attention.register_forward_pre_hook(self._see, with_kwargs=True)
            layer.norm.register_forward_hook(functools.partial(self._leave, number, stage + 1))
        self._layers[-1].module.register_forward_hook(self._end)

    def _begin(self, hidden: torch.Tensor) -> _Step | None:
        from vllm.forward_context import get_forward_context

        context, common, self._common = get_forward_context(), self._common, None
        if not context.attn_metadata or common is None:  # vLLM measures its memory
            return None
        if common.num_actual_tokens != len(hidden):
            raise RuntimeError(f"fitprune: {len(hidden)} rows for {common.num_actual_tokens} tokens: vLLM pads them")
        lengths = common.query_start_loc_cpu.diff().tolist()
        whole = common.seq_lens_cpu_upper_bound.tolist()
        first = common.block_table_tensor[:, 0].long()
        begun = [row for row, length in enumerate(lengths) if length == whole[row]]
        pruned = [found for row in begun if (found := self._request(row, lengths[row])) is not None]
        if begun and self._any_lost:
            self._lost[first[begun]] = 0  # of whoever had the block before
        self._any_lost |= bool(pruned)
        return _Step(common, context, lengths, pruned, first, len(hidden)) if self._any_lost else None

    def _request(self, row: int, length: int) -> _Request | None:
        """Look at a request that begins; None if it loses no tokens."""
        batch = self._runner.input_batch
        request, prompt_length = self._runner.requests[batch.req_ids[row]], int(batch.num_prompt_tokens[row])
        features = sorted(request.mm_features, key=lambda feature: feature.mm_position.offset)
        if not features or request.prompt_token_ids is None:
            return None
        if any(feature.modality != "image" for feature in features):
            logger.warning_once("fitprune: a request with more than images and text runs dense")
            return None
        if length < prompt_length or hasattr(request, "fitprune_dense"):
            request.fitprune_dense = True  # also if it is preempted and then prefilled whole
            logger.warning_once("fitprune: a prompt whose images come in several steps runs dense; see docs/vllm.md")
            return None
        image = torch.full((1, length), -1)
        for number, feature in enumerate(features):
            place = feature.mm_position
            span = image[0, place.offset : place.offset + place.length]
            span[slice(None) if place.is_embed is None else place.is_embed] = number
        valid = (torch.arange(length) < prompt_length)[None]  # after a preemption, an answer's first part follows
        question = text_after(image >= 0, valid)
        if not question.any():  # its last token, whose logits are asked for, might leave
            logger.warning_once("fitprune: a prompt without text after its last image runs dense")
            return None
        if not self._query_aware:
            question = torch.zeros_like(question)
        ids = torch.zeros_like(image)
        ids[0, :prompt_length] = torch.tensor(request.prompt_token_ids)
        device = self._runner.device
        image, question, valid = image.to(device), question.to(device), valid.to(device)
        prompt = Prompt(ids, valid, _no_vision, image, self._norm, self._quotas(image))
        return _Request(row, prompt, question, torch.arange(length, device=device))

    def _enter(self, number: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Give a layer its rows' positions and metadata."""
        given = {**dict(zip(self._layers[number].takes, args, strict=False)), **kwargs}
        hidden, residual = given["hidden_states"], given["residual"]
        if number == 0:
            self._step = self._begin(hidden)
        step = self._step
        if step is None:
            return None
        if number - 1 in self._removing:
            self._enter_stage(step, self._removing.index(number - 1) + 1)
        if step.pruned and number in self._removing:
            step.hidden = hidden if residual is None else hidden + residual
        if step.rows is None:
            return None
        return (), {**given, "positions": given["positions"][..., step.rows]}

    def _enter_stage(self, step: _Step, stage: int) -> None:
        """Make the metadata of the layers behind one that removes, up to the next."""
        common = step.common
        if step.pruned:
            starts = torch.tensor([0, *itertools.accumulate(step.lengths)], dtype=common.query_start_loc_cpu.dtype)
            common = common.replace(
                query_start_loc=starts.to(common.query_start_loc.device),
                query_start_loc_cpu=starts,
                num_actual_tokens=sum(step.lengths),
                max_query_len=max(step.lengths),
                positions=None if common.positions is None or step.rows is None else common.positions[step.rows],
            )
            held, slots = (part[0] for part in self._places(common, self._lost[step.first, stage][None]))
        else:  # no row leaves in this step: all stages at once
            if step.places is None:
                step.places = self._places(common, self._lost[step.first].T.contiguous())
            held, slots = (part[stage] for part in step.places)
        metadata = self._build(
            common.replace(
                seq_lens=held,
                slot_mapping=slots,
                _num_computed_tokens_cache=None,
                _token_to_req_indices_cache=None,
            )
        )
        behind = self._removing[stage] + 1 if stage < len(self._removing) else len(self._layers)
        for layer in self._layers[self._removing[stage - 1] + 1 : behind]:
            step.context.attn_metadata[layer.attention.layer_name] = metadata
            step.context.slot_mapping[layer.attention.layer_name] = slots

    def _places(self, common: Any, lost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell for S stages, by tokens lost [S, R], the keys of each request [S, R] and the step's slots [S, T]."""
        begin, count = common.query_start_loc, common.num_actual_tokens
        lengths, held = begin.diff(), common.seq_lens - lost
        owner = torch.arange(len(lengths), device=begin.device).repeat_interleave(lengths, output_size=count)
        place = torch.arange(count, device=begin.device) + (held - lengths - begin[:-1])[:, owner]
        block = common.block_table_tensor[owner, place // self._block_size].long()
        return held, block * self._block_size + place % self._block_size

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        """Keep queries, keys and values of a layer where tokens may leave."""
        if self._step is not None and self._step.pruned:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            self._step.states = tuple(given[name] for name in ("query", "key", "value"))

    def _leave(self, number: int, stage: int, module: Any, args: Any, output: Any) -> Any:
        """Let tokens leave behind a layer's attention."""
        step = self._step
        if step is None or not step.pruned:
            return None
        stays = torch.ones(len(output[0]), dtype=torch.bool, device=step.first.device)
        starts = [0, *itertools.accumulate(step.lengths)]
        for request in step.pruned:
            rows = slice(starts[request.row], starts[request.row + 1])
            chosen = self._choose(self._view(step, number, request, rows))
            if chosen is None:
                continue
            stays[rows] = chosen[0]
            request.kept = request.kept[chosen[0]]
            lost = step.lengths[request.row] - len(request.kept)
            step.lengths[request.row] = len(request.kept)
            self._lost[step.first[request.row], stage:] += lost
        step.hidden = step.states = None
        index = torch.nonzero(stays)[:, 0]
        if len(index) == len(stays):
            return None
        step.rows = index if step.rows is None else step.rows[index]
        return tuple(part[index] for part in output)

    def _view(self, step: _Step, number: int, request: _Request, rows: slice) -> LayerView:
        assert step.hidden is not None
        assert step.states is not None
        attention = self._layers[number].attention
        shape = 1, len(request.kept), -1, attention.head_size
        query, key, value = (part[rows].view(shape).transpose(1, 2) for part in step.states)
        return LayerView(
            layer=number,
            before=False,
            image=request.prompt.images[:, request.kept],
            question=request.question[:, request.kept],
            column=request.kept[None],
            hidden=step.hidden[None, rows],
            prompt=request.prompt,
            attention=lambda: Attention(query, key, value, self._layers[number].softmax()),
        )

    def _end(self, module: Any, args: Any, output: Any) -> Any:
        """Put rows back where vLLM's sampler looks for them; zero where a token left."""
        step, self._step = self._step, None
        if step is None or step.rows is None:
            return None
        return tuple(part.new_zeros(step.total, part.shape[1]).index_copy_(0, step.rows, part) for part in output)


def _no_vision() -> torch.Tensor:
    raise ValueError("vLLM does not give the attention of the vision tower")
