"""What `analyze` found, as files and on the terminal: one JSON, a CSV for each part, a short table.

Floats are written with six significant digits, so that the last bits of a sum do not make another file.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fitprune._support import files
from fitprune._support.text_tables import aligned, plural
from fitprune._version import __version__
from fitprune.analysis.analyze import INTERVAL, KINDS, Analysis, Spread

SCHEMA = 1
NAME = "analysis.json"

Table = tuple[tuple[str, ...], Iterable[Sequence[Any]]]


def save(analysis: Analysis, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `analysis.json` and the tables, each whole or not at all; the same analysis gives the same bytes.

    Returns:
        The files written.

    Raises:
        OSError: `folder` cannot be written.
    """
    texts = {NAME: json.dumps(to_dict(analysis), indent=1, allow_nan=False) + "\n"}
    for name, (header, rows) in _tables(analysis).items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[_cell(_plain(value)) for value in row] for row in rows])
        texts[f"{name}.csv"] = text.getvalue()
    written = []
    for name, content in texts.items():
        written.append(Path(folder) / name)
        with files.replacing(written[-1]) as temporary:
            temporary.write_text(content, newline="")
    return written


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """Give the analysis as plain data for JSON; what is not defined is null."""
    stats = analysis.stats
    n = analysis.budgets[0].recipe.visual_tokens
    statistics = [
        {"name": name, "samples": len(part), "provenance": dict(part.provenance)}
        for name, part in analysis.sources.items()
    ]
    budgets = [
        {
            "flops_reduction": part.flops_reduction,
            "reached": part.recipe.provenance["reached"],
            "tolerance": part.recipe.provenance["tolerance"],
            "removed": part.recipe.counts(n),
            "kept": part.recipe.kept(n),
            "lost_self": part.lost_self,
            "lost_cross": part.lost_cross,
            "attention_loss": part.attention_loss,
        }
        for part in analysis.budgets
    ]
    found: dict[str, Any] = _plain(
        {
            "schema": SCHEMA,
            "source": "fitprune.analyze",
            "fitprune": __version__,
            "model": stats.model.to_dict(),
            "statistics": statistics,
            "samples": len(stats),
            "visual_tokens": n,
            "samples_by_visual_tokens": {
                str(count): times for count, times in sorted(Counter(stats.visual_tokens).items())
            },
            "interval": INTERVAL,
            "resamples": analysis.resamples,
            "seed": analysis.seed,
            "received_attention": analysis.layers,
            "top_share": analysis.top_share,
            "tolerance_curve": analysis.tolerance,
            "budgets": budgets,
            "stability_over_size": analysis.sizes,
            "stability_over_data": analysis.data,
            "rank_agreement": analysis.ranks,
            "position_bias": analysis.position,
            "notes": analysis.notes,
        }
    )
    return found


def findings(analysis: Analysis) -> str:
    """Format the main findings for people; fractions become percent here and only here."""
    stats, n = analysis.stats, analysis.budgets[0].recipe.visual_tokens
    lines = [f"{plural(len(stats), 'sample')}, {n} visual tokens, {stats.model.decoder.layers} layers", ""]
    top = analysis.top_share
    number = min(range(len(top.fractions)), key=lambda at: abs(top.fractions[at] - 0.1))
    rows: list[tuple[str, ...]] = [("", "first layer", "least", "most", "last layer")]
    for kind, spread in (("self", analysis.layers.self_attention), ("cross", analysis.layers.cross_attention)):
        rows.append((f"received {kind} attention, all tokens", *_extremes(spread.mean, "{:.2f}")))
    for kind, spread in (("self", top.self_attention), ("cross", top.cross_attention)):
        name = f"share of the top {100 * top.fractions[number]:g}% tokens, {kind}"
        rows.append((name, *_extremes(100 * spread.mean[number], "{:.0f}%")))
    if analysis.position is not None:
        for kind in KINDS[:2]:
            by_row = analysis.position.by_row[kind]
            rows.append((f"top row against the mean row, {kind}", *_extremes(by_row[:, 0], "{:.2f}x")))
            rows.append((f"bottom row against the mean row, {kind}", *_extremes(by_row[:, -1], "{:.2f}x")))
    lines += [aligned(rows), ""]
    if analysis.ranks is not None and len(analysis.ranks.matrix) > 1:
        matrix = analysis.ranks.matrix
        apart = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
        lines += [
            f"rank agreement of scores: {float(matrix.diagonal(1).nanmean()):.2f} between neighbouring layers, "
            f"{float(apart.nanmean()):.2f} between any two, {float(matrix[0, -1]):.2f} between first and last",
            "",
        ]
    lines += [aligned(list(_budget_rows(analysis))), ""]
    lines += [
        f"moved by: tokens per layer between the recipe and that of so many samples drawn ({analysis.resamples} draws; "
        "mean),",
        f"or between the recipes of {' and '.join(analysis.data[0].names)}." if analysis.data else "",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in analysis.notes)])


def _budget_rows(analysis: Analysis) -> Iterator[tuple[str, ...]]:
    n = analysis.budgets[0].recipe.visual_tokens
    sizes = sorted({part.samples for part in analysis.sizes})
    yield (
        "FLOPs cut", "tolerance", "tokens left", "attention lost", *(f"moved by {size}" for size in sizes),
        *(["by data"] if analysis.data else []), "removed per layer",
    )  # fmt: skip
    for number, part in enumerate(analysis.budgets):
        moved = [own.distance.mean for own in analysis.sizes if own.flops_reduction == part.flops_reduction]
        if analysis.data:
            moved.append(analysis.data[number].distance.max())
        counts = part.recipe.counts(n)
        shown = counts if len(counts) <= 12 else [*counts[:11], "..."]
        yield (
            f"{100 * part.flops_reduction:g}%",
            f"{part.recipe.provenance['tolerance']:.3f}",
            str(part.recipe.kept(n)[-1]),
            f"{100 * part.attention_loss:.1f}%",
            *(f"{float(tokens):.1f}" for tokens in moved),
            " ".join(map(str, shown)),
        )


def _extremes(values: torch.Tensor, form: str) -> tuple[str, ...]:
    first, last = values[0], values[-1]
    return tuple(form.format(float(value)) for value in (first, values.min(), values.max(), last))


def _tables(analysis: Analysis) -> dict[str, Table]:
    """Name, header and rows of each CSV."""
    layers, budgets = range(analysis.stats.model.decoder.layers), analysis.budgets
    n = budgets[0].recipe.visual_tokens
    spread = ("mean", "deviation", "low", "high")
    received = {"self": analysis.layers.self_attention, "cross": analysis.layers.cross_attention}
    top = {"self": analysis.top_share.self_attention, "cross": analysis.top_share.cross_attention}
    curve = analysis.tolerance
    tables: dict[str, Table] = {
        "received_attention": (
            ("kind", "layer", *spread),
            ((kind, layer, *_cells(found, layer)) for kind, found in received.items() for layer in layers),
        ),
        "top_share": (
            ("kind", "fraction", "layer", *spread),
            (
                (kind, fraction, layer, *_cells(found, (at, layer)))
                for kind, found in top.items()
                for at, fraction in enumerate(analysis.top_share.fractions)
                for layer in layers
            ),
        ),
        "tolerance_curve": (
            ("tolerance", "flops_reduction", "kv_cache_reduction", *(f"by_sample_{name}" for name in spread)),
            (
                (tolerance, curve.flops_reduction[at], curve.kv_cache_reduction[at], *_cells(curve.by_sample, at))
                for at, tolerance in enumerate(curve.tolerances)
            ),
        ),
        "removals": (
            ("flops_reduction", "layer", "removed", "kept", "lost_self", "lost_cross"),
            (
                (part.flops_reduction, layer, part.recipe.counts(n)[layer], part.recipe.kept(n)[layer],
                 part.lost_self[layer], part.lost_cross[layer])
                for part in budgets
                for layer in layers
            ),
        ),
        "stability_over_size": (
            ("flops_reduction", "samples", "quantity", *spread),
            (
                (part.flops_reduction, part.samples, name, *_cells(getattr(part, name), ()))
                for part in analysis.sizes
                for name in ("tolerance", "distance", "attention_loss")
            ),
        ),
        "stability_over_size_by_layer": (
            ("flops_reduction", "samples", "quantity", "layer", *spread),
            (
                (part.flops_reduction, part.samples, name, layer, *_cells(getattr(part, name), layer))
                for part in analysis.sizes
                for name in ("removed", "kept")
                for layer in layers
            ),
        ),
        "stability_over_data": (
            ("flops_reduction", "fitted_on", "other", "distance", "attention_loss_on_other"),
            (
                (part.flops_reduction, one, other, part.distance[row, column], part.attention_loss[row, column])
                for part in analysis.data
                for row, one in enumerate(part.names)
                for column, other in enumerate(part.names)
            ),
        ),
    }  # fmt: skip
    if analysis.ranks is not None:
        matrix = analysis.ranks.matrix
        tables["rank_agreement"] = (
            ("layer", "other_layer", "spearman"),
            ((layer, other, matrix[layer, other]) for layer in layers for other in layers),
        )
    if analysis.position is not None:
        sides = {"row": analysis.position.by_row, "column": analysis.position.by_column}
        tables["position_bias"] = (
            ("kind", "axis", "layer", "position", "relative_attention"),
            (
                (kind, axis, layer, position, value)
                for axis, kinds in sides.items()
                for kind, found in kinds.items()
                for layer in layers
                for position, value in enumerate(found[layer])
            ),
        )
    return tables


def _cells(spread: Spread, at: Any) -> list[torch.Tensor]:
    return [values[at] for values in (spread.mean, spread.deviation, spread.low, spread.high)]


def _cell(value: Any) -> Any:
    """What a CSV cell holds: nothing for None, and a text that a spreadsheet would run as a formula after a quote."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def _plain(value: Any) -> Any:
    """Turn dataclasses and tensors into data that JSON knows."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
