"""Take visual tokens out of running prefills: the hooks on a model, which look up the running call and let it act.

At a layer that removes, the tokens leave after its attention: the layer's KV cache keeps them, its MLP and all later
layers never see them. transformers keeps the residual in a local variable of the layer's forward, so the MLP runs on
the kept rows only (taken before, put back after) and the rows are dropped at the layer's end. Positions stay original.
After the last layer the rows return to their columns, zero where a token left, so that logits, labels and indices of
logits mean what they mean in the dense model.

Shapes: B batch, m rows present at a layer, d hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fitprune._support import host
from fitprune.engine import arguments
from fitprune.engine.arguments import Call
from fitprune.engine.attention_tap import COPIED, tap_attention
from fitprune.engine.cache import PrunedLayer, adopt, is_pruned, require_plain, require_whole
from fitprune.engine.calls import Calls
from fitprune.engine.layer_hooks import Arguments, LayerHooks, entering
from fitprune.engine.layer_inputs import LayerInputs
from fitprune.engine.prefill import Removal, begin_prefill
from fitprune.engine.rotary import RotaryOffsets
from fitprune.engine.running import Choose, RunningPrefill, RunningStep
from fitprune.families.adapter import AdaptedModel
from fitprune.families.clip_tower import watching
from fitprune.families.images import given_images
from fitprune.scoring.received import Attention
from fitprune.scoring.view import Quotas

# From the name of what the remover does in a layer, and the function that does it, to the function that it then calls.
Observe = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class Remover:
    """What the hooks on one model do; made and undone by `removing`.

    Args:
        removal: what removes the tokens.
        observe: as for `removing`.

    Attributes:
        calls: the model's running calls.
        attached: what is to live as long as the hooks that are on the model.
    """

    def __init__(self, removal: Removal, observe: Observe) -> None:
        self.calls = Calls(removal.adapted)
        self.attached: Any = None
        self.hooks: LayerHooks | None = None
        self.rotary = RotaryOffsets(removal.adapted)
        self._removal = removal
        self._adapted = removal.adapted
        self.before_layer = observe("before_layer", self._before_layer)
        self.after_attention = observe("after_attention", self._after_attention)
        self.before_mlp = observe("before_mlp", self._before_mlp)
        self.after_mlp = observe("after_mlp", self._after_mlp)
        self.after_layer = observe("after_layer", self._after_layer)

    def before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Begin a call: find the visual tokens of a prefill, and refuse what cannot be pruned exactly."""
        if model is not self._adapted.model:
            raise ValueError(COPIED)
        if self.calls.paused:
            return args, kwargs
        values = self._named(args, kwargs)
        cache = host.cache_of(self._adapted.model, values)
        has_images = given_images(values) is not None
        if not has_images:
            arguments.require_no_visual_tokens(self._adapted, values, cache)
        elif cache is not None:
            require_plain(cache, self._adapted)  # first: with a static cache generate makes masks of a form of its own
        if not is_pruned(cache):
            require_whole(cache)
            if not has_images:  # text alone, where even a generated image token is no image: as the dense model
                return self._text_alone(args, kwargs, values, cache)
        call = Call(values, cache, *arguments.valid_columns(values, cache))
        arguments.require_left_padding(self._adapted, call.valid)
        running: RunningPrefill | RunningStep
        if has_images:
            running, changed = begin_prefill(self._removal, call, self.calls)
        else:
            running, changed = RunningStep(LayerInputs(self._adapted, call)), {}
        rotary, offset = self.rotary.positions(call)
        if isinstance(running, RunningPrefill):
            running.rope_offset = offset
        counted = arguments.counted_positions(call)
        if (positions := rotary if counted is None else counted) is not None:
            changed["position_ids"] = positions
        self.calls.begin(running)
        return ((), {**values, **changed}) if changed else (args, kwargs)

    def _text_alone(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Any], cache: Any
    ) -> Arguments:
        """Let a call of text alone run as in the dense model, but with its own conversation's rotary positions."""
        past = 0 if cache is None else cache.get_seq_length()
        if not past or self.rotary.offset_of(cache) is None:
            return args, kwargs
        positions, _ = self.rotary.positions(Call(values, cache, None, past))
        return ((), {**values, "position_ids": positions}) if positions is not None else (args, kwargs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        names = host.parameters(type(self._adapted.model).forward)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def after_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End a call, also one that failed."""
        self.calls.leave()
        if self.rotary.tracked and output is not None and not self.calls.paused:
            values, cache = self._named(args, kwargs), host.cache_in(output)
            # A conversation that began with text alone: another one's offset must not become its own.
            if given_images(values) is None and cache is not None and self.rotary.offset_of(cache) is None:
                length = arguments.call_length(values)
                if cache.get_seq_length() == length:
                    self.rotary.keep(cache, torch.zeros(1, 1, dtype=torch.long, device=self._adapted.model.device))

    def before_first_layer(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Put the other hooks on where the call needs them, and go on as at any layer."""
        assert self.hooks is not None
        if not self.calls.inside:
            raise ValueError(
                "the decoder of a pruned model runs, but not through a call of the model itself, so nothing was "
                "pruned: call the model that prune was given, neither a part of it nor a torch.compile'd wrapper, and "
                "attach while no call is running"
            )
        running = self.calls.current
        if running is None:
            return hidden, kwargs
        cache = host.cache_of(self._adapted.layers[0], kwargs)
        if isinstance(running, RunningPrefill):
            if cache is not None:
                adopt(cache, self._adapted)  # the model may have made it itself
                self.rotary.keep(cache, running.rope_offset)
        elif running.sees_every_key(cache, kwargs.get("attention_mask")):
            self.hooks.off_if(self.calls.is_only_one)
            for layer in cache.layers:
                if isinstance(layer, PrunedLayer):
                    layer.expect_step()
            return hidden, kwargs
        self.hooks.on()
        changed: tuple[torch.Tensor, dict[str, Any]] = self.before_layer(0, hidden, kwargs)
        return changed

    def _before_layer(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        running = self.calls.current
        return (hidden, kwargs) if running is None else running.before_layer(number, hidden, kwargs)

    def at_attention(self, number: int, attention: Callable[[], Attention]) -> Callable[[Attention], None] | None:
        """Let a prefill see each layer's queries and keys: after its attention, or instead of it if computed ahead."""
        prefill = self.calls.prefill
        if prefill is None:
            return None
        if prefill.stop is not None:
            prefill.stop(attention())
        return functools.partial(self.after_attention, prefill, number)

    def _after_attention(self, prefill: RunningPrefill, number: int, attention: Attention) -> None:
        prefill.after_attention(number, attention)

    def _before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if (prefill := self.calls.prefill) is None else prefill.before_mlp(hidden)

    def _after_mlp(self, output: Any) -> Any:
        return output if (prefill := self.calls.prefill) is None else prefill.after_mlp(output)

    def _after_layer(self, number: int, output: Any) -> Any:
        running = self.calls.current
        if running is None:
            return output
        hidden = running.after_layer(number, output[0] if isinstance(output, tuple) else output)
        if isinstance(running, RunningPrefill) and number == len(self._adapted.layers) - 1:
            self.calls.finish(running.record)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def removing(
    adapted: AdaptedModel,
    choose: Choose,
    quotas: Callable[[torch.Tensor], Quotas] | None = None,
    *,
    needs_question: bool = True,
    reads_vision: bool = False,
    observe: Observe = lambda name, function: function,
) -> Iterator[Remover]:
    """Let `choose` remove visual tokens from every prefill of the model, until the block ends.

    Args:
        adapted: the model.
        choose: says, of a view, which rows stay.
        quotas: makes, from a prefill's images [B, Q], what views have as `quotas`; None for views without.
        needs_question: whether `choose` reads cross attention, so that a prompt without a question is refused.
        reads_vision: whether it reads the attention of the vision tower's [CLS] token.
        observe: wraps what the remover does in a layer, as to time it: gets "before_layer", "after_attention",
            "before_mlp", "after_mlp" or "after_layer" with the function of that name, and returns one to call instead.

    Yields:
        The remover at work.

    Raises:
        ValueError: the model is pruned or measured already, or has no [CLS] token to read; on a call that cannot be
            pruned exactly, from that call; at the end, if another thread is inside a call.
    """
    arguments.require_uncompiled(adapted)
    with contextlib.ExitStack() as stack:
        tower = stack.enter_context(watching(adapted)) if reads_vision else None
        remover = Remover(Removal(adapted, choose, quotas, needs_question, tower), observe)
        stack.enter_context(remover.rotary.in_generate())
        stack.callback(remover.calls.require_no_others)
        tap = stack.enter_context(tap_attention(adapted, remover.at_attention))
        remover.hooks = hooks = LayerHooks(remover, adapted, tap, remover.calls.lock)
        stack.callback(hooks.off_if)
        handles = [
            # Before any other hook can fail: `after_model` leaves the call in any case.
            adapted.model.register_forward_pre_hook(lambda *_: remover.calls.enter(), prepend=True),
            adapted.model.register_forward_pre_hook(
                # Compiled code must come out of itself here, to be found and refused. (torch leaves `disable` untyped.)
                torch.compiler.disable(remover.before_model),  # type: ignore[no-untyped-call]  # torch leaves it untyped
                with_kwargs=True,
            ),
            adapted.model.register_forward_hook(
                lambda _, *call: remover.after_model(*call), always_call=True, with_kwargs=True
            ),
            adapted.layers[0].register_forward_pre_hook(entering(remover.before_first_layer), with_kwargs=True),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield remover
