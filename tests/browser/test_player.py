"""The player of a page, in a real browser."""

import pytest
import torch
from PIL import Image

from fitprune import Grid, KeptImage, PruningRecipe
from fitprune.calibration.samples import load_samples
from fitprune.pictures.example import Example, example_of
from fitprune.pictures.save import save_example


@pytest.fixture(scope="module")
def kept(app):
    recipe = PruningRecipe((0.6, 0.6, 0.5, 0.4, 0.4, 0.3, 0.2, 0.1), app.served.adapted.fingerprint, 144)
    sample = load_samples("digit-scenes/test")[0]
    return example_of(app.served.model, app.served.processor, recipe, sample, {"dense": "9", "pruned": "9"})


@pytest.fixture(scope="module")
def path(kept, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "kept.html"
    save_example(kept, path)
    return path


@pytest.fixture
def page(chromium, path):
    errors = []
    page = chromium.new_page(viewport={"width": 390, "height": 1200})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda request: None if request.url.startswith("file:") else errors.append(request.url[:60]))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert [error for error in errors if not error.startswith("data:")] == []


def dark_cells(page):
    return page.locator(".left").get_attribute("d").count("M")


def test_the_slider_goes_through_the_layers(page, kept):
    slider = page.get_by_role("slider")
    slider.focus()
    counts = kept.kept.counts
    for layer in reversed(range(8)):
        assert dark_cells(page) == 144 - counts[layer]
        assert page.locator(".count").inner_text() == f"Layer {layer}: {counts[layer]} of 144 visual tokens"
        assert page.locator(".bars rect").nth(layer).get_attribute("class") == "now"
        page.keyboard.press("ArrowLeft")
    page.locator(".bars").click(position={"x": 60, "y": 50})
    assert page.locator(".count").inner_text().startswith("Layer 1:")


def test_play_ends_at_the_last_layer(page):
    page.get_by_role("button", name="Play").click()
    assert page.locator(".count").inner_text().startswith("Layer 0: 144 of 144")
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for(timeout=9000)
    assert page.locator(".count").inner_text().startswith("Layer 7:")


def test_scores_are_drawn_on_a_switch(page):
    assert page.locator(".heat path").count() == 0
    page.get_by_label("scores").check()
    squares = "".join(page.locator(".heat path").evaluate_all("paths => paths.map(path => path.getAttribute('d'))"))
    assert squares.count("M") == 144 - dark_cells(page)
    assert page.locator(".legend").is_visible()


def test_a_box_that_is_drawn_says_what_share_of_it_is_left(page, kept):
    box = page.locator(".view svg").bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.up()
    share = kept.kept.share((0, 0, 0.5, 0.5), 7)
    assert (
        f"{round(36 * share)} of its 36 tokens enter layer 7, {round(100 * share)}%"
        in page.locator(".share").inner_text()
    )
    assert page.locator(".bars polyline").get_attribute("points").count(",") == 16


def test_a_box_is_drawn_by_keys_too(page, kept):
    page.locator(".view svg").focus()
    page.keyboard.press("ArrowRight")  # a box in the middle
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    share = kept.kept.share((0.35, 0.35, 0.8, 0.65), 7)
    assert f"{round(100 * share)}%" in page.locator(".share").inner_text()
    page.keyboard.press("Escape")
    assert "Draw a box" in page.locator(".share").inner_text()


def test_a_box_keeps_its_size_at_the_edge(page):
    page.locator(".view svg").focus()
    for key in ["ArrowRight"] * 20 + ["ArrowLeft"]:
        page.keyboard.press(key)
    frame = page.locator(".frame")
    assert float(frame.get_attribute("width")) == pytest.approx(300)
    assert float(frame.get_attribute("x")) == pytest.approx(650)


def test_the_picture_says_what_enters_each_layer(page, kept):
    label = page.locator(".view svg").get_attribute
    assert label("aria-label").startswith(f"whole picture: {kept.kept.counts[7]} of 144 visual tokens enter layer 7;")
    page.locator("[type=range]").fill("0")
    assert label("aria-label").startswith("whole picture: 144 of 144 visual tokens enter layer 0;")


def test_the_controls_lie_right_below_the_picture(page):
    picture, slider = (page.locator(each).bounding_box() for each in (".views", "[type=range]"))
    assert 0 < slider["y"] - picture["y"] - picture["height"] < 60


def test_a_finger_draws_a_box_by_its_corners(chromium, path, kept):
    context = chromium.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(path.as_uri())
    share = page.locator(".share")
    assert share.inner_text().startswith("Tap two opposite corners of a box")
    box = page.locator(".view svg").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert share.inner_text() == "Now tap the opposite corner."
    page.touchscreen.tap(box["x"] + 2, box["y"] + 2)
    part = round(100 * kept.kept.share((0, 0, 0.5, 0.5), 7))
    assert f"of its 36 tokens enter layer 7, {part}%" in share.inner_text()
    before = page.locator(".frame").get_attribute("width")
    touch = context.new_cdp_session(page)

    def send(kind, *at):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [*at]})

    x, y = box["x"] + 300, box["y"] + 300
    send("touchStart", {"x": x, "y": y})
    for step in range(1, 12):  # upwards, and a little aside: the page scrolls
        send("touchMove", {"x": x - 4 * step, "y": y - 20 * step})
    send("touchEnd")
    page.wait_for_function("scrollY > 50")
    assert page.locator(".frame").get_attribute("width") == before
    context.close()


def test_the_script_draws_the_lines_that_are_there_without_it(chromium, tmp_path):
    tiles = tuple(
        Grid(torch.arange(8).view(4, 2) + 8 * each, (each / 2, 0.0, each / 2 + 0.5, 1.0), f"tile {each + 1} of 2")
        for each in (0, 1)
    )
    kept = KeptImage(tiles, torch.arange(16) * 5 % 3 + 1, 3)
    save_example(Example(Image.new("RGB", (60, 60), "green"), kept), tmp_path / "kept.html")
    lines = []
    for script in (False, True):
        page = chromium.new_page(java_script_enabled=script)
        page.goto((tmp_path / "kept.html").as_uri())
        lines.append(sorted(page.locator(".edge").get_attribute("d").split("M")))
        page.close()
    assert lines[0] == lines[1]
    assert any(line.startswith("500 ") and "v" in line for line in lines[0])  # between the tiles


def test_without_script_the_last_layer_is_there(chromium, path, kept):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert dark_cells(page) == 144 - kept.kept.counts[-1]
    assert page.locator(".count").inner_text() == f"Layer 7: {kept.kept.counts[-1]} of 144 visual tokens"
    assert not page.get_by_role("button", name="Play").is_visible()
    context.close()
