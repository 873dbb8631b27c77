"""The report: what it says at the top, which answers it lists, what it paints, and whose text it escapes."""

import dataclasses
import json
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from fitprune.evaluation import report_answers
from fitprune.evaluation.records import changed, journal_of
from fitprune.evaluation.report import write_report
from fitprune.evaluation.results import Results
from helpers.answered import RECIPE, answered, save_with_journal

HOSTILE = "<script>alert(1)</script>'\"&<img src=x onerror=alert(1)>"


def written(results, folder, **options):
    write_report(results, folder / "r.html", **options)
    return (folder / "r.html").read_text()


def listed(page):
    """The listed questions: (the question, [(numbers of the labels, kind, answer)])."""
    part = page[page.index("<h2>Answers that changed") :]
    answers = r"<li data-by='([\d ]+)' data-kind=(\w+)><span[^>]*>&ldquo;(.*?)&rdquo;"
    return [(text, re.findall(answers, rest)) for text, rest in re.findall(r"<li><b>(.*?)</b>(.*?</ul>)", part)]


@pytest.fixture
def small():
    said = {"dense": ["a", "b", "c", "d"], "fitprune": ["a", "x", "c", "D."], ("dart", 0.6): ["a", "x", "z", "d"]}
    said["vtw", 0.8] = ["y", "b", "c", "d"]
    return answered([["a"], ["b"], ["z"], ["d"]], said, questions=["one", "two", "three", "four"])


def test_the_top_says_of_what_it_is(small, tmp_path):
    results = dataclasses.replace(
        small,
        provenance={"model": "/somewhere/my-model", "dtype": "bfloat16", "attention": "sdpa", "torch": "2"},
        recipes={"a": {**json.loads(RECIPE.to_json()), "provenance": {"samples": 64}}, "b": {"keep": [1.0, 0.5]}},
    )
    results.save(tmp_path / "results.json")
    os.utime(tmp_path / "results.json", (1_700_000_000, 1_700_000_000))
    page = written(results, tmp_path, source=tmp_path / "results.json")
    assert "<h1>my-model: visual-token pruning against the dense model</h1>" in page
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts == {
        "model": "/somewhere/my-model",
        "date": "2023-11-14 (results.json was last changed)",
        "precision": "bfloat16, sdpa attention",
        "questions": "4 of t",
        "compared": "dense and 3 methods at 60%, 80% of FLOPs removed",
        "calibration": "64 samples",
        "software": "torch 2",
    }
    assert page.index("</dl>") < page.index("<h2>")
    dated = dataclasses.replace(results, provenance={**results.provenance, "date": "2023-10-01"})
    path = save_with_journal(dated, tmp_path, date=None)
    page = written(Results.load(path), tmp_path, source=path)
    assert "<dt>date</dt><dd>2023-10-01</dd>" in page  # though the file is of today
    assert listed(page)  # of the journal, which has no date


def test_answers_that_changed_are_listed_with_who_changed_them(small, tmp_path):
    page = written(small, tmp_path)
    assert listed(page) == [
        ("one", [("2", "lost", "y")]),
        ("two", [("0 1", "lost", "x")]),
        ("three", [("1", "won", "z")]),
        ("four", [("0", "other", "D.")]),  # the metric takes it for the same
    ]
    assert re.findall(r"<option value=(\d)>(.*?)<", page) == [
        ("0", "fitprune 60%"),
        ("1", "dart 60%"),
        ("2", "vtw 80%"),
    ]
    rows = re.findall(r"<tr><th scope=row>(.*?)</th><td>(\d)</td><td>(\d)</td><td>(\d)</td></tr>", page)
    assert rows == [("dart 60%", "2", "1", "1"), ("fitprune 60%", "2", "1", "0"), ("vtw 80%", "1", "1", "0")]


def test_answers_come_from_the_journal_beside_the_results(small, tmp_path):
    path = save_with_journal(small, tmp_path)
    loaded = Results.load(path)
    assert loaded.answers == ()
    assert listed(written(loaded, tmp_path, source=path)) == listed(written(small, tmp_path))
    with open(tmp_path / "results.samples.jsonl", "a") as file:  # what a killed run or a stranger leaves
        file.write('{"place": 9}\nno json\n[1]\n' + "[" * 10_000 + "\n" + '{"said": {"dense": 3}, "place": 1}\n{"pla')
    assert len(list(journal_of(loaded, path))) == 4


def test_without_a_journal_of_this_run_the_report_says_what_is_missing(small, tmp_path):
    path = save_with_journal(small, tmp_path, weights="others")
    for _ in range(2):
        page = written(Results.load(path), tmp_path, source=path)
        assert "Keep results.samples.jsonl of this run beside the results" in page
        assert listed(page) == []
        (tmp_path / "results.samples.jsonl").unlink(missing_ok=True)
    unlike = dataclasses.replace(small, answers=())
    assert "Evaluate with a journal" in written(unlike, tmp_path)


def test_a_journal_without_end_is_read_up_to_a_bound(small, tmp_path, monkeypatch):
    path = save_with_journal(small, tmp_path)
    monkeypatch.setattr("fitprune.evaluation.records.MOST_BYTES", 700)
    assert 0 < len(list(journal_of(small, path))) < 4
    page = written(Results.load(path), tmp_path, source=path)
    assert re.search(r"The answers to [123] of 4 questions could be read", page)


def test_of_many_changes_those_of_fitprune_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(report_answers, "MOST_LISTED", 2)
    said = {"dense": ["a"] * 4, "dart": ["b", "b", "a", "a"], "fitprune": ["a", "a", "a", "b"]}
    page = written(answered([["a"]] * 4, said, questions=list("1234")), tmp_path)
    assert [question for question, _ in listed(page)] == ["1", "4"]
    assert "2 of 3 questions are listed" in page


def test_where_no_answer_changed_the_report_says_so(tmp_path):
    page = written(answered([["a"]] * 3, {"dense": ["a"] * 3, "dart": ["a"] * 3}), tmp_path)
    assert "None of 3 questions is answered otherwise than by the dense model" in page


@pytest.mark.parametrize("accepted", [[], [""], ["The answer is b."]])
def test_where_nothing_is_judged_the_report_paints_nothing_and_marks_what_differs(accepted, tmp_path):
    results = answered([accepted] * 24, {"dense": ["b"] * 24, "fitprune": ["b"] * 24, "dart": ["z"] * 24})
    page = written(results, tmp_path)
    assert not any(f"class={mark}" in page for mark in ("right", "wrong", "best"))
    assert page.count("<span class=changed>") == 4  # dart's answers, in four examples
    assert {kind for _, answers in listed(page) for _, kind, _ in answers} == {"other"}
    assert "value=lost" not in page
    assert results.best == ()
    assert "agreement</span>" in page


def test_where_answers_are_judged_the_report_paints_them(tmp_path):
    results = answered([["b"]] * 24, {"dense": ["b"] * 24, "fitprune": ["B."] * 24, "dart": ["z"] * 24})
    page = written(dataclasses.replace(results, answers=()), tmp_path)
    assert (page.count("class=right"), page.count("class=wrong")) == (4 + 4 + 4, 4)  # dense twice
    assert page.count("class=best") == 1
    soft = answered([["b"] + ["c"] * 9] * 24, {"dense": ["b"] * 24})
    assert "title='0.3 of 1'" in written(soft, tmp_path)


@pytest.mark.parametrize("count", [3, 12])
def test_few_methods_share_a_chart_and_of_many_each_has_one(count, tmp_path):
    said = {"dense": ["b"] * 24} | {("fitprune", at): ["b"] * 24 for at in (0.4, 0.8)}
    said |= {
        (f"m{number}", at): ["z"] * (number + 1) + ["b"] * (23 - number) for number in range(count) for at in (0.4, 0.8)
    }
    page = written(answered([["b"]] * 24, said), tmp_path)
    widths = re.findall(r"<svg[^>]* width='(\d+)'", page)
    assert widths == (["720", "358"] if count == 3 else ["171"] * 13)
    names = re.findall(r"<th scope=row>(\w+)</th><td[ >]", page)[: count + 1]
    assert names == ["fitprune", *(f"m{number}" for number in range(count))]  # the best first


def recipes_of(count):
    """Results of recipes of no stated budget, which cut from 5% of the FLOPs to 95%."""
    said = {"dense": ["b"] * 24} | {(f"mine-{number}", None): ["b"] * 24 for number in range(count)}
    results = answered([["b"]] * 24, said)
    cuts = [0.0, *(0.05 + 0.9 * number / (count - 1) for number in range(count))]
    rows = tuple(
        dataclasses.replace(row, flops_reduction=cut)
        for row, cut in zip(results.rows, [0.0, *cuts[:0:-1]], strict=True)
    )
    entered = {f"mine-{number}": [1] * 16 for number in range(count)}
    examples = ({**results.examples[0], "layers_entered": entered},)
    recipes = {name: json.loads(RECIPE.to_json()) for name in entered}
    return dataclasses.replace(results, rows=rows, recipes=recipes, examples=examples)


def test_recipes_are_placed_by_the_flops_that_they_cut(tmp_path):
    page = written(recipes_of(19), tmp_path)
    assert "<dd>dense and 19 recipes</dd>" in page
    assert "solved to the same budget" not in page
    assert page.count("<polyline points=") == 2 * (2 + 2 * 5)  # curve and layers, each with its legend, at two widths
    assert "recipes: 100% (100 to 100) at 5% to 100% (100 to 100) at 95%" in page
    table = page[page.index('aria-label="recipes, t"') : page.index("<summary>Every figure")]
    assert "<table class=sortable>" in table
    assert re.findall(r"<th scope=row>(.*?)</th><td>(.*?)%</td>", table) == [
        (f"mine-{18 - number}", f"{5 + 5 * number:.1f}") for number in range(19)
    ]
    assert "5 of 19 recipes" in page
    assert re.findall(r"<p><b>(mine-\d+)</b>", page) == ["mine-18", "mine-9", "mine-0"]


def test_recipes_stand_beside_methods(tmp_path):
    few = recipes_of(3)
    rows = tuple(dataclasses.replace(row, budget=0.6) for row in few.rows if row.method == "mine-2")
    page = written(dataclasses.replace(few, rows=few.rows[:3] + rows), tmp_path)
    assert "<dd>dense and 1 method at 60% of FLOPs removed and 2 recipes</dd>" in page
    assert "solved to the same budget" in page


def test_small_charts_show_whole_intervals_and_the_budgets(tmp_path):
    said = {"dense": ["b"] * 24} | {
        (f"m{n}", at): ["z"] * (n + 1) + ["b"] * (23 - n) for n in range(8) for at in (0.4, 0.8)
    }
    results = answered([["b"]] * 24, said)
    rows = [row if row.budget is None else dataclasses.replace(row, flops_reduction=row.budget) for row in results.rows]
    page = written(dataclasses.replace(results, rows=tuple(rows[:-1])), tmp_path)  # m7 has one budget
    charts = re.findall(r"<svg [^>]*width='171'.*?</svg>", page)
    assert len(charts) == 8
    for chart in charts:
        bottom = re.search(r"<line x1='[\d.]+' y1='([\d.]+)' x2='[\d.]+' y2='\1' stroke='currentColor'/>", chart)[1]
        intervals = re.findall(r"d='M[\d.]+ ([\d.]+)V([\d.]+)", chart)
        assert intervals
        assert all(float(end) < float(bottom) - 1 for ends in intervals for end in ends)  # clamped, it lies on the axis
        assert re.findall(r"text-anchor='middle'[^>]*>([\d.]+)<", chart) == ["40", "80"]


def test_regions_of_several_tasks_have_names_of_their_own(small, tmp_path):
    rows = tuple(
        dataclasses.replace(row, task=name, accuracy_by_kind={"k": 0.5}) for name in "tu" for row in small.rows
    )
    tasks = tuple(dataclasses.replace(small.tasks[0], name=name) for name in "tu")
    page = written(dataclasses.replace(small, rows=rows, tasks=tasks), tmp_path)
    labels = re.findall(r'role=region aria-label="(.*?)"', page)
    assert len(labels) > 8
    assert len(set(labels)) == len(labels)


def test_text_of_strangers_is_escaped_everywhere(tmp_path):
    said = {"dense": [HOSTILE, "b"], (HOSTILE, 0.6): ["b", HOSTILE], (HOSTILE, 0.8): ["c", HOSTILE]}
    results = answered([[HOSTILE], [HOSTILE]], said, questions=[HOSTILE] * 2)
    example = {**results.examples[0], "kind": HOSTILE, "picture": HOSTILE}
    example["layers_entered"] = {f"{HOSTILE} 60%": [1] * 16}
    results = dataclasses.replace(
        results,
        examples=(example,),
        provenance={"model": HOSTILE, "dtype": HOSTILE, "attention": HOSTILE, HOSTILE: HOSTILE},
        recipes={f"{HOSTILE} 60%": json.loads(RECIPE.to_json())},
        skipped=({"method": HOSTILE, "budget": 0.5, "reason": HOSTILE},),
        tasks=(dataclasses.replace(results.tasks[0], always=HOSTILE, metric=HOSTILE),),
        answers=tuple({**record, "kind": HOSTILE, "id": HOSTILE} for record in results.answers),
    )
    page = written(results, tmp_path)
    body = page[page.index("<body>") :]
    assert "onerror" in body  # as text
    elements = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.feed(body)
    tags = [tag for tag, _ in elements]
    assert "img" not in tags
    assert tags.count("script") == 2  # those that sort and filter
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]


def test_tokens_of_which_no_place_is_known_are_not_drawn(small, tmp_path):
    example = {**small.examples[0], "layers_entered": {"fitprune 60%": [2] * 15}}
    for more in ({}, {"views": []}):
        page = written(dataclasses.replace(small, examples=({**example, **more},)), tmp_path)
        assert "Where the 15 tokens lie in the picture is not known" in page


def test_tokens_are_drawn_where_they_lie(small, tmp_path):
    """Of 2 x 3 tokens over a picture of 200 x 100 the first is in all layers, the others leave after layer 0."""
    grid = {"box": [0.0, -0.5, 1.0, 1.5], "tokens": [[0, 1, 2], [3, 4, 5]]}
    view = {"name": "<b>", "extent": [0.0, -0.5, 1.0, 1.5], "grids": [grid]}
    example = {**small.examples[0], "layers_entered": {"fitprune 60%": [4, 1, 1, 1, 1, 1]}}
    results = dataclasses.replace(small, recipes={"fitprune 60%": {"keep": [0.2] * 4}})
    for views in ([view], [view, {**view, "name": "tile"}]):
        page = written(
            dataclasses.replace(results, examples=({**example, "size": [200, 100], "views": views},)), tmp_path
        )
        tiles = re.findall(r"class=tile viewBox='(.*?)'.*?<path d='(.*?)'.*?</svg>(.*?)</div>", page)
        names = ["layer 1: 1", "layer 2: 1", "layer 3: 1"]
        if len(views) > 1:
            names = [f"{view}, {name}" for view in ("&lt;b&gt;", "tile") for name in names]
        assert [text for *_, text in tiles] == names
        assert {box for box, *_ in tiles} == {"0 -50 200 200"}
        (edge,) = set(re.findall(r"<path class=edge d='(.*?)' stroke='rgb", page))
        assert set(edge.split("M")[1:]) == {"66.67 -50v100", "0 50h66.67"}
        cells = tiles[0][1].split("M")[1:]
        assert [cell.split("h")[0] for cell in cells] == ["66.67 -50", "133.33 -50", "0 50", "66.67 50", "133.33 50"]


def test_the_report_imports_no_matplotlib(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written(small, tmp_path)


def test_a_change_is_judged_by_the_tasks_metric(small):
    kinds = [[change.kind(answer) for answer in change.answers] for change in changed(small, small.answers)]
    assert kinds == [["lost"], ["lost"], ["won"], ["other"]]
    unjudged = dataclasses.replace(small, tasks=())
    assert {c.kind(a) for c in changed(unjudged, small.answers) for a in c.answers} == {"other"}
