"""Files are written whole or not at all, the same data as the same bytes."""

import json

import pytest

from fitprune._support import files


def test_json_is_written_with_one_space_and_a_last_newline(tmp_path):
    files.write_json(tmp_path / "new" / "a.json", {"b": [1, 0.1], "a": "é"})
    text = (tmp_path / "new" / "a.json").read_text()
    assert text == '{\n "b": [\n  1,\n  0.1\n ],\n "a": "\\u00e9"\n}\n'
    assert json.loads(text) == {"b": [1, 0.1], "a": "é"}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, wrong):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises((ValueError, TypeError)):
        files.write_json(tmp_path / "a.json", [wrong])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_text_that_is_no_utf8_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a", "\ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_line_end_stays_as_it_is(tmp_path):
    files.write_text(tmp_path / "a", "a\nb\r\n")
    assert (tmp_path / "a").read_bytes() == b"a\nb\r\n"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!doctype html><html><title>Notes</title><p>my own notes on fitprune", None),
        (b"<!doctype html><title>How I use fitprune show</title>", None),
        (b"<!doctype html><meta name=generator content='my blog'><p>fitprune", None),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><text>fitprune show</text></svg>", None),
        (b"\x89PNG\r\n\x1a\n tEXtComment\0a screenshot of fitprune show", files.IMAGE),
        (b"GIF89a!\xfe\x1amade after fitprune show\0", files.IMAGE),
        (b"\0\0\0\x20ftypisom my talk on fitprune show", files.IMAGE),
        (b'{"results": [1], "rows": 3}', None),
        (b'{"benchmark": "mine", "scores": [1]}', None),
        (b'{"model": "mine", "device": "gpu", "timings": [1]}', None),
        (b'{"schema": 1, "rows": [], "best": 2}', None),
    ],
)
def test_what_only_speaks_of_fitprune_is_not_its_own(tmp_path, content, kind):
    (tmp_path / "mine").write_bytes(content)
    assert files.kind_of(tmp_path / "mine") == kind
    with pytest.raises(ValueError, match="choose another output for a report, or pass --overwrite"):
        files.claim(tmp_path / "mine", files.REPORT)


def test_finding_out_that_a_file_can_be_written_makes_no_folder(tmp_path):
    files.claim(tmp_path / "new" / "deep" / "a.json", files.RECIPE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*; choose another output path"):
        files.claim(tmp_path / "file" / "a.json", files.RECIPE)
