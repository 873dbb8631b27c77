"""`fitprune recipe`: the bytes of measure and fit, and statistics that are used again while they are the right ones."""

import pytest

from fitprune.cli.main import main

RECIPE = ["recipe", "digit-scenes", "--flops-reduction", "0.5", "0.8", "--batch-size", "4"]


def test_it_writes_the_bytes_of_measure_and_fit(made, tmp_path, capsys):
    out = tmp_path / "recipes"
    # Without --data, the bundled model is measured on the bundled calibration data, as `made` is.
    assert main([*RECIPE, "--samples", "12", "-o", str(out)]) == 0
    names = ["flops_reduction-0.5.json", "flops_reduction-0.8.json", "stats.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "stats.safetensors").read_bytes() == (made / "stats.safetensors").read_bytes()
    for name in names[:2]:
        assert (out / name).read_bytes() == (made / "recipes" / name).read_bytes()
    assert "12 samples, 8 layers\n" in capsys.readouterr().out


def test_statistics_are_used_again_only_for_the_same_model_and_data(tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.json"
    command = ["recipe", "digit-scenes", "--flops-reduction", "0.6", "--samples", "3", "-o", str(out)]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.stats.safetensors"]
    first = out.read_bytes()
    stats = (tmp_path / "r.stats.safetensors").read_bytes()
    capsys.readouterr()
    measured = []
    with monkeypatch.context() as patch:
        patch.setattr("fitprune.calibration.measure.measure", lambda *_, **__: measured.append(1))
        assert main(command) == 0
    assert not measured
    assert "3 samples, 8 layers, used again" in capsys.readouterr().out
    assert out.read_bytes() == first
    assert (tmp_path / "r.stats.safetensors").read_bytes() == stats
    path = tmp_path / "r.stats.safetensors"
    fewer = [*command[:-4], "--samples", "2", "-o", str(out)]
    for other, differs in [
        (fewer, "3 samples there, 2 here"),
        ([*fewer, "--seed", "1", "--samples", "3"], "3 samples there, others here"),
        ([*command, "--dtype", "bfloat16"], "dtype 'float32' there, 'bfloat16' here"),
    ]:
        with monkeypatch.context() as patch:  # refused before anything is measured
            patch.setattr("fitprune.calibration.measure.measure", lambda *_, **__: measured.append(1))
            assert main(other) == 2
        message = capsys.readouterr().err
        for part in (f"{path} holds other statistics (", differs, "pass --overwrite", "another --output"):
            assert part in message
        assert not measured
        assert (path.read_bytes(), out.read_bytes()) == (stats, first)
    assert main([*fewer, "--overwrite"]) == 0
    assert f"{path}: 2 samples, 8 layers, which replaced the one there\n" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() == first


def test_a_budget_out_of_reach_replaces_no_statistics(tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.stats.safetensors"
    command = ["recipe", "digit-scenes", "-o", f"{tmp_path}/r.json", "--overwrite", "--flops-reduction"]
    assert main([*command, "0.5", "--samples", "2"]) == 0
    stats = path.read_bytes()
    assert main([*command, "0.99999", "--samples", "1"]) == 2
    assert path.read_bytes() == stats
    assert "0.99999" in capsys.readouterr().err
    assert (tmp_path / "r.stats.safetensors.parts").is_dir()  # what was measured is not lost
    assert main([*command, "0.5", "--samples", "2"]) == 0
    assert "used again" in capsys.readouterr().out
    assert not (tmp_path / "r.stats.safetensors.parts").exists()


def test_truncated_statistics_are_replaced_with_overwrite_alone(made, tmp_path, capsys):
    path = tmp_path / "r.stats.safetensors"
    path.write_bytes((made / "stats.safetensors").read_bytes()[:-100])
    broken = path.read_bytes()
    command = ["recipe", "digit-scenes", "--samples", "1", "--flops-reduction", "0.5", "-o", f"{tmp_path}/r.json"]
    assert main(command) == 2
    assert "--overwrite replaces the file" in capsys.readouterr().err
    assert path.read_bytes() == broken
    assert main([*command, "--overwrite"]) == 0
    assert "1 sample, 8 layers, which replaced the one there" in capsys.readouterr().out


def test_another_model_needs_data(tmp_path, capsys):
    assert main(["recipe", f"{tmp_path}/model", "--flops-reduction", "0.6", "-o", f"{tmp_path}/r.json"]) == 2
    said = capsys.readouterr().err
    assert "--data is missing" in said
    assert "question JSONL" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r.json", "r.json is no file of fitprune"),
        ("r.stats.safetensors", "r.stats.safetensors is no file of fitprune"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path, capsys, name, message):
    (tmp_path / name).write_text("my own")
    command = ["recipe", "digit-scenes", "--flops-reduction", "0.6", "--samples", "1", "-o", str(tmp_path / "r.json")]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "my own"


def test_a_second_run_writes_among_its_own_files(tmp_path):
    for budgets in (["0.5", "0.6"], ["0.6", "0.7"], ["0.8"]):
        command = ["recipe", "digit-scenes", "--samples", "1", "-o", f"{tmp_path}/out", "--flops-reduction", *budgets]
        assert main(command) == 0
    recipes = [f"flops_reduction-0.{digit}.json" for digit in (5, 6, 7, 8)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*recipes, "stats.safetensors"]
