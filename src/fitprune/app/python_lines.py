"""The Python lines that do what is on the screen, whole: they run as they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from fitprune._support.messages import line as _line
from fitprune.app.recipes import FITTED
from fitprune.app.screen import Screen
from fitprune.recipes import published


@dataclasses.dataclass(frozen=True)
class Source:
    """Where what is served comes from, as Python.

    Attributes:
        loading: arguments of `load_model`.
        prompt_template: as for `make_batches`.
        pictures: `Picture.digest` of one that comes with the data -> the expression that gives it.
        beside: names of files and folders that are not named whole, since strangers read the lines.
    """

    loading: str
    prompt_template: str | None = None
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Sequence[str] = ()


def python_lines(screen: Screen, source: Source, statistics: str) -> str:
    """Write the lines.

    Args:
        screen: what is to be done.
        source: where model and pictures come from.
        statistics: lines that make `stats`; "" where there are none.
    """
    request, recipe = screen.request, screen.pruning.recipe
    picture = source.pictures.get(request.picture.digest, _text(request.picture.name))
    scorer = f", {_text(screen.pruning.scorer)}" if screen.pruning.scorer else ""
    named = f", scorer={_text(screen.pruning.scorer)}" if screen.pruning.scorer else ""
    recipe_lines = _recipe(screen, statistics)
    template = f", prompt_template={source.prompt_template!r}" if source.prompt_template else ""
    adapting = "from fitprune.families.adapter import adapt\n" if "adapt(" in recipe_lines else ""
    beside = [*source.beside, *([] if request.picture.digest in source.pictures else [request.picture.name])]
    first = f"# To be run beside {_line(', '.join(beside))}\n" if beside else ""
    return f"""{first}import fitprune
{adapting}from fitprune.families.inputs import to_model

model, processor = fitprune.load_model({source.loading})
{recipe_lines}
sample = fitprune.Sample("0", {_text(request.question)}, {picture})
[batch] = fitprune.make_batches([sample], processor, model=model{template})
inputs = to_model(batch, model)
with fitprune.prune(model, recipe{scorer}) as pruner:
    pruned = model.generate(**inputs, max_new_tokens={request.tokens}, do_sample=False)
    with pruner.paused():
        dense = model.generate(**inputs, max_new_tokens={request.tokens}, do_sample=False)
for name, ids in (("pruned", pruned), ("dense", dense)):
    answer = ids[:, inputs["input_ids"].shape[1] :]
    print(f"{{name}}: {{processor.batch_decode(answer, skip_special_tokens=True)[0]}}")

picture = sample.load_image()
[[kept]] = fitprune.kept_tokens(model, recipe, inputs, processor=processor, pictures=[picture]{named})
fitprune.draw_kept(picture, kept, layer={len(recipe.keep) - 1}).save("kept.png")
"""


def _recipe(screen: Screen, statistics: str) -> str:
    choice, recipe = screen.request.choice, screen.pruning.recipe
    share = round(choice.percent / 100, 6)
    if choice.recipe is not None:
        if published.split_name(choice.recipe):
            return f"recipe = {_text(choice.recipe)}"
        return f"recipe = fitprune.PruningRecipe.from_json({json.dumps(json.loads(recipe.to_json()))!r})"
    if not choice.percent:
        return f"recipe = fitprune.PruningRecipe.dense(adapt(model).fingerprint, {recipe.visual_tokens})"
    if choice.method == FITTED:
        return f"{statistics}\nrecipe = fitprune.fit(stats, flops_reduction={share})"
    target = "fitprune.Fitter(stats)" if statistics else _sizes(recipe.visual_tokens)
    budget = f'fitprune.checked_budget("flops_reduction", {share})'
    line = f"recipe = fitprune.make_method({_text(choice.method)}, {target}, {budget})"
    return f"{statistics}\n{line}".lstrip()


def _sizes(visual_tokens: int) -> str:
    return f"fitprune.Sizes(adapt(model).fingerprint, {visual_tokens})"


def _text(text: str) -> str:
    """Write text as Python does, in double quotes where it can be."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)
