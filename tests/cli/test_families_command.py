"""`fitprune families`."""

from fitprune.cli.main import main
from fitprune.families import table


def test_it_prints_the_table(capsys):
    assert main(["families"]) == 0
    assert capsys.readouterr().out == f"{table.table()}\n"


def test_a_package_that_cannot_be_imported_is_a_row(capsys, plugins):
    rows = table.table().splitlines()
    source = "from fitprune.families.table import Family\nrow = Family('mine', 'Mine')"
    plugins("fitprune.families", source, brokenfam="nomodule:x", other="stranger:row")
    assert main(["families"]) == 0
    shown = capsys.readouterr().out.splitlines()
    row, renamed = [row for row in shown if row not in rows]
    assert "its entry point has a row with model_type='mine'" in renamed
    assert row.startswith("| `brokenfam` | | family 'brokenfam': its entry point 'nomodule:x' cannot be imported")
    assert row.count("|") == 7
    assert [row for row in shown if row in rows] == rows
