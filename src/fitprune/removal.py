"""Take visual tokens out of a running prefill, and keep what follows it right.

Knows when and how rows leave; not which: that is the `plan` function of the caller.

At a layer that removes, the tokens leave after its attention: the layer's KV cache keeps them, its MLP and all later
layers never see them. transformers keeps the residual in a local of the layer's forward, so the MLP runs on the kept
rows only (gathered before, scattered after) and the rows are dropped at the layer's end. Positions stay original. After
the last layer the rows return to their columns, zero where a token left, so that logits, labels and indices of logits
mean what they mean in the dense model.

Rows of a batch may keep different numbers of tokens. They are packed to the right: a shorter row has padding on its
left, and the prompt's own padding leaves with the first tokens that leave.

Shapes: B batch, P columns of the past, Q columns of this forward, m rows present at a layer (Q until tokens leave), d
hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fitprune import arguments
from fitprune.adapters import AdaptedModel, encode_images, visual_mask
from fitprune.attention import ReceivedAttention, received_attention, text_after
from fitprune.cache import PrunedLayer, adopt, is_pruned, require_plain
from fitprune.hooks import tap_attention
from fitprune.selection import images_of

# (layer, image [B, m], lazily computed received attention) -> stays [B, m] bool, or None where nothing leaves.
Choose = Callable[[int, torch.Tensor, Callable[[], ReceivedAttention]], "torch.Tensor | None"]
# image [B, Q] of a prefill -> the function that chooses in it.
Plan = Callable[[torch.Tensor], Choose]


@dataclasses.dataclass
class _Forward:
    """The state of one forward that prunes, or that continues a pruned cache.

    Attributes:
        past: P, columns of the sequence before this forward.
        length: Q.
        valid: [B, P + Q] False at padding; None where there is none.
        choose: what stays at a layer; None where this forward prunes nothing.
        kept: [B, m] columns, within this forward, of the rows present; -1 at padding.
        image: [B, m] image number of each row present, -1 for text and padding.
        question: [B, m] rows whose attention is cross.
        packed: whether rows have left, so that the rows present are no longer all Q.
        entered: for each layer so far, `kept` before it.
        index: [B, m'] rows that stay, between a layer's attention and its end; shorter samples are filled on the left.
        filled: [B, m'] True at that filling.
        keys_valid: [B, keys] False at keys of the present layer that are padding; None where there is none.
        made: arguments made for a layer, by the columns that its cache holds; until more rows leave.
    """

    past: int
    length: int
    valid: torch.Tensor | None
    choose: Choose | None
    kept: torch.Tensor
    image: torch.Tensor
    question: torch.Tensor
    packed: bool = False
    entered: list[torch.Tensor] = dataclasses.field(default_factory=list)
    index: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    keys_valid: torch.Tensor | None = None
    made: dict[int, tuple[Any, _Stage]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What layers share that see the same rows and hold the same columns of the past.

    Attributes:
        arguments: keyword arguments of the layer to replace.
        keys_valid: as in `_Forward`.
        held: what the layer's cache will hold; see `PrunedLayer.expect`.
    """

    arguments: dict[str, Any]
    keys_valid: torch.Tensor | None
    held: tuple[torch.Tensor, int, bool]


@dataclasses.dataclass(frozen=True)
class _Uncached:
    """The last prefill without a cache: its images, its prompt's length and its own."""

    images: Any
    prompt: int
    length: int


class Remover:
    """Removes tokens from one model's prefills; made and undone by `removing`.

    The state of a forward belongs to the thread that runs it.

    Attributes:
        entered: for each layer, the columns [B, m] that entered it in the last prefill, -1 at padding.
    """

    def __init__(self, adapted: AdaptedModel, plan: Plan, needs_question: bool) -> None:
        self.adapted = adapted
        self.plan = plan
        self.needs_question = needs_question
        self.entered: list[torch.Tensor] = []
        self._signature = inspect.signature(adapted.model.forward)
        self._forwards: dict[int, _Forward | None] = {}  # by thread; None in a call that neither prunes nor continues
        self._uncached: dict[int, _Uncached] = {}

    @property
    def _state(self) -> _Forward | None:
        return self._forwards.get(threading.get_ident())

    def before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the visual tokens of a prefill, and refuse what cannot be pruned rightly."""
        self._forwards[threading.get_ident()] = None
        arguments.require_uncompiled_call()
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        cache = given.get("past_key_values")
        images = (given.get("mm_encoder_outputs") or {}).get("image")
        images = given.get("pixel_values") if images is None else images
        if images is None and not is_pruned(cache):
            if cache is None or cache.get_seq_length() == 0:
                arguments.require_no_visual_tokens(self.adapted, given.get("input_ids"))
            return args, kwargs  # text alone, where even a generated image token is no image: as the dense model
        valid, past = arguments.valid_columns(given, cache)
        if images is not None:
            state, changed = self._prefill(given, valid, past, images)
        else:
            nothing = torch.empty(0, dtype=torch.long)
            state, changed = _Forward(past, arguments.call_length(given), valid, None, nothing, nothing, nothing), {}
        if (positions := arguments.counted_positions(valid, past, given.get("position_ids"))) is not None:
            changed["position_ids"] = positions
        self._forwards[threading.get_ident()] = state
        if changed:
            named = dict(zip(self._signature.parameters, args, strict=False))
            args, kwargs = (), {**named, **kwargs, **changed}
        return args, kwargs

    def _prefill(
        self, given: dict[str, Any], valid: torch.Tensor | None, past: int, images: Any
    ) -> tuple[_Forward, dict[str, Any]]:
        """Start a forward that prunes; also says which arguments of the call change."""
        if (cache := given.get("past_key_values")) is not None:
            require_plain(cache)
        if self.adapted.model.training and getattr(self.adapted.decoder, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs layers again in the backward pass, when their tokens are gone: "
                "disable it, or call model.eval()"
            )
        visual = visual_mask(self.adapted, given.get("input_ids"), given.get("inputs_embeds"))
        lengths, changed = encode_images(self.adapted, given)
        length = visual.shape[1]
        column = torch.arange(length, device=visual.device).expand_as(visual)
        prompt = self._uncached_prompt(given, images, length)
        visual = visual & (column < prompt)  # an image token that the model itself wrote is no image
        arguments.require_features(visual, lengths, past)
        image = images_of(visual, lengths)
        kept = column
        present = None if valid is None else valid[:, past:]
        if present is not None:
            visual, image, kept = visual & present, image.masked_fill(~present, -1), kept.masked_fill(~present, -1)
        question = text_after(visual, present)
        arguments.require_rows(
            visual, question, "has no text after its last visual token; put the question behind the images"
        )
        predicted = arguments.predicted_rows(given, visual)
        if self.needs_question:
            question = question & (column < prompt) & (column < arguments.first_answer(given, question, predicted))
            arguments.require_rows(
                visual,
                question,
                "has no question: no text between its last visual token and the first asked logit or label; ask for "
                "fewer logits or labels, or prune with scorer='self', which needs no question",
            )
        else:
            question = torch.zeros_like(question)
        return _Forward(past, length, valid, self.plan(image), kept, image, question), changed

    def _uncached_prompt(self, given: dict[str, Any], images: Any, length: int) -> int:
        """The length of the prompt, also where the call repeats the last one with one more token.

        generate(use_cache=False) sends prompt and answer so far at every step, and the answer must not become question.
        """
        before = self._uncached.pop(threading.get_ident(), None)
        if given.get("past_key_values") is not None or given.get("use_cache") is not False:
            return length
        continues = before is not None and before.images is images and before.length == length - 1
        prompt = before.prompt if before is not None and continues else length
        self._uncached[threading.get_ident()] = _Uncached(images, prompt, length)
        return prompt

    def after_model(self) -> None:
        """Forget this thread's forward, which has ended or died."""
        self._forwards.pop(threading.get_ident(), None)

    def require_idle(self) -> None:
        """Refuse to end quietly while other threads are inside a forward, whose hooks vanish under them."""
        if others := set(self._forwards) - {threading.get_ident()}:
            raise ValueError(
                f"{len(others)} other thread(s) are inside a call of the pruned model, which now fails or is wrong: "
                "join them before leaving the prune block"
            )

    def before_layer(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Cut a layer's positions and mask to the tokens that reach it."""
        state = self._state
        if state is None:
            return kwargs
        cache = kwargs.get("past_key_values")
        if state.choose is not None:
            state.entered.append(state.kept)
            if number == 0 and cache is not None:
                adopt(cache, len(self.adapted.layers))
        layer: PrunedLayer | None = None if cache is None else cache.layers[number]
        columns = None if layer is None else layer.columns
        if not state.packed and columns is None:
            state.keys_valid = state.valid
            return kwargs
        if id(columns) not in state.made:
            # The columns are kept with what was made of them, so that no other tensor gets their id.
            state.made[id(columns)] = (columns, self._stage(state, layer, hidden, kwargs))
        stage = state.made[id(columns)][1]
        state.keys_valid = stage.keys_valid
        if layer is not None:
            layer.expect(*stage.held)
        return {**kwargs, **stage.arguments}

    def _stage(
        self, state: _Forward, layer: PrunedLayer | None, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> _Stage:
        """Make the arguments of a layer whose rows or keys are not those of the dense model."""
        layer = layer or PrunedLayer()
        (batch, rows, _), device = hidden.shape, hidden.device
        replaced: dict[str, Any] = {}
        if state.packed:
            kept = state.kept.to(device)
            replaced = _at(kwargs, kept.clamp(min=0))
            new = torch.where(kept < 0, -1, kept + state.past)
        elif rows == 1 and state.valid is None and not layer.padded:  # the usual decoding step: nothing is hidden
            assert layer.columns is not None
            return _Stage({"attention_mask": None}, None, (layer.columns, layer.covered, False))
        else:
            new = torch.arange(state.past, state.past + state.length, device=device).expand(batch, -1)
        columns = torch.cat([layer.all_columns(state.past, batch, device), new], 1)
        present = columns >= 0
        if state.packed or layer.columns is None:
            held = (columns, state.past + state.length, not bool(present.all()))
        else:
            held = (layer.columns, layer.covered, layer.padded)
        if state.valid is not None:
            present = present & state.valid.to(device).expand(batch, -1).gather(1, columns.clamp(min=0))
        replaced["attention_mask"] = self._mask(present, hidden)
        return _Stage(replaced, None if bool(present.all()) else present, held)

    def _mask(self, present: torch.Tensor, hidden: torch.Tensor) -> Any:
        """Make a causal mask as the model's attention implementation takes it; the last keys are the rows' own."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        config = self.adapted.decoder.config
        implementation = config._attn_implementation
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ValueError(
                f"attn_implementation={implementation!r} has no entry in transformers' mask registry: a mask for the "
                "kept tokens cannot be made; register one, or load the model with 'sdpa' or 'eager'"
            )
        batch, keys = present.shape
        rows = hidden.shape[1]
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=batch,
            q_length=rows,
            kv_length=keys,
            q_offset=keys - rows,
            kv_offset=0,
            attention_mask=present,
            allow_is_causal_skip=True,
            dtype=hidden.dtype,
            config=config,
            device=hidden.device,
        )

    def at_attention(self, number: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Choose, from the layer's own queries and keys, the tokens that stay."""
        if threading.get_ident() not in self._forwards:
            raise ValueError(
                "the decoder of a pruned model runs, but not through a call of the model itself, so nothing was "
                "pruned: call the model that prune was given, neither a part of it nor a torch.compile'd wrapper"
            )
        state = self._state
        if state is None or state.choose is None:
            return
        device = query.device
        image = state.image.to(device)

        def received() -> ReceivedAttention:
            valid = None if state.keys_valid is None else state.keys_valid.to(device)
            return received_attention(query, key, image, state.question.to(device), scaling=scaling, valid=valid)

        stays = state.choose(number, image, received)
        present = (state.kept >= 0).to(device)
        if stays is None or not bool((present & ~stays).any()):
            return
        stays = stays & present
        most = int(stays.sum(1).max())
        # Stable: what leaves comes first, then what stays, each in order. So the rows end up packed to the right.
        state.index = stays.byte().argsort(dim=1, stable=True)[:, stays.shape[1] - most :]
        state.filled = ~stays.gather(1, state.index)

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gather the rows that stay: [B, m, d] -> [B, m', d]."""
        state = self._state
        return hidden if state is None or state.index is None else _take(hidden, state.index)

    def after_mlp(self, output: torch.Tensor) -> torch.Tensor:
        """Scatter the MLP's rows back, zero where a token leaves: [B, m', d] -> [B, m, d]."""
        state = self._state
        if state is None or state.index is None:
            return output
        batch, _, width = output.shape
        full = output.new_zeros(batch, state.kept.shape[1], width)
        return full.scatter(1, state.index.to(output.device)[..., None].expand(-1, -1, width), output)

    def after_layer(self, number: int, output: Any) -> Any:
        """Drop the rows that left; after the last layer, put those that are left back into their columns."""
        state = self._state
        if state is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if state.index is not None and state.filled is not None:
            hidden = _take(hidden, state.index)
            index, filled = state.index.to(state.kept.device), state.filled.to(state.kept.device)
            state.kept = state.kept.gather(1, index).masked_fill(filled, -1)
            state.image = state.image.gather(1, index).masked_fill(filled, -1)
            state.question = state.question.gather(1, index)
            state.index = state.filled = None
            state.packed = True
            state.made.clear()
        if number == len(self.adapted.layers) - 1:
            hidden = _to_columns(state, hidden)
            if state.choose is not None:
                self.entered = state.entered
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def removing(adapted: AdaptedModel, plan: Plan, *, needs_question: bool = True) -> Iterator[Remover]:
    """Let `plan` remove visual tokens from every prefill of the model, until the block ends.

    Args:
        adapted: the model.
        plan: makes, for each prefill, the function that chooses in it.
        needs_question: whether it reads cross attention, so that a prompt without a question is refused.

    Raises:
        ValueError: the model is pruned or measured already; on a call that cannot be pruned rightly, from that call;
            at the end, if another thread is inside a call.
    """
    arguments.require_uncompiled(adapted)
    remover = Remover(adapted, plan, needs_question)
    with contextlib.ExitStack() as stack:
        stack.callback(remover.require_idle)
        stack.enter_context(tap_attention(adapted, remover.at_attention))
        handles = [
            adapted.model.register_forward_pre_hook(
                # Compiled code must come out of itself here, to be found and refused.
                torch.compiler.disable(lambda _, args, kwargs: remover.before_model(args, kwargs)),  # type: ignore[no-untyped-call]
                with_kwargs=True,
            ),
            adapted.model.register_forward_hook(lambda *_: remover.after_model(), always_call=True),
        ]
        for number, layer in enumerate(adapted.layers):
            handles += [
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, number=number: (
                        args,
                        remover.before_layer(number, args[0] if args else kwargs["hidden_states"], kwargs),
                    ),
                    with_kwargs=True,
                ),
                layer.mlp.register_forward_pre_hook(lambda _, args: (remover.before_mlp(args[0]), *args[1:])),
                layer.mlp.register_forward_hook(lambda _, __, output: remover.after_mlp(output)),
                layer.register_forward_hook(lambda _, __, output, number=number: remover.after_layer(number, output)),
            ]
        for handle in handles:
            stack.callback(handle.remove)
        yield remover


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows: [B, m, d] by [B, m'] -> [B, m', d]."""
    return rows.gather(1, index.to(rows.device)[..., None].expand(-1, -1, rows.shape[-1]))


def _at(kwargs: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
    """Cut position embeddings and position ids of a whole forward to the rows [B, m]."""
    batch, embeddings, ids = len(kept), kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if embeddings is not None:
        # Next to embeddings, ids only tell FlashAttention where packed sequences begin: it would take gaps for that.
        return {
            "position_embeddings": tuple(_take(e.expand(batch, -1, -1), kept) for e in embeddings),
            "position_ids": None,
        }
    return {} if ids is None else {"position_ids": ids.expand(batch, -1).gather(1, kept.to(ids.device))}


def _to_columns(state: _Forward, hidden: torch.Tensor) -> torch.Tensor:
    """Put the rows back into their columns: [B, m, d] -> [B, Q, d], zero where a token left.

    Padding behind a row's last token repeats that token, so that `logits[:, -1]`, which generate reads, is its own.
    """
    batch, rows, width = hidden.shape
    last = None if state.valid is None else _last_columns(state.valid[:, state.past :].to(hidden.device))
    if not state.packed and last is None:
        return hidden
    if state.packed:
        kept = state.kept.to(hidden.device)
        row = torch.arange(1, rows + 1, device=hidden.device).expand(batch, -1)
        # Row 0 is a zero row, for columns without a token; column Q takes the padding, and is cut off.
        source = row.new_zeros(batch, state.length + 1)
        source = source.scatter(1, torch.where(kept < 0, state.length, kept), row)[:, : state.length]
    else:
        source = torch.arange(1, rows + 1, device=hidden.device).expand(batch, -1)
    if last is not None:
        column = torch.arange(state.length, device=hidden.device)
        source = torch.where(column > last, source.gather(1, last), source)
    return _take(torch.cat([hidden.new_zeros(batch, 1, width), hidden], 1), source)


def _last_columns(valid: torch.Tensor) -> torch.Tensor | None:
    """The column of each row's last token, [B, 1]; None where no row ends in padding."""
    if bool(valid[:, -1].all()):
        return None
    column = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, column, 0).amax(1, keepdim=True)
