"""Files and numbers from strangers: each ends in one short line, within a second and 200 MB.

All commands run in one process that has imported everything, each with its own count of seconds and memory.
"""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fitprune import AttentionStats, LatencyProfile, PruningRecipe
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.evaluation.results import SCHEMA

LONG = 10**4000
SHAPE = ModelFingerprint("llava", DecoderSizes(4, 32, 48, 4, 2, 8, 97), VisionSizes(2, 16, 24, 32, 8), 5, "a")
RECIPE = json.loads(PruningRecipe((1.0, 0.5, 0.5, 0.25), SHAPE, 16).to_json())
PROFILE = {
    "format": "fitprune-profile-1", "model": SHAPE.to_dict(), "tokens": [16, 64], "mixer_seconds": [1.0, 2.0],
    "mlp_seconds": [1.0, 2.0], "removal_seconds": [1.0, 2.0], "outside_seconds": 1.0, "visual_tokens": 16,
    "text_tokens": 16, "batch": 1,
}  # fmt: skip
ROW = {
    "task": "t", "method": "dense", "budget": None, "seeds": 1, "samples": 4, "accuracy": 1.0,
    "accuracy_interval": [0.9, 1.0], "relative_accuracy": 1.0, "relative_interval": [1.0, 1.0], "agreement": 1.0,
    "divergence": 0.0, "accuracy_by_kind": {}, "flops_reduction": 0.0, "prefill_flops_ratio": 1.0,
    "mean_visual_tokens": 16.0, "visual_tokens_left": 16.0, "kv_bytes": 100.0,
}  # fmt: skip
TASK = {
    "name": "t", "questions": 4, "answerable": 4, "metric": "exact", "guess": False, "dense": 1.0, "near": 0,
    "mismatch": None, "always": None,
}  # fmt: skip
RESULTS = {
    "schema": SCHEMA, "provenance": {}, "tasks": [TASK], "rows": [ROW], "best": [], "skipped": [], "recipes": {},
    "examples": [],
}  # fmt: skip
SIZES = [
    (part, name)
    for part in ("decoder", "vision")
    for name in (*RECIPE["model"][part], *(("router", "first_prunable", "linear_macs") if part == "decoder" else ()))
]


def recipe_with(*places, value):
    """The recipe with a value at a place, and what is left of it as text."""
    data = json.loads(json.dumps(RECIPE))
    inner = data
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = value
    return json.dumps(data)


def files():
    """Name -> text, and the command that is to read it."""
    cost, report = ("cost",), ("report", "-o", "{here}/page.html")
    fit = ("fit", "{here}/good.safetensors", "--prefill-latency-reduction", "0.1", "-o", "{here}/r.json", "--profile")
    for (part, name), value in itertools.product(SIZES, (10**9, LONG, 1e300, -1)):
        yield f"recipe-{part}-{name}-{len(str(value))}", recipe_with("model", part, name, value=value), cost
    for name, value in [
        ("visual_tokens", 10**20), ("keep", [1] * 500_000), ("keep", [1, 1, 1, LONG]), ("enter", [0] * 500_000),
        ("scorer", {"name": "fitprune", "parameters": {f"p{i}": i for i in range(1000)}}), ("x" * 100_000, 1),
        ("scorer", {"name": "x" * 100_000, "parameters": LONG}), ("schema", LONG), ("schema", "x" * 100_000),
        ("provenance", {"a": [float("nan")]}), ("provenance", {"a": {"b": float("-inf")}}),
        ("scorer", {"name": "random", "parameters": {"seed": float("inf")}}), ("model", {"x" * 100_000: [[]] * 1000}),
    ]:  # fmt: skip
        yield f"recipe-{name[:20]}-{len(str(value))}", recipe_with(name, value=value), cost
    yield "recipe-linear_layers", recipe_with("model", "decoder", "linear_layers", value=[0] * 500_000), cost
    yield "recipe-mlps", recipe_with("model", "decoder", "mlps", value=[LONG] * 4), cost
    yield "recipe-nested", "[" * 1_000_000, cost
    yield "recipe-empties", "[" + "[]," * 1_000_000 + "[]]", cost
    yield "recipe-long", recipe_with("keep", value=[0.5] * 10_000_000), cost
    yield "recipe-twice", "{" + ",".join(['"a":1'] * 100_000) + "}", cost
    for name, value in itertools.product(PROFILE, (LONG, 1e300)):
        listed = isinstance(PROFILE[name], list)
        yield f"profile-{name}-{len(str(value))}", json.dumps(PROFILE | {name: [1, value] if listed else value}), fit
    for name, value in itertools.product(ROW, (LONG, 1e300)):
        yield f"results-{name}-{len(str(value))}", json.dumps(RESULTS | {"rows": [ROW | {name: value}]}), report
    for name, value in itertools.product(TASK, (LONG, 1e300)):
        yield f"results-task-{name}-{len(str(value))}", json.dumps(RESULTS | {"tasks": [TASK | {name: value}]}), report
    yield "results-long", "[" + "1234," * 10_000_000 + "1]", report
    yield "results-empties", "[" + "[]," * 8_000_000 + "[]]", report


FILES = [name for name, _, _ in files()]
SPARSE = ["recipe-sparse", "results-sparse"]  # of 10 GB, which lie on the disk as nothing
STATS = ["stats-layers", "stats-counts", "stats-claims", "stats-digests", "stats-long-digest", "stats-recipe-size"]
NUMBERS = [
    [*command, option, value]
    for command, options in [
        (("cost", "llava-1.5-7b:60"), ("--visual-tokens", "--text-tokens", "--crops", "--value-bytes")),
        (("fit", "{here}/good.safetensors", "-o", "{here}/r.json", "--flops-reduction", "0.5"),
         ("--visual-tokens", "--max-removal-layers")),
        (("search", "m", "--stats", "s", "--data", "d", "-o", "{here}/r", "--flops-reduction", "0.5"),
         ("--visual-tokens", "--seed", "--samples", "--batch-size", "--recombine")),
        (("fit", "{here}/good.safetensors", "-o", "{here}/r.json"),
         ("--flops-reduction", "--mean-visual-tokens", "--tolerance", "--kv-cache-reduction")),
        (("analyze", "{here}/good.safetensors", "-o", "{here}/a"), ("--resamples", "--seed", "--flops-reduction")),
        (("time", "--random-model", "llava-1.5-7b"),
         ("--text-tokens", "--image-size", "--new-tokens", "--rounds")),
        (("measure", "m", "--data", "d", "-o", "{here}/s"), ("--samples", "--seed", "--batch-size")),
        (("evaluate", "m", "--data", "d", "-o", "{here}/s"), ("--timed-batches", "--examples", "--seeds")),
    ]
    for option in options
    for value in ("999999999999", "9" * 20, "9" * 5000, "-9", "1e999", "nan")
]  # fmt: skip
RUNNER = """
import contextlib, io, json, resource, signal, sys, time
import torch, matplotlib.figure, fitprune.analysis.figures, fitprune.evaluation.report, fitprune.output_search.search
from fitprune.cli.main import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for line in sys.stdin:
    signal.alarm(30)
    command, said, began, before = json.loads(line), io.StringIO(), time.process_time(), peak()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(command)
        except SystemExit as error:
            code = error.code
        except Exception as error:
            code = f"traceback: {type(error).__name__}: {error}"[:300]
    print(json.dumps([code, time.process_time() - began, peak() - before, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each command said: code, seconds, megabytes, words."""
    here = tmp_path_factory.mktemp("hostile")
    attention = torch.rand(4, 32)
    stats = AttentionStats(attention, attention.clone(), (16, 16), (4, 4), ("a", "b"), SHAPE)
    stats.save(here / "good.safetensors")
    commands = []
    for name, text, command in files():
        (here / f"{name}.json").write_text(text)
        commands.append([*command, f"{here}/{name}.json"])
    for name, command in zip(SPARSE, (["cost"], ["report", "-o", f"{here}/page.html"]), strict=True):
        with (here / f"{name}.json").open("w") as file:
            file.truncate(10**10)
        commands.append([*command, f"{here}/{name}.json"])
    write_stats(here)
    commands += [["fit", f"{here}/{name}.safetensors", "--flops-reduction", "0.5", "-o", f"{here}/r"] for name in STATS]
    commands += NUMBERS
    asked = "\n".join(json.dumps(command).replace("{here}", str(here)) for command in commands)
    done = subprocess.run([sys.executable, "-c", RUNNER], input=asked, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands), (commands[len(answers)], done.stderr[-500:])
    return dict(zip([*FILES, *SPARSE, *STATS, *(" ".join(command) for command in NUMBERS)], answers, strict=True))


def write_stats(here):
    """Statistics that claim more than they hold, or too much."""
    one = torch.rand(4, 32)
    tensors = {
        "self_attention": one, "cross_attention": one.clone(), "visual_tokens": torch.tensor([16, 16]),
        "text_tokens": torch.tensor([4, 4]),
    }  # fmt: skip
    metadata = {
        "format": "fitprune-stats-1", "model": json.dumps(SHAPE.to_dict()), "digests": '["a", "b"]', "provenance": "{}"
    }  # fmt: skip
    deep = SHAPE.to_dict() | {"decoder": SHAPE.to_dict()["decoder"] | {"layers": 10**9}}
    changes = {
        "stats-layers": ({}, {"model": json.dumps(deep)}),
        "stats-counts": ({"visual_tokens": torch.tensor([2**62, 2**62])}, {}),
        "stats-claims": ({"visual_tokens": torch.full((2_000_000,), 16)}, {}),
        "stats-digests": ({}, {"digests": "[" + "[]," * 8_000_000 + "[]]"}),
        "stats-long-digest": ({}, {"digests": json.dumps(["x" * 10_000_000, 5])}),
        "stats-recipe-size": ({}, {"provenance": "[" * 1_000_000}),
    }
    for name, (other, said) in changes.items():
        save_file(tensors | other, here / f"{name}.safetensors", metadata | said)


def require_refused(answer, codes=(1, 2)):
    code, seconds, megabytes, said = answer
    assert code in codes, (code, said[-300:])
    assert len(said.strip().splitlines()) == 1, said[:2000]
    assert len(said) < 800, said
    assert seconds < 1, seconds
    assert megabytes < 200, megabytes


@pytest.mark.parametrize("name", [*FILES, *SPARSE, *STATS])
def test_a_hostile_file_ends_in_one_short_line_within_a_second_and_200_mb(found, name):
    sound = name == "recipe-decoder-linear_macs-10"  # a number of operations may be as large
    code, seconds, megabytes, said = found[name]
    if sound:
        said = said.splitlines()[0]
    require_refused((code, seconds, megabytes, said), codes=(0,) if sound else (1, 2))


@pytest.mark.parametrize("command", NUMBERS, ids=lambda command: f"{command[0]} {command[-2]} {command[-1][:14]}")
def test_a_number_out_of_range_is_refused_before_anything_of_its_size_is_made(found, command):
    answer = found[" ".join(command)]
    kept = command[-2:] == ["--mean-visual-tokens", "999999999999"]
    assert kept or command[-2] in answer[3] or command[-2][2:].replace("-", "_") in answer[3]
    require_refused(answer, codes=(0,) if kept else (2,))  # more tokens than there are: nothing leaves


def test_the_files_that_these_begin_from_are_sound(tmp_path):
    PruningRecipe.from_json(json.dumps(RECIPE))
    (tmp_path / "p.json").write_text(json.dumps(PROFILE))
    LatencyProfile.load(tmp_path / "p.json")
