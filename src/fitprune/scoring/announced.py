"""What a scorer is shown: a stand-in for a view, which its flags open and which it cannot change.

Shapes as in `fitprune.scoring.view`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fitprune.scoring.received import Attention, ReceivedAttention
from fitprune.scoring.view import Quotas

# The flag of `Scorer` that announces each part of a view, and of its prompt.
VIEW_FLAGS = dict.fromkeys(
    ("question", "cross_attention", "last_attention", "received", "states", "attention"), "query_aware"
) | {"cls_attention": "reads_vision", "previous": "reads_previous"}
PROMPT_FLAGS = {
    "ids": "query_aware",
    "cls_attention": "reads_vision",
    "vision": "reads_vision",
    "received": "accumulates",
}
_TEXT_ROWS = {"hidden": 1, "keys": 1, "value_norms": 2}  # what has rows of text, and in which dimension
# Instead of functions that would give or be what has no version: a kernel's own tensors, a module with its weights.
_FUNCTIONS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "attention": lambda stand_in: lambda: stand_in.states,
    "vision": lambda stand_in: lambda: stand_in.cls_attention,
    "norm": lambda stand_in: lambda hidden: stand_in._view.norm(hidden),
}


class Announced:
    """A view, or its prompt, that cannot be changed and refuses to show what the scorer's flags do not announce.

    Args:
        view: what is shown.
        announced: the scorer's flags.
        flags: the flag that announces each part.
        versions: gets each tensor that is shown: its name, itself and its version, which a change in place raises.
    """

    _versions: list[tuple[str, torch.Tensor, int]]

    def __init__(
        self,
        view: Any,
        announced: Mapping[str, Any],
        flags: Mapping[str, str],
        versions: list[tuple[str, torch.Tensor, int]],
    ) -> None:
        vars(self).update(_view=view, _announced=announced, _flags=flags, _versions=versions)

    @property  # type: ignore[misc]  # read-only
    def __class__(self) -> Any:  # so that it is an instance of what it stands for
        return self._view.__class__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "accumulate":  # a copy has no `_view` yet
            raise AttributeError(name)
        self._require(self._flags.get(name), name)
        value = getattr(self._view, name)
        if name in ("prompt", "previous") and value is not None:
            flags = PROMPT_FLAGS if name == "prompt" else VIEW_FLAGS
            value = Announced(value, self._announced, flags, self._versions)
        elif name in _FUNCTIONS:
            return _FUNCTIONS[name](self)
        else:
            if name in _TEXT_ROWS and not self._announced["query_aware"]:
                text = self._view.image < 0
                value = value.masked_fill(text[:, None] if _TEXT_ROWS[name] == 2 else text[..., None], 0)
            value = self._watched(name, value)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"the scorer sets {name} of its view: must change nothing that it is shown")

    def __delattr__(self, name: str) -> None:
        raise ValueError(f"the scorer deletes {name} of its view: must change nothing that it is shown")

    def by_head(self, *kinds: str) -> dict[str, torch.Tensor]:
        """As `LayerView.by_head`."""
        for kind in kinds:
            self._require(None if kind == "self" else "query_aware", f"by_head({kind!r})")
        attention: dict[str, torch.Tensor] = self._watched("by_head", self._view.by_head(*kinds))
        return attention

    def _require(self, flag: str | None, name: str) -> None:
        if flag and not self._announced[flag]:
            raise ValueError(
                f"the scorer reads {name} of its view, which it does not announce: make it Scorer(..., {flag}=True)"
            )

    def _watched(self, name: str, value: Any) -> Any:
        """Note the version of each tensor in a value; of what has no version, and of a list, give a copy."""
        if isinstance(value, torch.Tensor):
            if value.is_inference():
                return value.clone()
            self._versions.append((name, value, value._version))
        elif isinstance(value, dict):
            return {key: self._watched(name, part) for key, part in value.items()}
        elif isinstance(value, (Attention, ReceivedAttention, Quotas)):
            parts = {key: part for key, part in vars(value).items() if isinstance(part, torch.Tensor)}
            return dataclasses.replace(value, **self._watched(name, parts))
        return list(value) if isinstance(value, list) else value
