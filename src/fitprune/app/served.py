"""The model that the app serves: prompts, recipes, answers, and what is left of a picture. One pass at a time.

Knows no web page, and nothing of who asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fitprune._support.host import execution_device
from fitprune.app.limits import Limits, Picture
from fitprune.app.looked import attention_of_word
from fitprune.app.recipes import Recipes
from fitprune.app.turns import Answer, in_turn
from fitprune.calibration.batches import make_batches
from fitprune.calibration.measure import measure
from fitprune.calibration.samples import Sample
from fitprune.costs.cost import Cost
from fitprune.engine.prune import prune
from fitprune.evaluation.answers import prompt_sizes
from fitprune.families.adapter import adapt
from fitprune.families.grids import Grid
from fitprune.families.inputs import to_model
from fitprune.fitting.fit import Fitter
from fitprune.pictures.kept import KeptImage, kept_tokens
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import get_scorer

KNOWN_PICTURES = 32  # whose grids are kept
_LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of each device in this process


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A picture and a question, ready for the model.

    Attributes:
        inputs: what the processor made of them, on the model's device.
        sizes: visual tokens, text tokens before them, text tokens, and crops that the vision tower sees.
    """

    inputs: dict[str, Any]
    sizes: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A recipe, and what ranks the tokens instead of its own scorer; None for that."""

    recipe: PruningRecipe
    scorer: str | None = None


class ServedModel:
    """A model that several people use at once, one pass at a time.

    Args:
        model: the model.
        processor: its processor.
        recipes: what may be chosen.
        limits: for everybody.
        prompt_template: as for `make_batches`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        recipes: Recipes | None = None,
        limits: Limits | None = None,
        prompt_template: str | None = None,
    ) -> None:
        self.adapted = adapt(model)
        self.model = self.adapted.model
        self.processor = processor
        self.recipes = recipes or Recipes(self.adapted.fingerprint)
        self.limits = limits or Limits()
        self.prompt_template = prompt_template
        self.layers = len(self.adapted.layers)
        self._device = _LOCKS[str(execution_device(self.model))]
        self._threads = ThreadPoolExecutor(2, "answers")
        self._grids: dict[str, list[tuple[Grid, ...]]] = {}

    def prompt(self, picture: Picture, question: str) -> Prompt:
        """Make a prompt; a ValueError says what the processor refuses."""
        sample = Sample("0", question, picture.image(), where=picture.name)
        with self._device:  # a tokenizer serves one thread at a time
            [batch] = make_batches([sample], self.processor, prompt_template=self.prompt_template, model=self.model)
            inputs = to_model(batch, self.model)
        [sizes] = prompt_sizes(self.adapted, inputs)
        return Prompt(inputs, tuple(sizes))  # type: ignore[arg-type]  # four of them

    def cost(self, prompt: Prompt, recipe: PruningRecipe) -> Cost:
        """Price a recipe for a prompt."""
        visual, before, text, crops = prompt.sizes
        size = self.model.dtype.itemsize
        return recipe.cost(visual_tokens=visual, text_before=before, text_tokens=text, crops=crops, value_bytes=size)

    def answers(self, prompt: Prompt, pruning: Pruning, tokens: int, *, dense: bool = True) -> Generator[list[Answer]]:
        """Answer pruned and dense, in turn, a token each; the device is taken until the last token, or `close`.

        Args:
            prompt: of `prompt`.
            pruning: how tokens leave.
            tokens: the most of an answer.
            dense: whether the dense model answers too.

        Yields:
            The pruned answer so far, and the dense one.
        """
        generate = functools.partial(
            self.model.generate, **prompt.inputs, max_new_tokens=tokens, do_sample=False, num_beams=1
        )
        with self._device, prune(self.model, pruning.recipe, pruning.scorer) as pruner:

            def without(streamer: Any) -> None:
                with pruner.paused():
                    generate(streamer=streamer)

            both: list[Callable[[Any], Any]] = [lambda streamer: generate(streamer=streamer), without]
            turns = in_turn(both if dense else both[:1], self._threads)
            with contextlib.closing(turns):
                yield from turns

    def wait(self) -> None:
        """Wait until the device is free, a few seconds at most."""
        if self._device.acquire(timeout=5):
            self._device.release()

    def kept(self, prompt: Prompt, picture: Picture, pruning: Pruning) -> list[KeptImage]:
        """Say what is left of a picture at each layer, and each token's score where it was asked for."""
        known = self._grids.get(picture.digest)  # where tokens lie depends on the picture alone
        with self._device:
            [images] = kept_tokens(
                self.model,
                pruning.recipe,
                prompt.inputs,
                processor=self.processor,
                pictures=[picture.image()],
                scorer=pruning.scorer,
                scores=True,
                grids=None if known is None else [known],
            )
        if known is None:
            while len(self._grids) >= KNOWN_PICTURES:
                self._grids.pop(next(iter(self._grids)), None)
            self._grids[picture.digest] = [image.grids for image in images]
        return images

    def attention_of(
        self, prompt: Prompt, pruning: Pruning, answer: Sequence[int], word: Sequence[int]
    ) -> torch.Tensor:
        """Say what the model looked at when it wrote a word; see `attention_of_word`."""
        scorer = get_scorer(pruning.recipe.scorer if pruning.scorer is None else pruning.scorer)
        with self._device:
            return attention_of_word(self.adapted, pruning.recipe, scorer, prompt.inputs, answer, word)

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of an answer's tokens."""
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def measure(
        self, samples: Sequence[Sample], progress: Callable[[int], Any], lines: str, *, batch_size: int = 1
    ) -> None:
        """Measure statistics, and offer the recipes that are fitted from them.

        Args:
            samples: images and questions.
            progress: gets the number of samples so far.
            lines: Python lines that do the same.
            batch_size: samples in a pass.

        Raises:
            ValueError: a sample cannot be used.
        """
        batches = make_batches(
            samples, self.processor, batch_size=batch_size, prompt_template=self.prompt_template, model=self.model
        )

        def watched() -> Iterator[Any]:
            for number, batch in enumerate(batches):
                yield batch
                progress(min((number + 1) * batch_size, len(samples)))

        with self._device:
            stats = measure(self.model, watched())
        self.recipes.use(Fitter(stats), lines)
