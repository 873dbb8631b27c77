"""Results as files."""

import pytest

from fitprune.evaluation.results import Results


def test_results_of_another_version_are_refused(tmp_path):
    damaged = '{"schema": 3, "provenance": {}, "tasks": [], "rows": ["x"], "best": [], "skipped": [], "recipes": {}}'
    for text in (damaged, "{}", '{"schema": 2}', "no json", '{"schema": 3}', "[]"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=r"r\.json: not readable as results"):
            Results.load(tmp_path / "r.json")
