"""The pages that commands write: they load nothing, fit a phone, are dark or light, and are accessible."""

import pytest

from fitprune.cli.main import main
from helpers.axe import serious

NARROWEST = """() => {
  const table = document.querySelector('[aria-label=results] table');
  table.style.width = '1px';
  return [...table.querySelectorAll('thead th')].map(head => head.offsetWidth);
}"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "-o", str(folder)]) == 0
    return folder / "index.html"


@pytest.fixture(scope="module")
def kept(demo):
    path = demo.parent / "kept.html"
    picture, recipe = "digit-scenes/test/images/0009.jpg", demo.parent / "recipe-60.json"
    command = ["show", picture, "--question", "What colour is the 6?", "--model", "digit-scenes"]
    assert main([*command, "--recipe", str(recipe), "--dense", "-o", str(path)]) == 0
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["demo", "kept"])
def test_a_page_fits_and_is_accessible(chromium, request, name, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(request.getfixturevalue(name).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
    assert page.evaluate(cut) == 0
    if name == "demo" and width == 390:  # the whole demo has five columns of figures instead of three
        first, *others = page.evaluate(NARROWEST)
        assert first + 5 * max(others) <= 358
    assert serious(page) == []
    page.close()
    assert faults == []
