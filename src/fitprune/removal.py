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
import dataclasses
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from fitprune import arguments
from fitprune.adapters import AdaptedModel, encode_images, visual_mask
from fitprune.attention import ReceivedAttention, received_attention, text_after
from fitprune.cache import adopt, is_pruned, require_plain, require_whole
from fitprune.hooks import tap_attention
from fitprune.packing import Forward, Plan
from fitprune.selection import images_of


@dataclasses.dataclass(frozen=True)
class _Uncached:
    """The last step of decoding without a cache: its images, the prompt [B, N] that it began with, and its length."""

    images: weakref.ref[Any]
    prompt: torch.Tensor
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
        self._names = list(inspect.signature(type(adapted.model).forward).parameters)[1:]
        # By thread, innermost last: a hook may call the model again. None in a call that neither prunes nor continues.
        self._forwards: dict[int, list[Forward | None]] = {}
        self._uncached: dict[int, _Uncached] = {}  # by the id of the images

    @property
    def _state(self) -> Forward | None:
        running = self._forwards.get(threading.get_ident())
        return running[-1] if running else None

    def begin(self) -> None:
        """Make a place for a call's state, before any other hook can fail: `after_model` takes it away in any case."""
        self._forwards.setdefault(threading.get_ident(), []).append(None)

    def before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the visual tokens of a prefill, and refuse what cannot be pruned rightly."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache: Any = given.get("past_key_values")
        images = (given.get("mm_encoder_outputs") or {}).get("image")
        images = given.get("pixel_values") if images is None else images
        if images is None:
            arguments.require_no_visual_tokens(self.adapted, given)
        if not is_pruned(cache):
            require_whole(cache)
            if images is None:
                return args, kwargs  # text alone, where even a generated image token is no image: as the dense model
        valid, past = arguments.valid_columns(given)
        if images is not None:
            arguments.require_uncompiled_call()
            state, changed = self._prefill(given, valid, past)
        else:
            state, changed = Forward(past, arguments.call_length(given), valid), {}
        if (positions := arguments.counted_positions(valid, past, given.get("position_ids"))) is not None:
            changed["position_ids"] = positions
        self._forwards[threading.get_ident()][-1] = state
        return ((), {**given, **changed}) if changed else (args, kwargs)

    def _prefill(self, given: dict[str, Any], valid: torch.Tensor | None, past: int) -> tuple[Forward, dict[str, Any]]:
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
        prompt = self._uncached_prompt(given, length)
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
            question = question & (column < prompt) & (column < arguments.first_answer(given, visual, predicted))
            arguments.require_rows(
                visual,
                question,
                "has no question: no text between its last visual token and the first asked logit or label; ask for "
                "fewer logits or labels, or prune with scorer='self', which needs no question",
            )
        else:
            question = torch.zeros_like(question)
        return Forward(past, length, valid, self.plan(image), kept, image, question), changed

    def _uncached_prompt(self, given: dict[str, Any], length: int) -> int:
        """The length of the prompt, also where the call repeats the last one with one more token.

        generate(use_cache=False) sends prompt and answer so far at every step, and the answer must not become question.
        Its steps are known by the images that it encoded ahead.
        """
        images, ids = (given.get("mm_encoder_outputs") or {}).get("image"), given.get("input_ids")
        cached = given.get("past_key_values") is not None or given.get("use_cache") is not False
        if cached or ids is None or images is None:
            return length
        self._uncached = {key: step for key, step in self._uncached.items() if step.images() is not None}
        before, prompt = self._uncached.get(id(images)), ids
        if before is not None and before.length == length - 1 and before.prompt.shape[0] == len(ids):
            # Beams reorder the answer so far, never the prompt.
            prompt = before.prompt if torch.equal(ids[:, : before.prompt.shape[1]], before.prompt) else ids
        self._uncached[id(images)] = _Uncached(weakref.ref(images), prompt, length)
        return int(prompt.shape[1])

    def after_model(self) -> None:
        """Forget this thread's innermost forward, which has ended or died."""
        running = self._forwards.get(threading.get_ident(), [])
        if running:
            running.pop()
        if not running:
            self._forwards.pop(threading.get_ident(), None)

    def require_idle(self) -> None:
        """Refuse to end quietly while other threads are inside a forward, whose hooks vanish under them."""
        if others := set(self._forwards) - {threading.get_ident()}:
            raise ValueError(
                f"{len(others)} other thread(s) are inside a call of the pruned model, which now fails or is wrong: "
                "join them before leaving the prune block"
            )

    def before_layer(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Cut a layer's arguments to the tokens that reach it."""
        state = self._state
        if state is None:
            return kwargs
        cache = kwargs.get("past_key_values")
        if cache is not None and number == 0 and state.choose is not None:
            adopt(cache, len(self.adapted.layers))
        layer = None if cache is None else cache.layers[number]
        return state.enter(layer, hidden, kwargs, self.adapted.decoder.config)

    def at_attention(self, number: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Choose, from the layer's own queries and keys, the tokens that stay."""
        if not self._forwards.get(threading.get_ident()):
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
        if stays is not None:
            state.leave(stays)

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the MLP on the rows that stay."""
        return hidden if (state := self._state) is None else state.gather(hidden)

    def after_mlp(self, output: torch.Tensor) -> torch.Tensor:
        """Give the MLP's output the rows of the residual."""
        return output if (state := self._state) is None else state.scatter(output)

    def after_layer(self, number: int, output: Any) -> Any:
        """Drop the rows that left; after the last layer, put those that are left back into their columns."""
        state = self._state
        if state is None:
            return output
        hidden = state.drop(output[0] if isinstance(output, tuple) else output)
        if number == len(self.adapted.layers) - 1:
            hidden = state.to_columns(hidden)
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
    arguments.require_full_attention(adapted)
    remover = Remover(adapted, plan, needs_question)
    with contextlib.ExitStack() as stack:
        stack.callback(remover.require_idle)
        stack.enter_context(tap_attention(adapted, remover.at_attention))
        handles = [
            adapted.model.register_forward_pre_hook(lambda *_: remover.begin(), prepend=True),
            adapted.model.register_forward_pre_hook(
                # Compiled code must come out of itself here, to be found and refused. (torch leaves `disable` untyped.)
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
