"""The model card of a recipe: what it cuts, what it was fitted on, how to use it. Text alone; knows no hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fitprune.costs.cost import Cost
from fitprune.costs.counts import Counts

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
    """Say whether a recipe's card belongs into a folder: not beside a model, and not over a card that is not ours.

    Args:
        names: the files of the folder.
        card: its README.md; None where it has none.
    """
    return not any(name in names for name in _MODEL_FILES) and (card is None or _OURS in card)


def card_of(
    name: str,
    base_model: str | None,
    *,
    model_type: str,
    cost: Cost,
    counts: Counts,
    scorer: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """Write the card of a recipe, README.md with the hub's metadata; see `PruningRecipe.card`."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=base_model,
        library_name="fitprune",
        pipeline_tag="image-text-to-text",
        tags=["fitprune", "visual-token-pruning", model_type],
    )
    model = base_model or _model_name(provenance) or model_type
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n{_OURS}",
        f"# {_plain(model)}, {100 * cost.flops_reduction:.1f}% of its visual FLOPs cut",
        f"A pruning recipe: for each of the model's {len(counts.kept)} decoder layers, the share of an image's visual "
        "tokens that is still there after it. It holds no weights and needs no training; which tokens leave, its "
        "scorer chooses for each input.",
        f"```python\n{_snippet(name, base_model)}\n```",
        "## Figures",
        _table(_figures(cost, counts, provenance)),
        "## Data",
        _table(_data(provenance)),
        "## Method",
        _method(scorer, provenance),
        _CITATION if _is_fitprunes(provenance) else "",
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


def _figures(cost: Cost, counts: Counts, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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
    yield "removed inside each layer", " ".join(map(str, counts.removed))
    if any(counts.before):
        yield "removed before each layer", " ".join(map(str, counts.before))
    if isinstance(divergence := provenance.get("divergence"), Mapping):
        for half, of in divergence.items():
            yield f"divergence from the dense model in nats, {half}", ", ".join(f"{k} {v:.4f}" for k, v in of.items())
    if isinstance(measured := provenance.get("evaluation"), Mapping):
        for what, value in measured.items():
            yield f"evaluation: {what}", _number(value)


def _data(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    samples = provenance.get("samples")
    if isinstance(samples, Mapping):
        yield "calibration samples", ", ".join(f"{half} {count}" for half, count in samples.items())
    elif samples is not None:
        yield "calibration samples", str(samples)
    if model := _model_name(provenance):
        yield "model", model
    measured = _measured(provenance)
    for name, what in (("weights", "its weights (digest)"), ("dtype", "its dtype")):
        if name in measured:
            yield what, str(measured[name])
    versions = [f"{name} {measured[name]}" for name in ("fitprune", "transformers", "torch") if name in measured]
    if versions:
        yield "versions", ", ".join(versions)


def _method(scorer: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    parts = []
    if "method" in provenance:
        parts.append(f"Schedule by `{provenance['method']}`.")
    if "source" in provenance:
        parts.append(f"Made by {_plain(provenance['source'])}.")
    ranking = f"Tokens are ranked by `{_plain(scorer['name'])}`"
    parameters = _plain(json.dumps(scorer.get("parameters", {})))
    if len(parameters) > 60:
        ranking += " with parameters of its own (in the JSON)"
    elif parameters != "{}":
        ranking += f" with parameters `{parameters}`"
    parts.append(f"{ranking}.")
    if _is_fitprunes(provenance):
        parts.append("The method is FitPrune; the library is an independent implementation of it.")
    return " ".join(parts)


def _is_fitprunes(provenance: Mapping[str, Any]) -> bool:
    """Say whether the recipe is FitPrune's own, not another method's or a control."""
    return str(provenance.get("method", "fitprune")).partition(":")[0] == "fitprune"


def _measured(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    measured = provenance.get("measured")
    return measured if isinstance(measured, Mapping) else {}


def _model_name(provenance: Mapping[str, Any]) -> str:
    """Name the model that was measured; of a path only its end, since the rest may be private."""
    name = str(_measured(provenance).get("model") or provenance.get("name") or "")
    parts = re.split(r"[/\\]", name.rstrip("/\\"))
    return name if len(parts) <= 2 and parts[0] else parts[-1]


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {_plain(what)} | {_plain(value)} |" for what, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Not stated in the recipe."


def _plain(value: Any) -> str:
    """Write a value as one line that cannot end its cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
