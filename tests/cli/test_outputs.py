"""Files that commands read and write: each kind is known, and an output replaces its own kind alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from fitprune import AttentionStats, LatencyProfile, PruningRecipe, analyze
from fitprune._support import assets, files
from fitprune.analysis import save
from fitprune.cli.main import main
from fitprune.evaluation.report import write_report
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import Row


@pytest.fixture(scope="module")
def kinds(made, tmp_path_factory):
    """A file of each kind: what it is called -> path."""
    folder = tmp_path_factory.mktemp("kinds")
    recipe = PruningRecipe.published("llava-1.5-7b", 60)
    recipe.save(folder / "recipe.json")
    shutil.copy(made / "stats.safetensors", folder / "stats.safetensors")
    figures = (1, 4, 1.0, (0.9, 1.0), 1.0, (1.0, 1.0), 1.0, 0.0, {}, {}, 0.0, 1.0, 16.0, 16.0, 100.0)
    results = Results((Row("t", "dense", None, *figures),), timings={"dense_prefill_seconds": 1.0, "rows": []})
    results.save(folder / "results.json")
    write_report(results, folder / "page.html")
    LatencyProfile(recipe.model, (16, 2000), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), 1.0, 576, 64).save(folder / "p.json")
    save.save(analyze(AttentionStats.load(made / "stats.safetensors"), resamples=2), folder / "analysis")
    (folder / "times.json").write_text(json.dumps({"model": "m", "device": "cpu", "torch": "2", "timings": []}))
    (folder / "answers.jsonl").write_text(json.dumps({"run": {"model": "m"}}) + "\n")
    Image.new("RGB", (4, 4)).save(folder / "image.jpg")
    (folder / "notes.txt").write_text("my notes")
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "empty").write_text("")
    return {kind: folder / name for kind, name in KINDS.items()}


KINDS = {
    "a recipe": "recipe.json",
    "statistics": "stats.safetensors",
    "results": "results.json",
    "a report": "page.html",
    "a latency profile": "p.json",
    "an analysis": "analysis/analysis.json",
    "times": "times.json",
    "a journal of answers": "answers.jsonl",
    "times of an evaluation": "results.timings.json",
    "an image": "image.jpg",
    "no file of fitprune": "notes.txt",
    "no file of fitprune, but JSON": "other.json",
}


FOREIGN = list(KINDS)[-2:]


def test_every_kind_of_file_is_known_by_its_content(kinds, made, tmp_path):
    for kind, path in kinds.items():
        same = shutil.copy(path, tmp_path / "renamed")
        assert files.kind_of(same) == (None if kind in FOREIGN else kind)
    assert files.kind_of(tmp_path) == "a folder"
    assert files.kind_of(assets.folder("model") / "model.safetensors") == "a safetensors file"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["cost", "FILE"], "a recipe"),
        (["generate", "digit-scenes", "--image", "x.png", "--question", "q", "--recipe", "FILE"], "a recipe"),
        (["fit", "FILE", "--flops-reduction", "0.5", "-o", "OUT"], "statistics"),
        (["analyze", "FILE", "-o", "OUT"], "statistics"),
        (["report", "FILE", "-o", "OUT.html"], "results"),
        (["fit", "STATS", "--prefill-latency-reduction", "0.1", "--profile", "FILE", "-o", "OUT"], "a latency profile"),
    ],
    ids=["cost", "generate", "fit", "analyze", "report", "profile"],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(kinds, tmp_path, capsys, command, wanted, kind):
    if kind == wanted:
        return
    places = {
        "FILE": str(kinds[kind]),
        "OUT": str(tmp_path / "out"),
        "OUT.html": str(tmp_path / "out.html"),
        "STATS": str(kinds["statistics"]),
    }
    assert main([places.get(word, word) for word in command]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(kinds[kind]) in said
    if kind not in FOREIGN:
        assert f"is {kind}: must be {wanted}, made by 'fitprune " in said
    else:
        assert "codec" not in said
        assert "JSON" in said or "format" in said or "schema" in said or "truncated or foreign" in said


WRITERS = {
    "statistics": ["measure", "/no-such-model", "--data", "digit-scenes/test", "-o", "FILE"],
    "a recipe": ["fit", "STATS", "--flops-reduction", "0.5", "-o", "FILE"],
    "results": ["evaluate", "/no-such-model", "--data", "digit-scenes/test", "-o", "FILE"],
    "a report": ["report", "RESULTS", "-o", "FILE"],
    "a latency profile": ["profile", "/no-such-model", "-o", "FILE"],
    "times": ["time", "/no-such-model", "--recipe", "llava-1.5-7b:60", "-o", "FILE"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made_kind", WRITERS)
def test_an_output_replaces_its_own_kind_alone(kinds, tmp_path, capsys, made_kind, kind):
    out = tmp_path / "file.html"
    before = kinds[kind].read_bytes()
    out.write_bytes(before)
    places = {"FILE": str(out), "STATS": str(kinds["statistics"]), "RESULTS": str(kinds["results"])}
    command = [places.get(word, word) for word in WRITERS[made_kind]]
    code = main(command)
    said = capsys.readouterr()
    if kind != made_kind:
        shown = "no file of fitprune" if kind in FOREIGN else kind
        assert f"file.html is {shown}: choose another output for {made_kind}, or pass --overwrite" in said.err
        assert code == 2
        assert out.read_bytes() == before
        assert list(tmp_path.iterdir()) == [out]
        code = main([*command, "--overwrite"])
        said = capsys.readouterr()
    # What needs no model was made; the others came as far as the model.
    if made_kind in ("a recipe", "a report"):
        assert code == 0
        assert "which replaced the one there" in said.out
    else:
        assert "/no-such-model" in said.err
        assert out.read_bytes() == before


def test_a_report_is_named_as_a_page(kinds, tmp_path, capsys):
    assert main(["report", str(kinds["results"]), "-o", str(tmp_path / "r.txt")]) == 2
    assert "r.txt: must end in .html" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_new_or_empty_file_is_not_called_replaced(kinds, tmp_path, capsys):
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "new.json"):
        command = ["fit", str(kinds["statistics"]), "--flops-reduction", "0.5", "-o", str(tmp_path / name)]
        assert main(command) == 0
        assert "replaced" not in capsys.readouterr().out


def test_a_folder_that_holds_other_things_is_not_written_into(kinds, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "removals.csv").write_text("my own")
    fit = ["fit", str(kinds["statistics"]), "--flops-reduction"]
    shape = ["analyze", str(kinds["statistics"]), "--no-pictures", "--resamples", "2", "-o"]
    cases = [
        ([*fit, "0.5", "-o", f"{tmp_path}/mine"], "mine holds other files, such as removals.csv: write"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/mine"], "removals.csv"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/a.json"], "2 budgets make a file each: name a folder"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/a.json", "--overwrite"], "name a folder"),
        ([*fit, "0.5", "0.6", "-o", f"{tmp_path}/mine/removals.csv"], "removals.csv is a file: name a folder"),
        ([*shape, f"{tmp_path}/mine"], "mine holds other files, such as removals.csv: name another folder"),
        ([*shape, f"{tmp_path}/mine/removals.csv"], "removals.csv is a file"),
    ]
    for command, message in cases:
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert [p.name for p in tmp_path.rglob("*")] == ["mine", "removals.csv"]
    assert main([*fit, "0.5", "-o", f"{tmp_path}/mine/"]) == 0  # meant as a folder
    assert main([*shape, f"{tmp_path}/mine", "--overwrite"]) == 0
    assert main([*shape, f"{tmp_path}/new"]) == 0
    assert "replaced" not in capsys.readouterr().out
    assert main([*shape, f"{tmp_path}/new"]) == 0
    assert "which replaced the one there" in capsys.readouterr().out


def test_a_full_disk_half_way_through_a_file_leaves_the_old_one(made, tmp_path):
    """A real limit on file size, hit in the middle of the write."""
    target = tmp_path / "stats.safetensors"
    target.write_text("old")
    code = (
        "import resource\n"
        "from fitprune import AttentionStats\n"
        f"stats = AttentionStats.load({str(made / 'stats.safetensors')!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    stats.save({str(target)!r})\n"
        "except OSError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "refused:" in done.stdout
    assert "nothing was changed" in done.stdout
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]


def test_what_needs_matplotlib_says_so(kinds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(kinds["results"]), "-o", f"{tmp_path}/page.html"]) == 0  # draws its own
    assert main(["analyze", str(kinds["statistics"]), "-o", f"{tmp_path}/a"]) == 1
    hint = "pictures need matplotlib: pip install matplotlib, or use --no-pictures"
    assert capsys.readouterr().err == f"fitprune: error: {hint}\n"


def test_what_matplotlib_lacks_is_named(kinds, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "packaging.version", None)  # which matplotlib imports first
    assert main(["analyze", str(kinds["statistics"]), "-o", f"{tmp_path}/a"]) == 1
    assert "pictures need matplotlib, which cannot be imported (import of packaging.version" in capsys.readouterr().err
