"""`fitprune show`."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from fitprune import PruningRecipe
from fitprune.cli.main import main
from fitprune.recipes import published


@pytest.mark.parametrize("name", [f"{n}:{p}" for n, ps in published.names().items() for p in ps])
def test_every_published_recipe_is_shown(name, capsys):
    assert main(["show", name]) == 0
    said = capsys.readouterr().out
    recipe = PruningRecipe.named(name)
    layers = [line.split() for line in said.split("layer  enter")[1].split("\n\n")[0].splitlines()[1:]]
    assert [int(cells[3]) for cells in layers] == recipe.kept(recipe.visual_tokens)
    assert [int(cells[2]) for cells in layers] == recipe.counts(recipe.visual_tokens)
    assert f"{name.split(':')[1]}% of the visual FLOPs, as its authors name it" in said
    assert "ranked by           fitprune\n" in said
    assert "arXiv:2409.10197" in said


def test_a_fitted_recipe_and_one_in_a_folder(made, tmp_path, capsys):
    path = made / "recipes" / "flops_reduction-0.5.json"
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "budget              flops_reduction 0.5, reached 0.50" in shown
    assert "measured.weights" in shown
    assert "model               llava, 8 layers of width 192" in shown
    PruningRecipe.load(path).save_pretrained(tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["show", str(path), "--visual-tokens", "100"]) == 0
    assert "visual tokens       100, " in capsys.readouterr().out


def test_a_recipe_on_the_hub(made, hub, capsys):
    hub.create("lab/scenes")
    hub.put("lab/scenes", {"fitprune_recipe.json": (made / "recipes" / "flops_reduction-0.5.json").read_bytes()})
    assert main(["show", "lab/scenes"]) == 0
    assert "flops_reduction 0.5" in capsys.readouterr().out


def test_a_scorer_of_another_kind_is_named_with_its_parameters(made, tmp_path, capsys):
    data = json.loads((made / "recipes" / "flops_reduction-0.5.json").read_text())
    for scorer, text in [
        ({"name": "random", "parameters": {"seed": 7}}, "ranked by           random\nwith parameters     "),
        ({"name": "os.system"}, "ranked by           os.system, which no model can be pruned by: "),
    ]:
        (tmp_path / "r.json").write_text(json.dumps(data | {"scorer": scorer}))
        assert main(["show", str(tmp_path / "r.json")]) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "cost"])
def test_a_scorer_that_is_not_usable_is_named_on_one_line_of_plain_text(made, tmp_path, capsys, plugins, command):
    plugins("fitprune.scorers", "def x(*, k=1):\n    raise KeyError('a\\n\\x1b[31m')", faulty="stranger:x")
    data = json.loads((made / "recipes" / "flops_reduction-0.5.json").read_text())
    for name, shown in [("a\nb\x1b[31m", r"a\nb\x1b[31m, which"), ("", "'', which"), ("faulty", "faulty, which")]:
        (tmp_path / "r.json").write_text(json.dumps(data | {"scorer": {"name": name}}))
        assert main([command, f"{tmp_path}/r.json"]) == 0
        said = capsys.readouterr().out
        (line,) = [line for line in said.splitlines() if line.startswith("ranked by")]
        assert line.startswith(f"ranked by           {shown} no model can be pruned by: ")
        assert said.replace("\n", "").isprintable()
    assert "KeyError" in line


def test_what_a_stranger_wrote_stays_on_its_line_and_in_plain_text(made, tmp_path, capsys):
    data = json.loads((made / "recipes" / "flops_reduction-0.5.json").read_text())
    data["provenance"] = {
        "budget": [1],
        "a\x1b[31m\nb": "\x1b]0;title\x07" + "é" * 500,
        "deep": [[[[1] * 500]]],
        "n": {},
    }
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert main(["show", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.isascii()
    assert max(map(len, said.splitlines())) < 300
    assert "budget              not recorded" in said


def test_it_needs_no_torch_for_the_librarys_own_scorer():
    code = (
        "import sys, fitprune.cli.main\n"
        "assert fitprune.cli.main.main(['show', 'llava-1.5-7b:60']) == 0\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_names_that_are_no_recipe(tmp_path, capsys):
    assert main(["show", f"{tmp_path}/none.json"]) == 1
    for command in ("show", "cost", "push"):
        with pytest.raises(SystemExit):
            main([command, "", *["me/x"][: command == "push"]])
        assert "'': must be the name of a recipe" in capsys.readouterr().err
    assert main(["show", "llava-1.5-7b"]) == 2
    assert "say which of its recipes" in capsys.readouterr().err


IMAGE = "digit-scenes/test/images/0000.jpg"


@pytest.fixture
def picture(made):
    recipe = str(made / "recipes" / "flops_reduction-0.5.json")
    return ["show", IMAGE, "--question", "Which digit is blue?", "--model", "digit-scenes", "--recipe", recipe]


@pytest.mark.parametrize("ending", ["gif", "html"])
def test_what_stays_of_an_image_becomes_a_file(picture, tmp_path, capsys, ending):
    out = tmp_path / f"kept.{ending}"
    assert main([*picture, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert 1000 < out.stat().st_size < 2_000_000
    assert main([*picture, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}, which replaced the one there\n"


def test_a_picture_replaces_no_picture_of_the_users(picture, tmp_path, capsys):
    own = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(own)
    before = own.read_bytes()
    assert main([*picture, "-o", str(own)]) == 2
    assert "cat.png is an image: choose another output for a picture that fitprune drew" in capsys.readouterr().err
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "kept.webp"], "kept.webp: must end in .gif, .mp4, .png, .svg, .html"),
        ([], "pass both, -o FILE"),
    ],
)
def test_a_picture_needs_a_file_of_a_known_kind(picture, capsys, words, message):
    assert main([*picture, *words]) == 2
    assert message in capsys.readouterr().err


def test_an_image_without_a_question(made, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    assert main(["show", str(tmp_path / "cat.png")]) == 2
    assert "cat.png is an image: pass --question, --model and -o too" in capsys.readouterr().err


def test_the_curve_of_a_recipe_is_drawn_beside_its_table(tmp_path, capsys):
    out = tmp_path / "curve.svg"
    assert main(["show", "llava-1.5-7b:60", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "layer  enter  leave  stay" in printed
    assert printed.endswith(f"\n{out}\n")
    assert out.read_text().startswith("<svg")
    assert main(["show", "llava-1.5-7b:60", "-o", str(tmp_path / "curve.png")]) == 2
    assert "curve.png: must end in .svg or .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in/none.jpg"], "in/none.jpg: no such file\n"),
        ([IMAGE], "is an image: pass --question, --model and -o too"),
        (["llava-1.5-7b:60", "--dense", "--model", "X"], "--model, --dense: only of use for an image; pass --question"),
        ([IMAGE, "--question", " ", "--model", "X", "-o", "a.gif"], "--question: is empty"),
        ([IMAGE, "--question", "Q", "--crops", "2"], "--crops: only of use for a recipe"),
    ],
)
def test_what_would_change_nothing_or_is_not_there_is_refused(capsys, words, message):
    assert main(["show", *words]) != 0
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_image_is_named_without_an_option_of_another_command(picture, tmp_path, capsys):
    picture[1] = str(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{}")
    assert main([*picture, "-o", str(tmp_path / "kept.png")]) == 2
    assert f"error: {tmp_path}/r.json is not an image file" in capsys.readouterr().err


def test_the_title_of_a_curve_is_short_and_its_file_is_legible_on_a_phone(made, tmp_path):
    recipe = str(made / "recipes" / "flops_reduction-0.5.json")
    for ending in ("svg", "html"):
        assert main(["show", recipe, "-o", f"{tmp_path}/curve.{ending}"]) == 0
    text = (tmp_path / "curve.svg").read_text()
    assert "width='358'" in text
    assert re.search(r"llava: flops_reduction 0\.5, reached 0\.\d{1,4}<", text)
    page = (tmp_path / "curve.html").read_text()
    assert page.partition("<body>")[2].count("llava: ") == 1
