"""What tests of several commands share."""

import importlib
import sys

import pytest

from fitprune.cli.main import main


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Install entry points of a group, name=value, beside a module `stranger` of the source that is passed."""
    folder = tmp_path / "plugins"
    monkeypatch.syspath_prepend(folder)

    def install(group, source="", **points):
        info = folder / "stranger-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / "stranger.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("stranger", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics and two recipes of the embedded model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    stats = str(folder / "stats.safetensors")
    options = ["--data", "digit-scenes/calibration", "--samples", "12", "--batch-size", "4"]
    assert main(["measure", "digit-scenes", *options, "-o", stats]) == 0
    assert main(["fit", stats, "--flops-reduction", "0.5", "0.8", "-o", f"{folder}/recipes"]) == 0
    return folder
