"""A recipe on one model, switched on and off; several pruners of the same recipe share its hooks."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fitprune.engine.calls import paused
from fitprune.engine.choose import choose_by, quotas_by
from fitprune.engine.kept import Prefill
from fitprune.engine.remover import Remover, removing
from fitprune.engine.running import Choose
from fitprune.families.adapter import adapt
from fitprune.recipes.find import find_recipe, fitted_to
from fitprune.recipes.recipe import PruningRecipe, scorer_parts
from fitprune.scoring.scorers import Score, Scorer, get_scorer

# Decoders that are pruned now. The model's own hooks hold what is attached, so that only `detach` undoes it.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Attached]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # while a pruner is attached or detached


class _Attached:
    """One recipe on one model, shared by the pruners that attached it."""

    def __init__(self, key: tuple[Any, ...], removal: contextlib.AbstractContextManager[Remover]) -> None:
        self.key = key
        self.count = 0  # pruners that are attached
        self.stack = contextlib.ExitStack()
        self.remover = self.stack.enter_context(removal)
        self.remover.attached = self  # the model's hooks hold the remover, and so this


class Pruner(contextlib.ContextDecorator):
    """A recipe for one model, switched on by `with` or `attach` and off at the end of the block or by `detach`.

    Attributes:
        model: the model that is pruned, without what wraps it (PEFT, a pipeline, DataParallel).
        recipe: the recipe at work.
        scorer: what ranks the tokens.
        remover: removes them; None until it was attached.
    """

    def __init__(
        self,
        model: Any,
        recipe: PruningRecipe | str | os.PathLike[str] | None = None,
        scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
        *,
        pool_images: bool = False,
        force: bool = False,
        choose: Callable[[Scorer], Choose] = choose_by,
    ) -> None:
        """Arguments as for `prune`; `choose` makes of the scorer what says which rows stay."""
        self._adapted = adapt(model)
        self.model = self._adapted.model
        self.recipe = fitted_to(find_recipe(self.model, recipe), self._adapted.fingerprint, force=force)
        scorer = self.recipe.scorer if scorer is None else scorer
        self.scorer = get_scorer(scorer)
        spec = {"name": scorer} if isinstance(scorer, str) else scorer
        named = scorer_parts(spec) if isinstance(spec, Mapping) else self.scorer
        self._key = (self.recipe, named, pool_images, choose)
        self._pool_images = pool_images
        self._choose = choose
        self.remover: Remover | None = None  # the last one at work
        self._entered = 0
        self._before: Prefill | None = None  # the last record of another pruner
        self._unused = True

    def __call__(self, function: Any) -> Any:
        """Make a function that runs inside the block."""
        if not inspect.isfunction(function) and not inspect.ismethod(function):
            raise ValueError(
                f"prune(...) decorates functions, and was given a {type(function).__name__}: call the model"
            )
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(of_kind(function) for of_kind in kinds):
            raise ValueError(
                f"{function.__name__} runs after its call has returned, when the block is over: write "
                "`with prune(model, recipe):` inside it"
            )
        self._unused = False
        return super().__call__(function)

    def __enter__(self) -> Pruner:
        with _LOCK:
            self._unused = False
            attached = _ATTACHED.get(self._adapted.decoder, lambda: None)()
            if attached is None:
                attached = _Attached(
                    self._key,
                    removing(
                        self._adapted,
                        self._choose(self.scorer),
                        quotas_by(self.recipe, self._pool_images),
                        needs_question=self.scorer.query_aware,
                        reads_vision=self.scorer.reads_vision,
                    ),
                )
                _ATTACHED[self._adapted.decoder] = weakref.ref(attached)
            elif attached.key != self._key:
                raise ValueError(
                    "the model is in use by fitprune, pruned by another recipe or scorer: leave that block or detach() "
                    "that pruner first; for two recipes at once load the model twice, for a dense call use "
                    "`with pruner.paused():`"
                )
            attached.count += 1
            if not self._entered:
                self._before = attached.remover.calls.last
            self._entered += 1
            self.remover = attached.remover
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop pruning: the model is as before, unless another pruner of the same recipe is still attached.

        Calling it again does nothing.

        Raises:
            ValueError: another thread is still inside a call of the model.
        """
        with _LOCK:
            if not self._entered or self.remover is None:
                return
            self._entered -= 1
            attached = self.remover.attached
            attached.count -= 1
            if not attached.count:
                del _ATTACHED[self._adapted.decoder]
                attached.stack.close()

    @property
    def attached(self) -> bool:
        """Whether this pruner is at work."""
        return self._entered > 0

    @property
    def last(self) -> Prefill | None:
        """What the last prefill with images kept: this thread's, or any thread's where it had none; None before one."""
        last = None if self.remover is None else self.remover.calls.last
        return None if last is self._before else last

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Run the calls of this thread, or task of asyncio, dense inside the block, as for a comparison.

        That holds whichever pruner of the model is at work. Threads that are started inside are pruned as before.
        """
        return paused(self._adapted)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"Pruner({type(self.model).__name__}, {self.recipe!r}, {state})"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(vars(self).get("model"), name):
            raise AttributeError(
                f"a Pruner has no {name!r}: call model.{name} inside `with prune(model, recipe):`, or after "
                "`fitprune.attach(model, recipe)`"
            )
        raise AttributeError(f"'Pruner' object has no attribute {name!r}")

    def __del__(self) -> None:
        if vars(self).get("_unused"):
            warnings.warn(
                "prune(...) was never entered, so the model runs dense: write `with prune(model, recipe):`, or "
                "`pruner = fitprune.attach(model, recipe)`",
                RuntimeWarning,
                stacklevel=2,
            )
