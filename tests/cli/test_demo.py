"""`fitprune demo`."""

from fitprune._support import files
from fitprune.cli.main import main


def test_the_demo_refuses_a_folder_with_files_of_its_names(tmp_path, capsys):
    (tmp_path / "results.json").write_text("my own")
    assert main(["demo", "--quick", "-o", str(tmp_path)]) == 2
    assert "results.json is no file of fitprune" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_quick_demo_ends_in_a_page_whose_path_is_the_last_line(tmp_path, capsys):
    assert main(["demo", "--quick", "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = tmp_path / "out" / "index.html"
    assert printed[-1] == str(page)
    (row,) = [line.split() for line in printed if line.startswith("60%")]
    assert float(row[8].rstrip("%")) < 100  # agreement: there is something to see
    text = page.read_text()
    assert len(text) < 2_000_000
    assert text.count("<figure class=kept>") == 4
    assert text.count("<li data-by=") > 3  # answers that changed
    assert "fitprune recipe MODEL" in text
    assert "Press Play" not in text  # where no script runs there is no such button
    assert "below 1.00x is faster" in text
    assert files.kind_of(page) == files.PICTURE
