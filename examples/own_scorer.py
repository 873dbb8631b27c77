"""A scorer of your own: registered by name, saved in a recipe, and at work on a model. Needs no network.

Run it from any folder: `python own_scorer.py`. What register_scorer takes, and how a package brings a scorer to every
process: docs/extending.md.
"""

import dataclasses

import torch

from fitprune import LayerView, fit, load_model, load_samples, make_batches, measure, prune, register_scorer


def tempered(view: LayerView, *, power: float = 1.0) -> torch.Tensor:
    """FitPrune's score, in which self attention counts by a power of your choice: [batch, tokens], higher is kept."""
    return view.self_attention**power * view.cross_attention


register_scorer("tempered", tempered)

model, processor = load_model("digit-scenes")  # the small LLaVA in the package
samples = load_samples("digit-scenes/calibration", samples=16)
recipe = fit(measure(model, make_batches(samples, processor)), flops_reduction=0.6)
scorer = {"name": "tempered", "parameters": {"power": 0.5}}
dataclasses.replace(recipe, scorer=scorer).save("tempered.json")

inputs = next(make_batches(samples[:1], processor))
for used in (recipe, "tempered.json"):
    with prune(model, used) as pruner:
        model.generate(**inputs, max_new_tokens=8)
    columns = pruner.last.after[-1][0]
    print(
        f"{pruner.recipe.scorer['name']}: {[layer[0][0] for layer in pruner.last.kept]} visual tokens after each layer"
    )
    print(f"positions of the prompt after the last layer: {columns[columns >= 0].tolist()}")
