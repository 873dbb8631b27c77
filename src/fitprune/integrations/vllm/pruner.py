"""Hooks on vLLM's decoder, by which a recipe's tokens leave.

Legend: T rows of a step, T' those that are present, R requests of the step, S stages, m rows of a request.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.logger import init_logger

from fitprune.engine.choose import choose_by, quotas_by
from fitprune.integrations.vllm.cached_keys import CachedKeys, are_readable
from fitprune.integrations.vllm.images import images_in
from fitprune.integrations.vllm.layers import Layer, Request, Step
from fitprune.integrations.vllm.ranks import TensorRanks
from fitprune.integrations.vllm.rules import BACKENDS
from fitprune.integrations.vllm.runners import reader_of
from fitprune.integrations.vllm.scheduler import MARK
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.received import Attention, text_after
from fitprune.scoring.scorers import get_scorer
from fitprune.scoring.view import LayerView, Prompt

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


class Pruner:
    """Hooks on a vLLM model runner's decoder, by which a recipe's tokens leave.

    Args:
        runner: vLLM's model runner, the first or the second, with its KV cache.
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
        self._runner, self._norm, self._ranks = runner, decoder.norm, TensorRanks.of(runner.vllm_config)
        self._layers = [Layer.of(number, layer) for number, layer in enumerate(decoder.layers)]
        scorer = get_scorer(recipe.scorer)
        self._quotas, self._choose, self._query_aware = quotas_by(recipe), choose_by(scorer), scorer.query_aware
        self._removing = recipe.removing
        self._reader = reader_of(runner)
        self._block_size = self._reader.block_size
        readable = are_readable(runner.vllm_config) and self._removing
        self._cached_keys = CachedKeys(self._layers[0].attention) if readable else None
        # By a request's id: where its first image is, and how many tokens it has lost before each stage.
        self._lost: dict[str, tuple[int, list[int]]] = {}
        self._nothing = [0] * (len(self._removing) + 1)
        self._common: Any = None
        self._step: Step | None = None
        self._build = group.build_metadata
        group.build_metadata = self._watched
        self._hook()
        logger.info("fitprune: visual tokens leave at layers %s of %d", self._removing, len(self._layers))

    def _watched(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        """Build vLLM's metadata as before, and keep what it was built of."""
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

    def _begin(self, hidden: torch.Tensor) -> Step | None:
        from vllm.forward_context import get_forward_context

        context, common, self._common = get_forward_context(), self._common, None
        if not context.attn_metadata or common is None:  # vLLM measures its memory
            return None
        if common.num_actual_tokens != len(hidden):
            raise RuntimeError(f"fitprune: {len(hidden)} rows for {common.num_actual_tokens} tokens: vLLM pads them")
        lengths = common.query_start_loc_cpu.diff().tolist()
        whole = common.seq_lens_cpu_upper_bound.tolist()
        pruned, lost = [], []
        for row, length in enumerate(lengths):
            name, computed = self._reader.name(row, common), whole[row] - length
            if name in self._lost and computed <= self._lost[name][0]:
                del self._lost[name]  # it was preempted, and begins again
            # One row is no image with its question.
            if length > 1 and (request := self._request(row, computed, whole[row], common)) is not None:
                pruned.append(request)
                self._remember(name, request.first, request.lost)
            lost.append(self._lost[name][1] if name in self._lost else self._nothing)
        if not any(each is not self._nothing for each in lost):
            return None
        return Step(common, context, lengths, pruned, lost, len(hidden))

    def _remember(self, name: str, first: int, lost: list[int]) -> None:
        self._lost = {each: self._lost[each] for each in self._lost if self._reader.holds(each)}
        self._lost[name] = first, lost

    def _request(self, row: int, computed: int, length: int, common: Any) -> Request | None:
        """Look at a request whose step ends after `length` tokens; None if none leave, as the scheduler decided."""
        facts = self._reader.prompt(row, common)
        if facts is None or not facts.features or not getattr(facts.features[0], MARK, False):
            return None
        first, config = facts.features[0].mm_position.offset, self._runner.model_config.hf_config
        if first < computed < facts.length:  # it takes over an ended request's blocks, whose tokens have left
            counts = self._quotas(images_in(facts.features, facts.length, config)).counts.sum((1, 2)).tolist()
            lost = [0, *(counts[0] - counts[2 * layer + 2] for layer in self._removing)]
            self._remember(self._reader.name(row, common), first, lost)
        if not computed <= first < length:
            return None
        if length < facts.length:
            setattr(facts.features[0], MARK, False)  # also if it is preempted and then prefilled whole
            logger.warning_once("fitprune: vLLM split a prompt that was to come whole, which runs dense")
            return None
        image = images_in(facts.features, length, config)
        valid = (torch.arange(length) < facts.length)[None]  # after a preemption, an answer's first part follows
        question = text_after(image >= 0, valid) if self._query_aware else torch.zeros_like(valid)
        ids = torch.zeros_like(image)
        ids[0, : facts.length] = facts.ids()
        device = self._runner.device
        image, question, valid = image.to(device), question.to(device), valid.to(device)
        prompt = Prompt(ids, valid, _no_vision, image, self._norm, self._quotas(image))
        kept = torch.arange(computed, length, device=device)
        return Request(row, prompt, question, kept, computed, first, self._nothing.copy())

    def _enter(self, number: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Give a layer its rows' positions and metadata."""
        call = {**dict(zip(self._layers[number].takes, args, strict=False)), **kwargs}
        hidden, residual = call["hidden_states"], call["residual"]
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
        return (), {**call, "positions": call["positions"][..., step.rows]}

    def _enter_stage(self, step: Step, stage: int) -> None:
        """Make the metadata of the layers after one that removes, up to the next."""
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
            keys, slots = (part[0] for part in self._places(common, [[lost[stage] for lost in step.lost]]))
        else:  # no row leaves in this step: all stages at once
            if step.places is None:
                step.places = self._places(common, list(zip(*step.lost, strict=True)))
            keys, slots = (part[stage] for part in step.places)
        metadata = self._build(
            common.replace(
                seq_lens=keys,
                slot_mapping=slots,
                _num_computed_tokens_cache=None,
                _token_to_req_indices_cache=None,
            )
        )
        end = self._removing[stage] + 1 if stage < len(self._removing) else len(self._layers)
        for layer in self._layers[self._removing[stage - 1] + 1 : end]:
            step.context.attn_metadata[layer.attention.layer_name] = metadata
            step.context.slot_mapping[layer.attention.layer_name] = slots

    def _places(self, common: Any, lost: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Find for S stages, from tokens lost [S, R], the keys of each request [S, R] and the step's slots [S, T]."""
        begin, count = common.query_start_loc, common.num_actual_tokens
        keys = common.seq_lens - torch.tensor(lost, dtype=common.seq_lens.dtype).to(begin.device, non_blocking=True)
        lengths = begin.diff()
        owner = torch.arange(len(lengths), device=begin.device).repeat_interleave(lengths, output_size=count)
        place = torch.arange(count, device=begin.device) + (keys - lengths - begin[:-1])[:, owner]
        block = common.block_table_tensor[owner, place // self._block_size].long()
        return keys, block * self._block_size + place % self._block_size

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        """Keep queries, keys and values of a layer where tokens may leave."""
        if self._step is not None and self._step.pruned:
            call = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            self._step.states = tuple(call[name] for name in ("query", "key", "value"))

    def _leave(self, number: int, stage: int, module: Any, args: Any, output: Any) -> Any:
        """Let tokens leave after a layer's attention."""
        step = self._step
        if step is None or not step.pruned:
            return None
        stays = torch.ones(len(output[0]), dtype=torch.bool, device=output[0].device)
        starts = [0, *itertools.accumulate(step.lengths)]
        for request in step.pruned:
            rows = slice(starts[request.row], starts[request.row + 1])
            assert step.hidden is not None
            if not bool(step.hidden[rows].isfinite().all()):  # it has no scores; the requests beside it go on
                logger.warning_once("fitprune: a request whose hidden states are not finite keeps its tokens")
                continue
            chosen = self._choose(self._view(step, number, request, rows))
            if chosen is None:
                continue
            stays[rows] = here = self._ranks.agreed(chosen[0])
            request.kept = request.kept[here]
            lost = step.lengths[request.row] - len(request.kept)
            step.lengths[request.row] = len(request.kept)
            request.lost[stage:] = [before + lost for before in request.lost[stage:]]
        step.hidden = step.states = None
        index = torch.nonzero(stays)[:, 0]
        if len(index) == len(stays):
            return None
        step.rows = index if step.rows is None else step.rows[index]
        return tuple(part[index] for part in output)

    def _view(self, step: Step, number: int, request: Request, rows: slice) -> LayerView:
        assert step.hidden is not None
        assert step.states is not None
        attention = self._layers[number].attention
        shape = 1, len(request.kept), -1, attention.head_size
        query, key, value = (part[rows].view(shape).transpose(1, 2) for part in step.states)
        softmax = self._layers[number].softmax()
        return LayerView(
            layer=number,
            before=False,
            image=request.prompt.images[:, request.kept],
            question=request.question[:, request.kept],
            column=request.kept[None],
            hidden=step.hidden[None, rows],
            prompt=request.prompt,
            attention=lambda: self._ranks.whole(
                Attention(query, self._with_cached(key, step, attention, request), value, softmax)
            ),
        )

    def _with_cached(self, keys: torch.Tensor, step: Step, attention: Any, request: Request) -> torch.Tensor:
        """Put the keys of a prompt's tokens that are not in the step before `keys` [1, G, m, D] of those that are."""
        if not request.computed:
            return keys
        assert self._cached_keys is not None
        blocks = step.common.block_table_tensor[request.row]  # nothing has left before an image: the same in all layers
        return torch.cat((self._cached_keys.of(attention, blocks, request.computed), keys), 2)

    def _end(self, module: Any, args: Any, output: Any) -> Any:
        """Put rows back where vLLM's sampler looks for them; zero where a token left."""
        step, self._step = self._step, None
        if step is None or step.rows is None:
            return None
        return tuple(part.new_zeros(step.total, part.shape[1]).index_copy_(0, step.rows, part) for part in output)


def _no_vision() -> torch.Tensor:
    raise ValueError("vLLM does not give the attention of the vision tower")
