"""The model "fitprune" of lmms-eval: any of its tasks on a LLaVA, dense or pruned.

    lmms-eval --model fitprune --model_args pretrained=MODEL,recipe=RECIPE --tasks TASK --batch_size 8

Only the step from messages to answers is here; tasks, prompts, metrics and files are lmms-eval's.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm

from fitprune._support import assets
from fitprune._support.processes import Processes
from fitprune.baselines.table import make_method, parse_name
from fitprune.calibration.batches import make_batches
from fitprune.calibration.measure import measure
from fitprune.calibration.prompts import encode
from fitprune.calibration.samples import load_samples
from fitprune.engine.prune import prune
from fitprune.families import adapter
from fitprune.families.inputs import to_model
from fitprune.families.loading import DTYPES, load_model
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats
from fitprune.integrations.lmms_eval_prompts import generation_arguments, prompt_of, read_template
from fitprune.recipes.recipe import PruningRecipe


class FitPrune(lmms):  # type: ignore[misc]  # lmms-eval has no types
    r"""A LLaVA of transformers, dense or pruned by a recipe.

    The recipe is `recipe`, or one fitted to `flops_reduction` from `stats` or `calibration`; without either the
    model is dense.

    Args:
        pretrained: folder or hub name; "digit-scenes" is the bundled model.
        recipe: recipe file or folder, hub name, or a published one such as llava-1.5-7b:60.
        flops_reduction: budget to fit a recipe to, as a fraction.
        stats: statistics to fit from, made by `fitprune measure`.
        calibration: data to measure now instead, as for `fitprune measure --data`.
        calibration_samples: number of samples to draw from it; all by default.
        image_folder: folder that the calibration images' names are relative to; the data file's by default.
        method: what is solved for the budget: fitprune, or a published method or control (docs/baselines.md).
        seed: of a method that draws at random.
        dtype: "auto" (the checkpoint's), float32, bfloat16 or float16.
        device: for example cpu or cuda:1; by default this process' GPU, if there is one.
        device_map: how accelerate spreads one model over devices, such as "auto"; instead of `device`.
        attn_implementation: attention of the model; transformers' choice by default.
        quantization: quantize the weights while loading, such as bnb-4bit (docs/quantization.md).
        revision: branch, tag or commit on the hub; the main branch by default.
        trust_remote_code: run the code that a hub repository brings; off.
        batch_size: questions in a batch.
        max_batch_size: ignored: lmms-eval passes it on, but there is no automatic batch size.
        prompt_template: used instead of the chat template: text with `{question}` and the image token, or a file that
            holds it. `\n` stands for a line break. The image token is repeated for each image of a question.

    Raises:
        ValueError: arguments that contradict each other or miss their partner, a value that is out of range, a recipe
            of another model, or a model family that is not supported.
        OSError: a file or model is not there.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        recipe: str | None = None,
        flops_reduction: float | None = None,
        stats: str | None = None,
        calibration: str | None = None,
        calibration_samples: int | None = None,
        image_folder: str | None = None,
        method: str = "fitprune",
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        prompt_template: str | None = None,
    ) -> None:
        super().__init__()
        _require_one_way(recipe, flops_reduction, stats, calibration)
        self.batch_size = _positive(batch_size)
        if parse_name(method)[0] != "fitprune" and flops_reduction is None:
            raise ValueError(f"method={method}: is solved for a budget; pass flops_reduction=0.6 too")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        # What can be read without the model is read before it: a wrong path is found in a second.
        used = PruningRecipe.named(recipe) if recipe is not None else None
        measured = AttentionStats.load(stats) if stats is not None else None
        samples = None
        if calibration is not None:
            samples = load_samples(assets.resolve(calibration), image_folder, samples=calibration_samples)

        self.accelerator = Accelerator()
        if device_map is not None and (device is not None or self.accelerator.num_processes > 1):
            raise ValueError(
                f"device_map={device_map!r}: spreads one model over devices in one process; "
                "leave it out, or leave out device and run one process"
            )
        self.device = torch.device(device) if device is not None else self.accelerator.device
        self.model, self.processor = load_model(
            pretrained,
            revision=revision,
            dtype=dtype,
            device=None if device_map is not None else self.device,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization=quantization,
        )
        self.prompt_template = read_template(prompt_template, self.processor.image_token)

        if samples is not None:
            processes = Processes()
            batches = make_batches(
                samples,
                self.processor,
                prompt_template=self.prompt_template,
                processes=processes,
                model=self.model,
            )
            with tempfile.TemporaryDirectory() as own:
                folder = processes.gather(own)[0]  # the first's, for all
                measured = measure(self.model, batches, parts=folder, total=len(samples), progress=True)
        if flops_reduction is not None:
            assert measured is not None
            used = make_method(method, Fitter(measured), checked_budget("flops_reduction", flops_reduction), seed=seed)
        if used is not None:
            used.model.require_same(adapter.adapt(self.model).fingerprint, what="recipe")
        self.recipe = used

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions in batches; those that are generated alike share one.

        Args:
            requests: lmms-eval's, each with the function that makes its messages.

        Returns:
            The answers in the order of the requests.

        Raises:
            ValueError: a message has video or audio, a prompt cannot be formed, or as for `fitprune.prune`.
        """
        # Longest text first: what does not fit in memory is found at once, and padding stays short.
        order = Collator(
            [request.args for request in requests], lambda r: -len(r[0]), group_fn=lambda r: r[2], grouping=True
        )
        answers = []
        pruned = contextlib.nullcontext() if self.recipe is None else prune(self.model, self.recipe)
        bar = tqdm(total=len(requests), desc="fitprune", unit="question", disable=self.rank != 0 or None)
        with bar, pruned, torch.inference_mode():
            for chunk in order.get_batched(n=self.batch_size):
                messages = [make(self.task_dict[task][split][doc]) for _, make, _, doc, task, split in chunk]
                names = [f"{task}, {split} {doc}" for _, _, _, doc, task, split in chunk]
                answers += self.answer([ChatMessages(messages=one) for one in messages], chunk[0][2], names)
                bar.update(len(chunk))
        in_order: list[str] = order.get_original(answers)
        return in_order

    def answer(
        self, batch: Sequence[ChatMessages], generation: Mapping[str, Any], names: Sequence[str] | None = None
    ) -> list[str]:
        """Answer one batch.

        Args:
            batch: for each question, its messages.
            generation: the task's `generation_kwargs`.
            names: of the questions, for messages; by default their numbers in the batch.
        """
        prompts, images = zip(*map(self.prompt, batch), strict=True)
        names = names or [f"question {number} of the batch" for number in range(1, len(batch) + 1)]
        inputs = encode(self.processor, prompts, images, names)
        ids = self.model.generate(**to_model(inputs, self.model), **generation_arguments(generation))
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def prompt(self, messages: ChatMessages) -> tuple[str, list[Image.Image]]:
        """Put messages into the form that the model was trained on; see `lmms_eval_prompts.prompt_of`."""
        return prompt_of(messages, self.processor, self.prompt_template)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: lmms-eval's rounds are prompts of their own format for each task."""
        raise NotImplementedError("tasks of several rounds are not supported; choose a task of type generate_until")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval makes such requests for models without messages alone."""
        raise NotImplementedError(
            "loglikelihood is not supported: lmms-eval gives it to models without messages alone; choose the task's "
            "variant of type generate_until"
        )


def _require_one_way(
    recipe: str | None, flops_reduction: float | None, stats: str | None, calibration: str | None
) -> None:
    """Refuse arguments that name two recipes, or a budget without anything to fit it from."""
    if recipe is not None and flops_reduction is not None:
        raise ValueError(
            f"recipe={recipe} and flops_reduction={flops_reduction}: pass one of them, or neither for dense"
        )
    if flops_reduction is not None:
        checked_budget("flops_reduction", flops_reduction)
        if (stats is None) == (calibration is None):
            raise ValueError(
                f"flops_reduction={flops_reduction}: a recipe is fitted from either stats=FILE (fitprune measure) or "
                "calibration=DATA (measured now); pass one of them"
            )
    elif stats is not None or calibration is not None:
        source = f"stats={stats}" if stats is not None else f"calibration={calibration}"
        raise ValueError(f"{source}: nothing to fit from it; pass flops_reduction=0.6 too, or leave it out")


def _positive(batch_size: int | str) -> int:
    number = int(batch_size) if str(batch_size).isdecimal() else 0
    if number < 1:
        raise ValueError(f"batch_size={batch_size}: must be an integer of at least 1; 'auto' is not supported")
    return number
