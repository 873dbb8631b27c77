"""The hooks inside a pruned decoder: before and after each layer, and around each MLP."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fitprune.engine.attention_tap import AttentionTap
from fitprune.families.adapter import AdaptedModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Entering = Callable[[torch.Tensor, dict[str, Any]], tuple[torch.Tensor, dict[str, Any]]]


def entering(enter: Entering) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Arguments]:
    """Make a hook that calls `enter` on a layer's arguments, its input by place or by name."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if args:
            hidden, kwargs = enter(args[0], kwargs)
            return (hidden, *args[1:]), kwargs
        hidden, kwargs = enter(kwargs["hidden_states"], kwargs)
        return (), {**kwargs, "hidden_states": hidden}

    return hook


class LayerWork(Protocol):
    """What is done in a layer: the part of `fitprune.engine.remover.Remover` that the hooks call."""

    before_layer: Callable[..., Any]
    before_mlp: Callable[..., Any]
    after_mlp: Callable[..., Any]
    after_layer: Callable[..., Any]


class LayerHooks:
    """The hooks inside the decoder, on while some call needs them.

    A step of decoding in which no layer hides a key runs without them: their time would be a tenth of a small model's
    step.

    Args:
        work: what the hooks call.
        adapted: the model.
        tap: goes on and off with them.
        lock: while it is held no call begins.
    """

    def __init__(self, work: LayerWork, adapted: AdaptedModel, tap: AttentionTap, lock: threading.Lock) -> None:
        self._work = work
        self._adapted = adapted
        self._tap = tap
        self._lock = lock
        self._handles: list[Any] = []

    def on(self) -> None:
        """Put them on, if they are off."""
        work, adapted = self._work, self._adapted
        with self._lock:
            self._tap.on()
            if self._handles:
                return
            for number, (layer, mlp) in enumerate(zip(adapted.layers, adapted.mlps, strict=True)):
                if number:
                    enter = functools.partial(work.before_layer, number)
                    self._handles.append(layer.register_forward_pre_hook(entering(enter), with_kwargs=True))
                self._handles += [
                    mlp.register_forward_pre_hook(lambda _, args: (work.before_mlp(args[0]), *args[1:])),
                    mlp.register_forward_hook(lambda _, __, output: work.after_mlp(output)),
                    layer.register_forward_hook(lambda _, __, output, number=number: work.after_layer(number, output)),
                ]

    def off_if(self, allowed: Callable[[], bool] = lambda: True) -> None:
        """Take them off, if they are on and `allowed` returns True; no call begins between the two."""
        if not self._handles:
            return
        with self._lock:
            if allowed():
                self._tap.off()
                for handle in self._handles:
                    handle.remove()
                self._handles.clear()
