"""What a visitor does, in a real browser."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from helpers.axe import serious


def words(page, which="#pruned"):
    return page.locator(f"{which} .answer p").first.inner_text()


def wait_for_answer(page):
    page.wait_for_selector("#pruned .answer:not([aria-busy]) button[data-word]")


def run(page):
    page.locator("#run").click()
    page.wait_for_selector("#pruned .answer:not([aria-busy]) h2:text-is('Pruned')")
    wait_for_answer(page)


def count(page):
    return page.locator("#layers .count").inner_text()


def set_budget(page, percent):
    box = page.locator("#budget input[type=number]")
    box.fill(str(percent))
    box.press("Enter")


def choose_method(page, method):
    page.locator("#method input").click()
    page.get_by_role("option", name=method, exact=True).click()


def upload(page, name, data, kind="image/png"):
    page.locator("#picture button[aria-label='Remove Image']").click()
    page.locator("#picture input[type=file]").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="png", **options)
    return buffer.getvalue()


def pixels(page, selector):
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"), dtype=int)


def test_the_page_opens_with_an_answer_and_what_is_left(visit):
    page = visit()
    assert words(page)
    assert words(page, "#dense")
    assert re.fullmatch(r"Layer 7: \d+ of 144 visual tokens", count(page))
    assert "time to first token" in page.locator("#costs").inner_text()


def test_an_example_is_answered_pruned_and_dense(visit):
    page = visit()
    page.locator("#examples button").nth(3).click()
    page.wait_for_function("document.querySelector('#question textarea').value == 'What is the number?'")
    wait_for_answer(page)
    page.wait_for_function("document.querySelectorAll('#dense .answer span').length == 4")
    costs = page.locator("#costs").inner_text()
    for line in ("time to first token", "tokens per second", "KV cache", "prefill"):
        assert re.search(rf"{line}.*\d+\.\d\dx", costs, re.S)


def test_moving_the_budget_changes_what_is_left_and_the_answers_say_that_they_are_old(visit):
    page = visit()
    before = count(page)
    set_budget(page, 90)
    page.wait_for_function("text => document.querySelector('#layers .count').innerText != text", arg=before)
    page.wait_for_selector("text=at 60%, fitprune: press Run for a new one")
    run(page)
    assert "press Run" not in page.locator("#pruned").inner_text()


def test_the_layers_can_be_stepped_and_played(visit):
    page = visit()
    slider = page.locator("#layers input[type=range]")
    slider.focus()
    last = pixels(page, "#layers .view svg")
    slider.press("Home")
    assert count(page) == "Layer 0: 144 of 144 visual tokens"
    first = pixels(page, "#layers .view svg")
    assert (abs(first - last).max(2) > 40).mean() > 0.05
    page.locator("#layers .play").click()
    page.wait_for_function("document.querySelector('#layers .count').innerText.startsWith('Layer 7')")


def test_the_layer_stays_when_the_budget_moves(visit):
    page = visit()
    page.locator("#layers input[type=range]").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    before = count(page)
    assert before.startswith("Layer 3")
    set_budget(page, 90)
    page.wait_for_function("text => document.querySelector('#layers .count').innerText != text", arg=before)
    assert count(page).startswith("Layer 3")


def test_a_box_tells_its_share_in_every_layer(visit):
    page = visit()
    place = page.locator("#layers .view svg").bounding_box()
    page.mouse.move(place["x"] + 5, place["y"] + 5)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2, steps=4)
    page.mouse.up()
    share = page.locator("#layers .share").inner_text()
    assert re.fullmatch(r"Box \(line\): \d+ of its 36 tokens enter layer 7, \d+%", share)
    assert len(page.locator("#layers .bars polyline").get_attribute("points").split()) == 16
    page.locator("#layers input[type=range]").focus()
    page.keyboard.press("Home")
    assert "36 of its 36 tokens enter layer 0, 100%" in page.locator("#layers .share").inner_text()


def test_a_word_shows_what_the_model_looked_at_and_again_the_scores(visit):
    page = visit()
    page.locator("#pruned button[data-word]").first.click()
    page.wait_for_selector("#pruned button[aria-pressed=true]")
    page.wait_for_selector("#layers .legend:has-text('attention, mean over heads and layers')")
    assert page.locator("#layers .heat path").count() > 3
    page.locator("#pruned button[aria-pressed=true]").press("Enter")  # the keyboard does it too
    page.wait_for_selector("#pruned button[data-word]:not([aria-pressed=true])")
    page.wait_for_selector("#layers .legend:has-text('rank of a token')", state="attached")


def test_budgets_and_methods_are_compared(visit):
    page = visit()
    page.get_by_role("tab", name="Budgets").click()
    page.locator("#by-budget").click()
    page.wait_for_function("document.querySelectorAll('#budgets tbody tr').length == 5")
    assert page.locator("#budgets tbody th").all_inner_texts() == ["0%", "40%", "60%", "80%", "90%"]
    page.get_by_role("tab", name="Methods").click()
    page.locator("#by-method").click()
    page.wait_for_function("document.querySelectorAll('#methods tbody tr').length == 13")
    table = page.locator("#methods").inner_text()
    assert "fastv" in table
    assert "dense" in table


@pytest.mark.parametrize("method", ["fitprune", "fastv", "recipe: mine"])
def test_the_python_lines_run_and_give_the_answer_on_the_screen(visit, tmp_path, method):
    page = visit()
    if method != "fitprune":
        choose_method(page, method)
        page.wait_for_selector("text=press Run for a new one")
        run(page)
    shown = " ".join(words(page).split())
    page.get_by_role("tab", name="Python").click()
    lines = page.locator("#python textarea").input_value()
    path = tmp_path / "lines.py"
    path.write_text(lines)
    ran = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"pruned: {shown}" in " ".join(ran.stdout.split())
    assert (tmp_path / "kept.png").stat().st_size > 1000


def test_a_too_large_file_is_refused(visit):
    page = visit()
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), dtype=np.uint8)
    upload(page, "large.png", png(Image.fromarray(noise)))
    page.wait_for_selector("text=/maximum (allowed )?size|exceeds/i")


def test_too_many_pixels_are_refused_in_one_line(visit):
    page = visit()
    upload(page, "wide.png", png(Image.new("L", (4000, 2000))))
    page.wait_for_selector("text=wide.png has 4,000 x 2,000 pixels: must have at most 4 million; make it smaller")


def test_what_is_no_picture_is_refused(visit):
    page = visit()
    upload(page, "notes.png", b"these are notes, and no picture")
    page.wait_for_selector("text=notes.png is not an image file that Pillow reads; choose a JPEG, PNG or WebP picture")


def test_a_rotated_phone_photo_lies_upright(visit):
    page = visit()
    image = Image.new("RGB", (400, 200), "white")
    image.paste((255, 0, 0), (0, 0, 100, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", exif=exif, quality=95)
    upload(page, "phone.jpg", buffer.getvalue(), "image/jpeg")
    page.wait_for_function("document.querySelector('#layers .view svg').viewBox.baseVal.width < 600")
    page.locator("#layers input[type=range]").focus()
    page.keyboard.press("Home")
    drawn = pixels(page, "#layers .view svg")
    height, width = drawn.shape[:2]
    middle = drawn[:, width // 8 : width // 4]  # the picture is half as wide as high, and lies on the left
    top, bottom = middle[: height // 10].mean((0, 1)), middle[-height // 10 :].mean((0, 1))
    assert top[0] - top[1] > 50  # pale, since the model does not see the ends of a long picture
    assert bottom[1] > 150


def test_a_transparent_logo_lies_on_white(visit):
    page = visit()
    logo = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (80, 80, 120, 120))
    before = page.locator("#layers image").get_attribute("href")
    upload(page, "logo.png", png(logo))
    page.wait_for_function("url => document.querySelector('#layers image').getAttribute('href') != url", arg=before)
    page.locator("#layers input[type=range]").focus()
    page.keyboard.press("Home")
    drawn = pixels(page, "#layers .view svg")
    assert drawn[5:20, 5:20].mean() > 240


def test_a_recipe_has_no_budgets_to_compare(visit):
    page = visit()
    choose_method(page, "recipe: mine")
    page.get_by_role("tab", name="Budgets").click()
    page.locator("#by-budget").click()
    page.wait_for_selector("text=recipe: mine: has one budget of its own; choose a method, to compare budgets")


def test_answers_to_another_question_say_so(visit):
    page = visit()
    run(page)
    page.locator("#question textarea").press_sequentially(" And why?")
    for box in ("#pruned", "#dense"):
        page.wait_for_selector(f"{box} h2:has-text('before question or picture changed: press Run for a new one')")
    assert page.locator("#pruned button[data-word]").count() == 0
    run(page)
    page.locator("#picture button[aria-label='Remove Image']").click()
    page.wait_for_selector("#dense h2:has-text('before question or picture changed')")


def test_a_screen_that_is_gone_is_nobody_elses(visit, app):
    """The state of a visitor who was away is dropped: what is pressed then answers nothing of another."""
    page = visit()
    page.locator("#examples button").nth(1).click()
    page.wait_for_function("document.querySelectorAll('#dense .answer span').length == 3")
    before = page.locator("#dense .answer").inner_text()
    page.wait_for_timeout(500)  # whatever still runs has a state
    app.page.state_holder.session_data.clear()
    page.locator("#pruned button[data-word]").first.click()
    page.wait_for_selector("text=nothing is on the screen any more: press Run")
    assert page.locator("#dense .answer").inner_text() == before


def test_a_box_is_of_one_picture(visit):
    page = visit()
    page.locator("#layers .view svg").focus()
    page.keyboard.press("ArrowRight")
    assert "Box" in page.locator("#layers .share").inner_text()
    set_budget(page, 90)
    page.wait_for_selector("#pruned h2:has-text('press Run')")
    assert "Box" in page.locator("#layers .share").inner_text()
    page.locator("#examples button").nth(1).click()
    page.wait_for_selector("#layers .share:has-text('Draw a box')")


def test_two_visitors_keep_their_own_screens(visit):
    first, second = visit(), visit()
    second.locator("#examples button").nth(1).click()
    second.wait_for_function("document.querySelector('#question textarea').value == 'Read the middle row.'")
    second.wait_for_function("document.querySelectorAll('#dense .answer span').length == 3")
    set_budget(second, 90)
    second.wait_for_function("document.querySelector('#layers .count').innerText.includes(' of 144')")
    second.wait_for_selector("text=press Run for a new one")
    first.locator("#pruned button[data-word]").first.click()
    first.wait_for_selector("#pruned button[aria-pressed=true]")
    assert count(first) != count(second)
    assert first.locator("#question textarea").input_value() == "Which digits are in the bottom row?"
    assert second.locator("#pruned button[aria-pressed=true]").count() == 0


def test_after_a_reload_in_the_middle_the_page_works(visit, app, slow, monkeypatch):
    page = visit()
    page.locator("#run").click()
    page.wait_for_selector("#pruned .answer[aria-busy]")
    page.reload()
    page.wait_for_selector("#layers figure.kept .controls:not([hidden])")
    assert app.served._device.acquire(timeout=8)  # whoever left has freed it
    app.served._device.release()
    monkeypatch.undo()
    run(page)
    assert words(page)


def test_stop_ends_an_answer_and_frees_the_device(visit, app, slow):
    page = visit()
    page.locator("#run").click()
    page.wait_for_selector("#pruned .answer[aria-busy]")
    page.locator("#stop").click()
    page.wait_for_selector("#pruned .answer:not([aria-busy]) h2:has-text('press Run for a new one')")
    assert app.served._device.acquire(timeout=4)  # of the 12 seconds that both answers take
    app.served._device.release()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_is_accessible_and_fits(visit, width, scheme):
    page = visit(width=width, color_scheme=scheme)
    for name in ("Layers", "Budgets", "Methods", "Python"):
        page.get_by_role("tab", name=name).click()
        if name == "Budgets":
            page.locator("#by-budget").click()
            page.wait_for_function("document.querySelectorAll('#budgets tbody tr').length == 5")
        page.wait_for_timeout(400)  # colours fade in
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
