"""Measuring in several processes, and how much memory it takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from fitprune import AttentionStats, load_samples, make_batches, measure
from fitprune._support import assets
from fitprune._support.processes import Processes
from fitprune.calibration import measure as measurement
from fitprune.calibration.samples import Sample
from fitprune.cli.main import main
from helpers.models import batch_of, prompts, tiny_inputs, tiny_model

DATA = ["--data", "digit-scenes/calibration", "--samples", "7", "--batch-size", "2"]
# Each process saves what it got; the second may kill itself at its second batch.
SHARED = """
import os, signal, sys
from helpers.models import tiny_inputs, tiny_model
from fitprune import measure
from fitprune.calibration import measure as measurement
from fitprune._support.processes import Processes

folder, out, dies = sys.argv[1:]
one_batch, calls, rank = measurement._measure_batch, [], int(os.environ["RANK"])

def dying(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return one_batch(*args)

if dies == "dies":
    measurement._measure_batch = dying
model = tiny_model()
stats = measure(model, [tiny_inputs(model, batch=2, seed=seed) for seed in range(5)], parts=folder)
assert Processes().count == 2
stats.save(f"{out}/{rank}")
"""


def launch(*command):
    """Run two processes under torchrun with as many threads as here: with AMX, sums depend on the split."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = [*launcher, *map(str, command)]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_two_processes_write_the_file_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["measure", "digit-scenes", *DATA, "-o", str(one)]) == 0
    ended = launch("-m", "fitprune.cli.main", "measure", "digit-scenes", *DATA, "-o", two)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("7 samples, 8 layers") == 1  # one process speaks
    assert "batch" not in ended.stderr  # no bar in a pipe
    assert two.read_bytes() == one.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_what_a_killed_process_leaves_is_gone_on_with_by_any_number_of_processes(tmp_path):
    parts, script = tmp_path / "parts", tmp_path / "shared.py"
    script.write_text(SHARED)
    model = tiny_model()
    batches = [tiny_inputs(model, batch=2, seed=seed) for seed in range(5)]
    whole = measure(model, batches)
    whole.save(tmp_path / "whole")
    ended = launch(script, parts, tmp_path, "dies")  # and the other does not wait for it
    assert ended.returncode != 0
    assert not (tmp_path / "0").exists()
    left = sorted(parts.glob("*.safetensors"))
    assert 2 <= len(left) <= 8
    before = [part.stat().st_mtime_ns for part in left]
    ended = launch(script, parts, tmp_path, "lives")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [part.stat().st_mtime_ns for part in left] == before  # nothing is measured twice
    for rank in "01":
        assert (tmp_path / rank).read_bytes() == (tmp_path / "whole").read_bytes()
    forwards = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for part in sorted(parts.glob("*.safetensors"))[::3]:
        part.unlink()
    measure(model, batches, parts=parts).save(tmp_path / "alone")
    handle.remove()
    assert 0 < len(forwards) < 5
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "whole").read_bytes()
    (parts / f".{'0' * 64}.safetensors.x1.part").write_text("")  # what a process was writing when it was killed
    measurement.forget_parts(parts)
    assert not parts.exists()


def test_several_processes_need_a_folder_that_all_see(tmp_path, monkeypatch):
    model = tiny_model()
    batches = [tiny_inputs(model, seed=seed) for seed in range(2)]
    processes = Processes()
    processes.count = 2
    monkeypatch.setattr(measurement, "Processes", lambda: processes)
    with pytest.raises(ValueError, match="2 processes gather what they measure through a folder that all see"):
        measure(model, batches)
    monkeypatch.setattr(processes, "gather", lambda names: [names, [["0" * 64 + ".safetensors"]]])
    with pytest.raises(FileNotFoundError, match="parts must be a folder that all processes see"):
        measure(model, batches, parts=tmp_path)


def test_batches_of_other_processes_are_not_made(tmp_path):
    good = load_samples(assets.folder("calibration"), samples=3)
    bad = [Sample(str(n), "?", tmp_path / "none.png") for n in range(2)]
    given = [*bad, *good[:2], *bad, good[2]]
    processor = AutoProcessor.from_pretrained(assets.folder("model"))
    processes = Processes()
    processes.rank, processes.count = 1, 2
    batches = list(make_batches(given, processor, batch_size=2, processes=processes))
    assert [len(batch.get("input_ids", ())) for batch in batches] == [0, 2, 0, 1]


def test_a_sample_of_two_batches_counts_in_each_as_it_was_measured_there(tmp_path):
    """Also where a process measured the second batch before another did the first."""
    model = tiny_model()
    short, long, other = prompts(model, [[3, 6], [9, 12], [4, 4]])

    batches = [batch_of([short, long]), other, batch_of([short, other]), short]
    whole = measure(model, batches)
    assert len(whole) == 6
    measure(model, batches[::-1], parts=tmp_path)
    again = measure(model, batches, parts=tmp_path)
    assert again.digests == whole.digests
    assert torch.equal(again.self_attention, whole.self_attention)
    assert torch.equal(again.cross_attention, whole.cross_attention)


def test_equal_statistics_are_equal_files(tmp_path):
    model = tiny_model()
    stats = measure(model, [tiny_inputs(model)])
    for number in range(8):  # safetensors orders metadata at random, each time anew
        stats.save(tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert AttentionStats.load(tmp_path / "0").provenance == stats.provenance


PEAK = """
import re, sys
from pathlib import Path
import torch
from fitprune import make_batches, measure
from fitprune.calibration import measure as measurement
from fitprune.calibration.samples import Sample

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""


def peaks(tmp_path, script):
    """The peak memory of a process of its own, in bytes, wherever `script` prints it."""
    ended = launch_alone(PEAK + script, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [int(line) for line in ended.stdout.splitlines() if re.fullmatch(r"\d+", line)]


def launch_alone(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    run = [sys.executable, "-c", script, str(tmp_path)]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=environment, timeout=300)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")


@needs_proc
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """From files to the statistics: images, inputs and what is measured go batch by batch.

    Statistics of 640 samples are 0.4 MB here, and their parts' names 0.2 MB. Peaks differed by 1.1 to 1.5 MB in four
    runs; with inputs held, by 12.6 MB.
    """
    for number in range(64):
        Image.new("RGB", (256, 256), (number, 0, 0)).save(tmp_path / f"{number}.png")
    first, second = peaks(
        tmp_path,
        """
from helpers import families
row = next(row for row in families.ROWS if row.name == "llava")
model, processor, folder = row.make_model(), row.processor(), Path(sys.argv[1])
for times in (1, 10):
    samples = (Sample("", f"what {n}?", folder / f"{n % 64}.png") for n in range(64 * times))
    batches = make_batches(samples, processor, batch_size=8, prompt_template=f"see {row.image} {{question}}")
    stats = measure(model, batches, parts=folder / "parts")
    assert len(stats) == 64 * times
    stats.save(folder / "stats")
    print(peak())
""",
    )
    assert second - first < 6e6, (first, second)


@needs_proc
def test_statistics_are_held_once(tmp_path):
    """With parts as large as those of a 7B model, peaks grow by the size of the result and no more.

    100 parts of 0.8 MB: held as parts beside the result, or copied to check or to write, the growth would be doubled.
    """
    first, second = peaks(
        tmp_path,
        """
from helpers.models import tiny_inputs, tiny_model
from fitprune import AttentionStats
model, folder = tiny_model(), Path(sys.argv[1])

def large(adapted, batch, digests, provenance):
    received = torch.rand(2, 5, 20_000)
    return [AttentionStats(*received, (20_000,), (6,), tuple(digests), adapted.fingerprint, provenance)]

measurement._measure_batch = large
batches = [tiny_inputs(model, seed=seed) for seed in range(100)]
for count in (10, 100):
    stats = measure(model, batches[:count], parts=folder)
    stats.save(folder / "stats")
    del stats
    print(peak())
""",
    )
    result = 2 * 5 * 20_000 * 4 * 100
    assert second - first < 1.25 * result, (second - first) / result
