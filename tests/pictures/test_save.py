"""Files of what stays: each kind opens, is small, and is known again."""

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from fitprune import Grid, KeptImage
from fitprune._support import files
from fitprune.pictures.draw import OUTLINE
from fitprune.pictures.example import Example, example_of
from fitprune.pictures.notes import notes
from fitprune.pictures.save import save_example

ENDINGS = ["gif", "png", "svg", "html"]


@pytest.fixture(scope="module")
def example(bundled, samples, recipe):
    return example_of(*bundled, recipe, samples[0], {"dense": "9", "pruned": "<b>9</b>"})


@pytest.fixture(scope="module")
def photograph():
    """The most that a picture holds: noise, 2,880 tokens in two grids, 32 layers."""
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    grids = (
        Grid(torch.arange(576).view(24, 24), (0.0, -0.17, 1.0, 1.17), "whole picture"),
        Grid(torch.arange(576, 2880).view(48, 48), (0.0, 0.0, 1.0, 1.0), "large"),
    )
    entered = torch.arange(2880) * 7919 % 33
    scores = torch.rand(32, 2880)
    return Example(Image.fromarray(noise), KeptImage(grids, entered, 32, scores), "Where is it?", {})


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_each_kind_is_small_and_known_again(example, tmp_path, ending):
    path = tmp_path / f"kept.{ending.upper()}"
    save_example(example, path)
    assert 1000 < path.stat().st_size < 2_000_000
    assert files.kind_of(path) == files.PICTURE
    first = path.read_bytes()
    save_example(example, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_large_photograph_with_many_tokens(photograph, tmp_path, ending):
    save_example(photograph, tmp_path / f"kept.{ending}")
    assert files.kind_of(tmp_path / f"kept.{ending}") == files.PICTURE


def test_the_animation_goes_through_all_layers_and_begins_again(example, tmp_path):
    save_example(example, tmp_path / "kept.gif")
    with Image.open(tmp_path / "kept.gif") as gif:
        assert gif.n_frames == 8
        assert gif.info["loop"] == 0
        assert gif.width <= 480


def test_the_animation_has_its_lines_where_nothing_enters_the_last_layer(tmp_path):
    kept = KeptImage((Grid(torch.tensor([[0, 1]]), (0, 0, 1, 1), "whole picture"),), torch.tensor([2, 1]), 3)
    save_example(Example(Image.effect_noise((64, 64), 90), kept), tmp_path / "kept.gif")
    with Image.open(tmp_path / "kept.gif") as gif:
        gif.seek(1)
        assert OUTLINE in {colour for _, colour in gif.convert("RGB").getcolors(10**6)}


def test_a_video_has_every_layer(example, tmp_path):
    av = pytest.importorskip("av")
    save_example(example, tmp_path / "kept.mp4")
    assert files.kind_of(tmp_path / "kept.mp4") == files.PICTURE
    with av.open(tmp_path / "kept.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 7 * 4 + 25


def test_without_pyav_a_video_is_refused_and_nothing_is_left(example, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"a video needs PyAV.*pip install av, or write a \.gif"):
        save_example(example, tmp_path / "kept.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_svg_is_sound_and_holds_text_as_text(example, tmp_path):
    save_example(example, tmp_path / "kept.svg")
    text = (tmp_path / "kept.svg").read_text()
    ElementTree.fromstring(text)
    assert "pruned: &lt;b&gt;9&lt;/b&gt;" in text
    assert "Which digit is blue?" in text


def test_a_page_loads_nothing_and_runs_no_text_of_strangers(example, tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    save_example(Example(example.picture, example.kept, hostile, {hostile: hostile}), tmp_path / "kept.html")
    page = (tmp_path / "kept.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_another_ending_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match=r"kept.webp: must end in .gif, .mp4, .png, .svg, .html"):
        save_example(example, tmp_path / "kept.webp")


def test_letters_that_the_font_lacks_are_boxes_in_pixels_alone(example, tmp_path, caplog):
    other = Example(example.picture, example.kept, "这是什么?", {"dense": "九"})
    for ending in ENDINGS:
        save_example(other, tmp_path / f"kept.{ending}")
    assert "这是什么?" in (tmp_path / "kept.html").read_text()
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == 2 * [
        "its font lacks letters of the question or an answer; .svg and .html show all"
    ]
    caplog.clear()
    save_example(
        Example(example.picture, example.kept, "What\u2019s this \u2014 a \u201c6\u201d\u2026?", {"dense": "6"}),
        tmp_path / "kept.png",
    )
    assert caplog.records == []


def test_an_svg_is_sound_whatever_a_model_says(example, tmp_path):
    save_example(Example(example.picture, example.kept, "a\x00\x1bb\uffff", {"dense": "\x0c"}), tmp_path / "kept.svg")
    words = "".join(ElementTree.parse(tmp_path / "kept.svg").getroot().itertext())
    assert "a b" in words
    assert "dense: (an empty answer)" in words


def test_strips_of_several_pictures_may_be_in_one_page(example, photograph, tmp_path):
    names = set()
    for number, each in enumerate([example, photograph]):
        save_example(each, tmp_path / f"{number}.svg")
        text = (tmp_path / f"{number}.svg").read_text()
        (name,) = re.findall(r'id="(.*?)"', text)
        assert text.count(f'href="#{name}"') in (4, 8)
        names.add(name)
    assert len(names) == 2


def test_a_file_says_what_it_is_of_and_what_its_shades_mean(example, photograph, tmp_path):
    lines = ["digit-scenes, budget not recorded", "bright: enters the layer; dark: has left"]
    assert notes(example) == lines
    cropped = Example(example.picture, image_with_box((0.0, 0.2, 1.0, 0.8)))
    assert notes(cropped) == [
        "bright: enters the layer; dark: has left; pale: no token sees it",
        "1 of 3 tokens, such as ends of rows, lie on no part of the picture",
    ]
    assert notes(photograph)[-1] == "from left: whole picture, large"
    for ending in ("svg", "html"):
        save_example(cropped, tmp_path / f"kept.{ending}")
        assert "pale: " in (tmp_path / f"kept.{ending}").read_text()


def image_with_box(box):
    return KeptImage((Grid(torch.tensor([[0, 1]]), box, "whole picture"),), torch.tensor([2, 1, 2]), 2)
