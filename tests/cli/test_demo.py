"""`fitprune demo`."""

from fitprune.cli.main import main


def test_the_demo_refuses_a_folder_with_files_of_its_names(tmp_path, capsys):
    (tmp_path / "results.json").write_text("my own")
    assert main(["demo", "--quick", "-o", str(tmp_path)]) == 2
    assert "results.json is no file of fitprune" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
