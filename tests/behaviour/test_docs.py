"""Documents name tests that exist, and show what they say."""

import re
from pathlib import Path

from fitprune.families import table as families

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_table_of_calls_names_a_test_that_exists():
    lines = [line for line in (ROOT / "docs/calling.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line.split("|")[1:-1] for line in lines if not line.endswith("| test |")]
    assert len(rows) > 50
    latest = None
    for call, _, proof in rows:
        if "the same test" in proof:
            assert latest
            continue
        name = re.search(r"`(test_\w+)`", proof)
        file = re.search(r"`(test_\w+\.py)`", proof)
        assert name, call
        [latest] = [path.read_text() for path in (ROOT / "tests").rglob(file[1] if file else "test_calling.py")]
        assert f"def {name[1]}(" in latest, name[1]


def test_the_table_of_families_is_what_the_command_prints():
    page = (ROOT / "docs/families.md").read_text()
    shown = re.search(r"<!-- table: fitprune families -->\n(.*)\n<!-- end of table -->", page, re.S)
    assert shown
    assert shown[1] == families.table()
    assert (
        f"any of {sum(not f.refused for f in families.FAMILIES.values())} families" in (ROOT / "README.md").read_text()
    )
