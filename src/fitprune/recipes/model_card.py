"""The model card of a recipe: what it cuts, what it was fitted on, how to use it. Text alone; knows no hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitprune.recipes.recipe import PruningRecipe

_OURS = "<!-- Made by fitprune, which replaces it with the recipe. Without this line it stays as it is. -->"
# A folder or repository with one of these holds weights, and its card is theirs.
_MODEL_FILES = ("config.json", "adapter_config.json")

_CITATION = """\
```bibtex
@inproceedings{ye2025fitprune,
  title     = {Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models},
  author    = {Ye, Weihao and Wu, Qiong and Lin, Wenhao and Zhou, Yiyi},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2409.10197}
}
```"""


def wanted(names: Collection[str], card: str | None) -> bool:
    """Say whether a recipe's card belongs into a folder: not where the card is somebody else's, or a model's place.

    Args:
        names: the files of the folder.
        card: its README.md; None where it has none.
    """
    return not any(name in names for name in _MODEL_FILES) and (card is None or _OURS in card)


def card_of(recipe: PruningRecipe, name: str, base_model: str | None) -> str:
    """Write the card.

    Args:
        recipe: what it is about.
        name: what `prune` finds the recipe by: hub name or folder.
        base_model: hub name of the recipe's model; None where it has none.

    Returns:
        README.md's text, with the hub's metadata.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=base_model,
        library_name="fitprune",
        pipeline_tag="image-text-to-text",
        tags=["fitprune", "visual-token-pruning", recipe.model.model_type],
    )
    cut = 100 * recipe.cost().flops_reduction
    model = base_model or _model_name(recipe) or recipe.model.model_type
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n{_OURS}",
        f"# {_plain(model)}, {cut:.1f}% of its visual FLOPs cut",
        f"A pruning recipe: for each of the model's {len(recipe.keep)} decoder layers, the share of an image's visual "
        "tokens that is still there after it. It holds no weights and needs no training; which tokens leave, its "
        "scorer chooses for each input.",
        f"```python\n{_snippet(name, base_model)}\n```",
        "## Figures",
        _table(_figures(recipe)),
        "## Data",
        _table(_data(recipe)),
        "## Method",
        _method(recipe),
        _CITATION if _is_fitprunes(recipe) else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _snippet(name: str, base_model: str | None) -> str:
    return (
        "from fitprune import load_model, prune  # pip install fitprune\n"
        f"model, processor = load_model({base_model or 'MODEL'!r})\n"
        'inputs = processor(images=image, text=prompt, return_tensors="pt")\n'
        f"with prune(model, {name!r}):\n"
        "    ids = model.generate(**inputs)"
    )


def _figures(recipe: PruningRecipe) -> Iterator[tuple[str, str]]:
    cost, provenance = recipe.cost(), recipe.provenance
    if isinstance(budget := provenance.get("budget"), Mapping):
        yield "budget", ", ".join(f"{name} {_number(value)}" for name, value in budget.items())
    elif "nominal_percent" in provenance:
        yield "budget", f"{provenance['nominal_percent']}% of the visual FLOPs, nominally"
    if "tolerance" in provenance:
        yield "tolerance: share of received attention that a layer may lose", _number(provenance["tolerance"])
    yield "visual tokens of the image", str(cost.visual_tokens)
    yield "visual FLOPs cut (the paper's accounting)", f"{100 * cost.flops_reduction:.2f}%"
    yield "KV cache of the image cut", f"{100 * cost.kv_cache_reduction:.2f}%"
    yield "visual tokens that enter a layer, mean", f"{cost.mean_visual_tokens:.1f}"
    before = recipe.counts_before(cost.visual_tokens)
    yield "removed inside each layer", " ".join(map(str, recipe.counts(cost.visual_tokens)))
    if any(before):
        yield "removed before each layer", " ".join(map(str, before))
    if isinstance(found := provenance.get("divergence"), Mapping):
        for half, of in found.items():
            yield f"divergence from the dense model in nats, {half}", ", ".join(f"{k} {v:.4f}" for k, v in of.items())
    if isinstance(measured := provenance.get("evaluation"), Mapping):
        for what, value in measured.items():
            yield f"evaluation: {what}", _number(value)


def _data(recipe: PruningRecipe) -> Iterator[tuple[str, str]]:
    provenance = recipe.provenance
    samples = provenance.get("samples")
    if isinstance(samples, Mapping):
        yield "calibration samples", ", ".join(f"{half} {count}" for half, count in samples.items())
    elif samples is not None:
        yield "calibration samples", str(samples)
    if model := _model_name(recipe):
        yield "model", model
    measured = _measured(recipe)
    for name, what in (("weights", "its weights (digest)"), ("dtype", "its dtype")):
        if name in measured:
            yield what, str(measured[name])
    versions = [f"{name} {measured[name]}" for name in ("fitprune", "transformers", "torch") if name in measured]
    if versions:
        yield "versions", ", ".join(versions)


def _method(recipe: PruningRecipe) -> str:
    provenance = recipe.provenance
    parts = []
    if "method" in provenance:
        parts.append(f"Schedule by `{provenance['method']}`.")
    if "source" in provenance:
        parts.append(f"Made by {_plain(provenance['source'])}.")
    scorer = f"Tokens are ranked by `{_plain(recipe.scorer['name'])}`"
    parameters = _plain(json.dumps(recipe.scorer.get("parameters", {})))
    if len(parameters) > 60:
        scorer += " with parameters of its own (in the JSON)"
    elif parameters != "{}":
        scorer += f" with parameters `{parameters}`"
    parts.append(f"{scorer}.")
    if _is_fitprunes(recipe):
        parts.append("The method is FitPrune; the library is an independent implementation of it.")
    return " ".join(parts)


def _is_fitprunes(recipe: PruningRecipe) -> bool:
    """Whether the recipe is FitPrune's own, not another method's or a control."""
    return str(recipe.provenance.get("method", "fitprune")).partition(":")[0] == "fitprune"


def _measured(recipe: PruningRecipe) -> Mapping[str, Any]:
    measured = recipe.provenance.get("measured")
    return measured if isinstance(measured, Mapping) else {}


def _model_name(recipe: PruningRecipe) -> str:
    """Name the model that was measured; of a path only its end, since the rest is nobody's business."""
    name = str(_measured(recipe).get("model") or recipe.provenance.get("name") or "")
    parts = re.split(r"[/\\]", name.rstrip("/\\"))
    return name if len(parts) <= 2 and parts[0] else parts[-1]


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {_plain(what)} | {_plain(value)} |" for what, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Not stated in the recipe."


def _plain(value: Any) -> str:
    """One line that cannot end its cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
