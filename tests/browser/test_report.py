"""The report in a real browser: it sorts, filters, fits a phone, is dark or light, and runs no script of strangers."""

import dataclasses
import json

import pytest

from fitprune.evaluation.report import write_report
from helpers.answered import RECIPE, answered
from helpers.axe import serious

BUDGETS = (0.4, 0.8)
DENSE = ["a"] * 60
HOSTILE = "<img src=x onerror=alert(1)>"
# What lies outside of its chart, or over another text of it.
FAULTS = """() => [...document.querySelectorAll('.chart svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  if (!box.width) return [];
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const outside = texts.filter(([, at]) => at.left < box.left - 1 || at.right > box.right + 1
    || at.top < box.top - 1 || at.bottom > box.bottom + 1).map(([text]) => 'outside: ' + text);
  const over = texts.flatMap(([text, a], at) => texts.slice(at + 1).filter(([, b]) => a.left < b.right - 1
    && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3).map(([other]) => text + ' over ' + other));
  return [...outside, ...over];
})"""


@pytest.fixture(scope="module", params=[3, 10], ids=["few methods", "many methods"])
def path(request, tmp_path_factory):
    names = ["fitprune", "last-layer-first", *(f"method-{number}" for number in range(request.param - 2))]
    said = {"dense": DENSE, (HOSTILE, 0.4): DENSE, (HOSTILE, 0.8): ["z", *DENSE[1:]]}
    for number, name in enumerate(names):
        said |= {(name, at): ["b"] * (number + 1) + ["a"] * (59 - number) for at in BUDGETS}
    results = answered([["a"]] * 60, said, questions=[f"question {number}?" for number in range(60)])
    recipes = {f"{name} {100 * at:g}%": json.loads(RECIPE.to_json()) for name in names for at in BUDGETS}
    example = {**results.examples[0], "layers_entered": {"fitprune 80%": [32, 3, 2, 1] * 144}}
    results = dataclasses.replace(results, recipes=recipes, examples=(example,))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, path)
    return path


@pytest.fixture
def visit(chromium, path):
    errors, pages = [], []

    def open_page(**options):
        page = chromium.new_page(**options)
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700, 390])
def test_nothing_is_cut_or_overlaps_at_any_width(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(FAULTS) == []
    assert serious(page) == []
    sizes = page.evaluate(
        "[...document.querySelectorAll('.chart svg')].map(s => [s.clientWidth, +s.getAttribute('width')])"
    )
    assert all(shown in (0, drawn) or shown > 0.9 * drawn for shown, drawn in sizes)  # hidden, or of its real size
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_click_on_a_column_sorts_by_it(visit):
    page = visit()
    table = page.locator("table.sortable").first

    def names():
        return table.locator("tbody th").all_inner_texts()

    before = names()
    table.locator("thead button").first.click()
    assert names() == sorted(before)
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    table.locator("thead button").nth(2).click()
    figures = [float(text.split()[0]) for text in table.locator("tbody td:nth-child(3)").all_inner_texts()]
    assert figures == sorted(figures, reverse=True)
    table.locator("thead button").nth(2).click()
    assert names()[0] != names()[-1]
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_changed_answers_are_filtered_by_method_kind_and_text(visit):
    page = visit()
    shown = page.locator(".changes>li:visible")
    method, change = page.locator(".filter select").all()
    every = shown.count()
    method.select_option(label="fitprune 80%")
    assert shown.count() == 1
    assert page.locator(".filter output").inner_text() == f"1 of {every}"
    change.select_option("won")
    assert shown.count() == 0
    change.select_option("lost")
    assert shown.count() == 1
    method.select_option("")
    page.get_by_label("Text").fill("QUESTION 1?")
    assert shown.count() == 1
    assert page.locator(".changes>li:visible b").inner_text() == "question 1?"
    page.get_by_label("Text").fill("\u201cz\u201d")  # an answer of another method, to question 0
    assert shown.count() == 1
    method.select_option(label="fitprune 80%")
    assert shown.count() == 0


def test_without_script_all_is_there(chromium, path):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".changes>li:visible").count() > 1
    assert not page.locator(".filter").is_visible()
    assert page.locator("thead button").count() == 0
    context.close()


def test_a_tile_shows_what_is_left(visit):
    page = visit(viewport={"width": 390, "height": 900})
    assert all(tile.bounding_box()["width"] >= 160 for tile in page.locator(".tile").all())
    assert page.locator(".tile .edge[d^=M]").count() == 4
    counts = [text.split(": ")[1] for text in page.locator(".strip div").all_inner_texts()]
    cells = [
        path.count("M")
        for path in page.eval_on_selector_all(".tile path:not(.edge)", "all => all.map(p => p.getAttribute('d'))")
    ]
    assert [576 - cell for cell in cells] == list(map(int, counts)) == [432, 144, 144, 144]
