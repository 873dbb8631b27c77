"""What tests of several commands share."""

import pytest

from fitprune.cli.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics and two recipes of the embedded model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    stats = str(folder / "stats.safetensors")
    options = ["--data", "digit-scenes/calibration", "--samples", "12", "--batch-size", "4"]
    assert main(["measure", "digit-scenes", *options, "-o", stats]) == 0
    assert main(["fit", stats, "--flops-reduction", "0.5", "0.8", "-o", f"{folder}/recipes"]) == 0
    return folder
