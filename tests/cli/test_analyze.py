"""`fitprune analyze`."""

import csv

from fitprune import AttentionStats, analyze
from fitprune.analysis import save


def test_a_spreadsheet_runs_no_formula_of_a_name(made, tmp_path):
    stats = AttentionStats.load(made / "stats.safetensors")
    names = {"=HYPERLINK(1)": stats.select(range(6)), "@b": stats.select(range(6, 12))}
    save.save(analyze(names, resamples=2), tmp_path)
    cells = [cell for row in csv.reader((tmp_path / "stability_over_data.csv").open()) for cell in row]
    assert {"'=HYPERLINK(1)", "'@b"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
