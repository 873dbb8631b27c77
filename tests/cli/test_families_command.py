"""`fitprune families`."""

from fitprune.cli.main import main
from fitprune.families import table


def test_it_prints_the_table(capsys):
    assert main(["families"]) == 0
    assert capsys.readouterr().out == f"{table.table()}\n"
