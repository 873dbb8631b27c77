"""The design: colours that can be told apart and read, pages that load nothing, tables that hold any text."""

import base64
import hashlib
import re

import pytest

from fitprune._support import page
from fitprune._support.page import Html, escape, facts, table


def colours(mode):
    """The variables of one mode."""
    return dict(re.findall(r"--(\w+):(#[0-9a-f]+)", {"light": page.LIGHT, "dark": page.DARK}[mode]))


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(mode):
    known = colours(mode)
    for name in ("fg", "muted", "accent", "good", "bad"):
        for ground in ("bg", "panel"):
            assert contrast(known[name], known[ground]) >= 4.5, (name, ground)
    assert contrast(known["fg"], known["warn"]) >= 4.5
    for number in range(8):
        assert contrast(known[f"c{number}"], known["bg"]) >= 3, number


def test_both_modes_have_the_same_colours():
    assert colours("light").keys() == colours("dark").keys()


def test_a_page_runs_its_makers_scripts_alone_and_loads_nothing():
    whole = page.page("a <b> & 'c'", "<p>text</p>", style=".x{}", script="let a = 1")
    assert "<title>a &lt;b&gt; &amp; &#x27;c&#x27;</title>" in whole
    policy = re.search(r'Content-Security-Policy content="(.*?)"', whole)[1]
    digest = base64.b64encode(hashlib.sha256(b"let a = 1").digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline'; script-src" in policy  # for styles alone
    assert whole.count("<script>") == 1
    assert "script-src 'none'" in page.page("t", "")
    assert b"fitprune" in whole.encode()[:4096]


def test_a_page_is_known_as_a_report(tmp_path):
    from fitprune._support import files

    (tmp_path / "a.html").write_text(page.page("t", ""))
    assert files.kind_of(tmp_path / "a.html") == files.REPORT


def test_cells_are_escaped_but_for_those_that_are_html():
    text = table(["<i>", "b"], [["<script>", Html("<b>x</b>")], ["y", Html("<td class=best>1</td>")]], ours="y")
    assert "<th scope=col>&lt;i&gt;</th>" in text
    assert "<th scope=row>&lt;script&gt;</th><td><b>x</b></td>" in text
    assert "<tr class=ours><th scope=row>y</th><td class=best>1</td></tr>" in text
    assert facts([("<a>", "<b>")]).startswith("<dl class=facts><dt>&lt;a&gt;</dt><dd>&lt;b&gt;</dd>")
    assert escape(escape("<")) == "&lt;"


def test_a_table_sorts_where_it_says_so():
    rows = [["a", 1], ["b", 2]]
    assert "class=sortable" in table(["", "n"], rows, sortable=True)
    assert "class=sortable" not in table(["", "n"], rows[:1], sortable=True)
    assert "aria-sort" in page.page("t", table(["", "n"], rows, sortable=True))
    assert "<script>" not in page.page("t", table(["", "n"], rows))
