"""Take visual tokens out of a running prefill, and keep what follows it right.

Knows when and how rows leave; not which: that is the `plan` function of the caller.

At a layer that removes, the tokens leave after its attention: the layer's KV cache keeps them, its MLP and all later
layers never see them. transformers keeps the residual in a local of the layer's forward, so the MLP runs on the kept
rows only (gathered before, scattered after) and the rows are dropped at the layer's end. Positions stay original. After
the last layer the rows return to their columns, zero where a token left, so that logits, labels and indices of logits
mean what they mean in the dense model.

Shapes: B batch, P columns of the past, Q columns of this forward.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fitprune._support.host import cache_in, cache_of, without_cache
from fitprune.engine import calls
from fitprune.engine.attention_tap import COPIED, AttentionTap, tap_attention
from fitprune.engine.cache import PrunedLayer, adopt, is_pruned, require_plain, require_whole
from fitprune.engine.rotary import RotaryOffsets
from fitprune.engine.rows import Choose, Forward, cut_mask, rows_at
from fitprune.families.adapter import AdaptedModel
from fitprune.families.clip_tower import Tower, watching
from fitprune.families.images import PIXELS, given_images, read_images, tokens_of
from fitprune.scoring.received import Attention, text_after
from fitprune.scoring.view import Prompt, Quotas


@dataclasses.dataclass(frozen=True)
class _Uncached:
    """The last step of decoding without a cache: its images, the prompt [B, N] that it began with, and its length."""

    images: weakref.ref[Any]
    prompt: torch.Tensor
    length: int


class _Seen(Exception):
    """Ends a layer's attention once its queries and keys are known."""


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What a prefill kept.

    Attributes:
        positions: for each layer, the columns of the prompt [B, m] that enter it, ascending; -1 at padding, on the left
            of rows that hold fewer tokens than the longest.
        after: the same of what is present after each layer.
        image: [B, Q] int64, number of the image or frame that each column belongs to in its sample; -1 for others.
    """

    positions: list[torch.Tensor]
    after: list[torch.Tensor]
    image: torch.Tensor

    def __repr__(self) -> str:
        return f"Prefill(visual tokens {self.visual_tokens}, of which the last layer keeps {self.kept[-1]})"

    @property
    def visual_tokens(self) -> list[list[int]]:
        """For each sample the visual tokens of each of its images in the prompt."""
        return [[count for count in row if count] for row in tokens_of(self.image)]

    @property
    def kept(self) -> list[list[list[int]]]:
        """For each layer, sample and image, the visual tokens that are present after the layer."""
        found = []
        for columns in self.after:
            image = self.image.to(columns.device).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
            counts = image.new_zeros(len(image), int(self.image.max()) + 2).scatter_add_(
                1, image + 1, image.new_ones(image.shape)
            )
            found.append([row[: len(own)] for row, own in zip(counts[:, 1:].tolist(), self.visual_tokens, strict=True)])
        return found


# The decoders whose calls run dense, once for each block that wants it: of a thread, or of a task of asyncio.
_PAUSED: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("paused", default=())


@contextlib.contextmanager
def paused(adapted: AdaptedModel) -> Iterator[None]:
    """Let the calls of this thread or task run as in the dense model, until the block ends."""
    _PAUSED.set((*_PAUSED.get(), adapted.decoder))
    try:
        yield
    finally:  # blocks may end in another order than they began
        left = list(_PAUSED.get())
        left.remove(adapted.decoder)
        _PAUSED.set(tuple(left))


class Remover:
    """Removes tokens from one model's prefills; made and undone by `removing`.

    The state of a forward belongs to the thread that runs it.

    Attributes:
        attached: what is to live as long as the hooks that are on the model.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        choose: Choose,
        quotas: Callable[[torch.Tensor], Quotas] | None,
        needs_question: bool,
        tower: Tower | None,
    ) -> None:
        self.adapted = adapted
        self._choose = choose
        self._quotas = quotas
        self.needs_question = needs_question
        self.tower = tower
        self._latest: Prefill | None = None
        self._own = threading.local()
        self.hooks: LayerHooks | None = None
        self.attached: Any = None
        self.rotary = RotaryOffsets(adapted)
        self.lock = threading.Lock()  # while it is held no call begins, and no hook comes or goes
        self._names = list(inspect.signature(type(adapted.model).forward).parameters)[1:]
        # Whether generate encodes images; where not (some models in transformers 5.19), each step has the same pixels.
        sees = getattr(adapted.model, "input_modalities", ())
        self._encodes_ahead = "mm_encoder_outputs" in self._names and any(kind in sees for kind in PIXELS)
        # By thread, innermost last: a hook may call the model again. None in a call that neither prunes nor continues.
        self._forwards: dict[int, list[Forward | None]] = {}
        self._uncached: dict[int, _Uncached] = {}  # by the id of the images

    @property
    def last(self) -> Prefill | None:
        """The last prefill with images of this thread, or of any thread where this one had none."""
        return getattr(self._own, "last", self._latest)

    @property
    def _is_paused(self) -> bool:
        return self.adapted.decoder in _PAUSED.get()

    @property
    def _state(self) -> Forward | None:
        running = self._forwards.get(threading.get_ident())
        return running[-1] if running else None

    def begin(self) -> None:
        """Make a place for a call's state, before any other hook can fail: `after_model` takes it away in any case."""
        with self.lock:
            self._forwards.setdefault(threading.get_ident(), []).append(None)

    def alone(self) -> bool:
        """Whether this thread's outermost call is the only one that runs."""
        return list(self._forwards) == [threading.get_ident()] and len(self._forwards[threading.get_ident()]) == 1

    def before_model(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the visual tokens of a prefill, and refuse what cannot be pruned rightly."""
        if model is not self.adapted.model:
            raise ValueError(COPIED)
        if self._is_paused:
            return args, kwargs
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = cache_of(self.adapted.model, given)
        images = given_images(given)
        if images is None:
            calls.require_no_visual_tokens(self.adapted, given, cache)
        elif cache is not None:
            require_plain(cache, self.adapted)  # first: with a static cache generate makes masks of a form of its own
        if not is_pruned(cache):
            require_whole(cache)
            if images is None:  # text alone, where even a generated image token is no image: as the dense model
                return self._text_alone(args, kwargs, given, cache)
        valid, past = calls.valid_columns(given, cache)
        calls.require_left_padding(self.adapted, valid)
        if images is not None:
            calls.require_uncompiled_call()
            state, changed = self._prefill(given, cache, valid, past)
        else:
            state, changed = Forward(past, calls.call_length(given), valid), {}
        counted = calls.counted_positions(valid, past, given.get("position_ids"))
        rotary, state.rope_offset = self.rotary.positions(given, cache, valid, past, state.length)
        if (positions := rotary if counted is None else counted) is not None:
            changed["position_ids"] = positions
        self._forwards[threading.get_ident()][-1] = state
        return ((), {**given, **changed}) if changed else (args, kwargs)

    def _text_alone(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let a call of text alone run as in the dense model, but with its own conversation's rotary positions."""
        past = 0 if cache is None else cache.get_seq_length()
        if not past or self.rotary.offset_of(cache) is None:
            return args, kwargs
        length = calls.call_length(given)
        positions, _ = self.rotary.positions(given, cache, None, past, length)
        return ((), {**given, "position_ids": positions}) if positions is not None else (args, kwargs)

    def _prefill(
        self, given: dict[str, Any], cache: Any, valid: torch.Tensor | None, past: int
    ) -> tuple[Forward, dict[str, Any]]:
        """Start a forward that prunes; also says which arguments of the call change."""
        if self.adapted.model.training and getattr(self.adapted.decoder, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs layers again in the backward pass, when their tokens are gone: "
                "disable it, or call model.eval()"
            )
        seen = read_images(self.adapted, given, cache)
        visual, image, changed = seen.visual, seen.image, seen.changed
        length = visual.shape[1]
        column = torch.arange(length, device=visual.device).expand_as(visual)
        prompt = self._uncached_prompt(given, cache, length)
        kept = column
        present = None if valid is None else valid[:, past:]
        if present is not None:
            visual, image, kept = visual & present, image.masked_fill(~present, -1), kept.masked_fill(~present, -1)
        question = text_after(visual, present)
        calls.require_rows(
            visual, question, "has no text after its last visual token; put the question behind the images"
        )
        predicted = calls.predicted_rows(given, visual)
        asked = (column < prompt) & (column < calls.first_answer(given, visual, predicted))
        if self.needs_question:
            question = question & asked
            calls.require_rows(
                visual,
                question,
                "has no question: no text between its last visual token and the first asked logit or label; ask for "
                "fewer logits or labels, or prune with scorer='self', which needs no question",
            )
        else:
            question = torch.zeros_like(question)
        prompt_columns = asked if present is None else asked & present
        if cache is not None:
            adopt(cache, self.adapted)  # before masks are made: the model reads their sizes off the cache
        whole = Prompt(
            given.get("input_ids"),
            prompt_columns,
            lambda: self._cls_attention(seen.features, seen.visual),
            image,
            self.adapted.norm,
            None if self._quotas is None else self._quotas(image),
        )
        return Forward(past, length, valid, self._choose, whole, kept=kept, image=image, question=question), changed

    def _uncached_prompt(self, given: dict[str, Any], cache: Any, length: int) -> int:
        """The length of the prompt, also where the call repeats the last one with one more token.

        generate(use_cache=False) sends prompt and answer so far at every step, and the answer must not become question.
        Its steps are known by the images that it encoded ahead.
        """
        encoded = given.get("mm_encoder_outputs") or not self._encodes_ahead
        images, ids = given_images(given) if encoded else None, given.get("input_ids")
        cached = cache is not None or given.get("use_cache") is not False
        if cached or ids is None or images is None:
            return length
        self._uncached = {key: step for key, step in self._uncached.items() if step.images() is not None}
        before, prompt = self._uncached.get(id(images)), ids
        if before is not None and before.length == length - 1 and before.prompt.shape[0] == len(ids):
            # Beams reorder the answer so far, never the prompt.
            prompt = before.prompt if torch.equal(ids[:, : before.prompt.shape[1]], before.prompt) else ids
        self._uncached[id(images)] = _Uncached(weakref.ref(images), prompt, length)
        return int(prompt.shape[1])

    def _cls_attention(self, features: Sequence[torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """The [CLS] attention of the call's visual tokens; see `fitprune.families.clip_tower`."""
        if self.tower is None:
            raise ValueError(
                "the scorer reads [CLS] attention without saying so: make it Scorer(..., reads_vision=True)"
            )
        return self.tower.deal(features, visual)

    def after_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget this thread's innermost forward, which has ended or died."""
        running = self._forwards.get(threading.get_ident(), [])
        if running:
            running.pop()
        if not running:
            self._forwards.pop(threading.get_ident(), None)
        if self.rotary.tracked and output is not None and not self._is_paused:
            given = {**dict(zip(self._names, args, strict=False)), **kwargs}
            cache = cache_in(output)
            # A conversation that began with text alone: another one's offset must not become its own.
            if given_images(given) is None and cache is not None and self.rotary.offset_of(cache) is None:
                length = calls.call_length(given)
                if cache.get_seq_length() == length:
                    self.rotary.keep(cache, torch.zeros(1, 1, dtype=torch.long, device=self.adapted.model.device))

    def require_idle(self) -> None:
        """Refuse to end quietly while other threads are inside a forward, whose hooks vanish under them."""
        if others := set(self._forwards) - {threading.get_ident()}:
            raise ValueError(
                f"{len(others)} other thread(s) are inside a call of the pruned model, which now fails or is wrong: "
                "join them before leaving the prune block"
            )

    def before_first_layer(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Put the other hooks on where the call needs them, and go on as at any layer."""
        assert self.hooks is not None
        if not self._forwards.get(threading.get_ident()):
            raise ValueError(
                "the decoder of a pruned model runs, but not through a call of the model itself, so nothing was "
                "pruned: call the model that prune was given, neither a part of it nor a torch.compile'd wrapper, and "
                "attach while no call is running"
            )
        state = self._state
        if state is None:
            return hidden, kwargs
        cache = cache_of(self.adapted.layers[0], kwargs)
        if state.is_plain_step(cache, kwargs.get("attention_mask")):
            self.hooks.off_if(self.alone)
            for layer in cache.layers:
                if isinstance(layer, PrunedLayer):
                    layer.expect_step()
            return hidden, kwargs
        self.hooks.on()
        return self.before_layer(0, hidden, kwargs)

    def before_layer(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cut a layer's input and arguments to the tokens that reach it."""
        state = self._state
        if state is None:
            return hidden, kwargs
        cache = cache_of(self.adapted.layers[number], kwargs)
        if cache is not None and number == 0:
            if state.choose is not None:
                adopt(cache, self.adapted)  # the model may have made it itself
            self.rotary.keep(cache, state.rope_offset)
        if state.choose is not None:
            state.hidden = hidden
        if state.choose is not None and self.adapted.attentions[number] is not None:
            ahead = state.view(number, True, hidden.device, lambda: self._attention_ahead(number, hidden, kwargs))
            if (stays := state.choose(ahead)) is not None:
                state.leave(stays)
                state.hidden = hidden = state.drop(hidden)
            state.previous = None
        held = None if cache is None else cache.layers[number]
        layer = held if isinstance(held, PrunedLayer) else None
        return hidden, state.enter(self.adapted, number, layer, hidden, kwargs)

    def _attention_ahead(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Attention:
        """Compute the queries and keys that a layer would have if no token left before it; the past is left out."""
        state = self._state
        assert state is not None
        kept, mask = state.kept.to(hidden.device), kwargs.get("attention_mask")
        own = mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None
        columns = torch.where(kept < 0, -1, kept + state.past)
        given = without_cache(self.adapted.layers[number], kwargs)
        given["attention_mask"] = None if own is None else cut_mask(own, kept, columns)
        if state.packed:
            given |= rows_at(given, kept.clamp(min=0), self.adapted.decoder.config._attn_implementation)
        state.ahead = []
        try:
            with torch.no_grad(), contextlib.suppress(_Seen):
                # The layer's own forward, less the hooks around it, as far as its attention: it knows its norms.
                self.adapted.layers[number].forward(hidden, **given)
            seen = state.ahead[0]
        finally:
            state.ahead = None
        if own is not None:
            return seen
        present = kept >= 0
        if state.valid is not None:
            present = present & state.valid[:, state.past :].to(hidden.device).gather(1, kept.clamp(min=0))
        valid = None if bool(present.all()) else present
        return dataclasses.replace(seen, softmax=dataclasses.replace(seen.softmax, valid=valid))

    def at_attention(self, number: int, attention: Callable[[], Attention]) -> Callable[[Attention], None] | None:
        """Give what chooses, from the layer's own queries and keys, the tokens that stay."""
        state = self._state
        if state is None or state.choose is None:
            return None
        if state.ahead is not None:
            state.ahead.append(attention())
            raise _Seen  # the attention itself is not needed
        return lambda now: self.choose(state, number, now)

    def choose(self, state: Forward, number: int, now: Attention) -> None:
        """Choose the tokens that stay."""
        assert state.choose is not None
        device = now.query.device
        valid = None if state.keys_valid is None else state.keys_valid.to(device)
        now = dataclasses.replace(now, softmax=dataclasses.replace(now.softmax, valid=valid))
        state.previous = view = state.view(number, False, device, lambda: now)
        if (stays := state.choose(view)) is not None:
            state.leave(stays)

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the MLP on the rows that stay."""
        return hidden if (state := self._state) is None else state.gather(hidden)

    def after_mlp(self, output: Any) -> Any:
        """Give the MLP's output the rows of the residual."""
        return output if (state := self._state) is None else state.scatter(output)

    def after_layer(self, number: int, output: Any) -> Any:
        """Drop the rows that left; after the last layer, put those that are left back into their columns."""
        state = self._state
        if state is None:
            return output
        hidden = state.drop(output[0] if isinstance(output, tuple) else output)
        state.hidden = None
        state.after.append(state.kept)
        if number == len(self.adapted.layers) - 1:
            hidden = state.to_columns(hidden)
            if state.prompt is not None:
                self._latest = self._own.last = Prefill(state.entered, state.after, state.prompt.images)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


Entering = Callable[[torch.Tensor, dict[str, Any]], tuple[torch.Tensor, dict[str, Any]]]


def _entering(
    enter: Entering,
) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Make a hook that calls `enter` on a layer's arguments, its input by place or by name."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            hidden, kwargs = enter(args[0], kwargs)
            return (hidden, *args[1:]), kwargs
        hidden, kwargs = enter(kwargs["hidden_states"], kwargs)
        return (), {**kwargs, "hidden_states": hidden}

    return hook


class LayerHooks:
    """The hooks inside the decoder, on while some call needs them.

    A step of decoding in which no layer hides a key goes without: their time would be a tenth of a small model's step.
    """

    def __init__(self, remover: Remover, tap: AttentionTap) -> None:
        self._remover = remover
        self._tap = tap
        self._handles: list[Any] = []

    def on(self) -> None:
        """Put them on, if they are off."""
        remover, adapted = self._remover, self._remover.adapted
        with remover.lock:
            self._tap.on()
            if self._handles:
                return
            for number, (layer, mlp) in enumerate(zip(adapted.layers, adapted.mlps, strict=True)):
                if number:
                    enter = functools.partial(remover.before_layer, number)
                    self._handles.append(layer.register_forward_pre_hook(_entering(enter), with_kwargs=True))
                self._handles += [
                    mlp.register_forward_pre_hook(lambda _, args: (remover.before_mlp(args[0]), *args[1:])),
                    mlp.register_forward_hook(lambda _, __, output: remover.after_mlp(output)),
                    layer.register_forward_hook(
                        lambda _, __, output, number=number: remover.after_layer(number, output)
                    ),
                ]

    def off_if(self, allowed: Callable[[], bool] = lambda: True) -> None:
        """Take them off, if they are on and `allowed` says so; no call begins between the question and the deed."""
        if not self._handles:
            return
        with self._remover.lock:
            if allowed():
                self._tap.off()
                for handle in self._handles:
                    handle.remove()
                self._handles.clear()


@contextlib.contextmanager
def removing(
    adapted: AdaptedModel,
    choose: Choose,
    quotas: Callable[[torch.Tensor], Quotas] | None = None,
    *,
    needs_question: bool = True,
    reads_vision: bool = False,
) -> Iterator[Remover]:
    """Let `choose` remove visual tokens from every prefill of the model, until the block ends.

    Args:
        adapted: the model.
        choose: says, of a view, which rows stay.
        quotas: makes of each prefill's images what scorers see as `LayerView.quotas`.
        needs_question: whether it reads cross attention, so that a prompt without a question is refused.
        reads_vision: whether it reads the attention of the vision tower's [CLS] token.

    Raises:
        ValueError: the model is pruned or measured already, or has no [CLS] token to read; on a call that cannot be
            pruned rightly, from that call; at the end, if another thread is inside a call.
    """
    calls.require_uncompiled(adapted)
    with contextlib.ExitStack() as stack:
        tower = stack.enter_context(watching(adapted)) if reads_vision else None
        remover = Remover(adapted, choose, quotas, needs_question, tower)
        stack.enter_context(remover.rotary.in_generate())
        stack.callback(remover.require_idle)
        tap = stack.enter_context(tap_attention(adapted, remover.at_attention))
        remover.hooks = hooks = LayerHooks(remover, tap)
        stack.callback(hooks.off_if)
        handles = [
            adapted.model.register_forward_pre_hook(lambda *_: remover.begin(), prepend=True),
            adapted.model.register_forward_pre_hook(
                # Compiled code must come out of itself here, to be found and refused. (torch leaves `disable` untyped.)
                torch.compiler.disable(remover.before_model),  # type: ignore[no-untyped-call]
                with_kwargs=True,
            ),
            adapted.model.register_forward_hook(
                lambda _, *call: remover.after_model(*call), always_call=True, with_kwargs=True
            ),
            adapted.layers[0].register_forward_pre_hook(_entering(remover.before_first_layer), with_kwargs=True),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield remover
