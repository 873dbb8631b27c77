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
from fitprune.analysis.analyze import Analysis
from fitprune.analysis.attention import KINDS, LayerAttention, PositionBias, RankAgreement, TopShare
from fitprune.analysis.spread import INTERVAL
from fitprune.analysis.stability import DataStability, FittedBudget, SizeStability, ToleranceCurve

SCHEMA = 1
NAME = "analysis.json"

Table = tuple[tuple[str, ...], Iterable[Sequence[Any]]]


def save(analysis: Analysis, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `analysis.json` and the tables, each whole or not at all; the same analysis gives the same bytes.

    Args:
        analysis: what `analyze` found.
        folder: is made if it is missing.

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
        files.write_text(written[-1], content)
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
    data: dict[str, Any] = _plain(
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
    return data


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
        f"moved by: tokens per layer between the recipe and that of n samples drawn ({analysis.resamples} draws; "
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
        moved = [each.distance.mean for each in analysis.sizes if each.flops_reduction == part.flops_reduction]
        if analysis.data:
            moved.append(analysis.data[number].distance.max())
        counts = part.recipe.counts(n)
        listed = counts if len(counts) <= 12 else [*counts[:11], "..."]
        yield (
            f"{100 * part.flops_reduction:g}%",
            f"{part.recipe.provenance['tolerance']:.3f}",
            str(part.recipe.kept(n)[-1]),
            f"{100 * part.attention_loss:.1f}%",
            *(f"{float(tokens):.1f}" for tokens in moved),
            " ".join(map(str, listed)),
        )


def _extremes(values: torch.Tensor, form: str) -> tuple[str, ...]:
    first, last = values[0], values[-1]
    return tuple(form.format(float(value)) for value in (first, values.min(), values.max(), last))


def _tables(analysis: Analysis) -> dict[str, Table]:
    """Name, columns and rows of each CSV."""
    parts: dict[str, tuple[Any, Iterable[Any]]] = {
        "received_attention": (LayerAttention, [analysis.layers]),
        "top_share": (TopShare, [analysis.top_share]),
        "tolerance_curve": (ToleranceCurve, [analysis.tolerance]),
        "removals": (FittedBudget, analysis.budgets),
        "stability_over_size": (SizeStability, analysis.sizes),
        "stability_over_data": (DataStability, analysis.data),
        "rank_agreement": (RankAgreement, [analysis.ranks]),
        "position_bias": (PositionBias, [analysis.position]),
    }
    tables = {
        name: (kind.COLUMNS, (row for part in each for row in part.rows()))
        for name, (kind, each) in parts.items()
        if each != [None]
    }
    by_layer = (row for part in analysis.sizes for row in part.layer_rows())
    return {**tables, "stability_over_size_by_layer": (SizeStability.LAYER_COLUMNS, by_layer)}


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
