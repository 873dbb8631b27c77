"""The journal of a run: whole lines, several processes, and damage."""

import pytest

from fitprune._support.journal import Journal


def test_a_journal_counts_whole_lines_only(tmp_path, caplog):
    book = Journal(tmp_path / "j", {"a": 1})
    assert book.done() == {}
    book.open()
    book.append([{"place": 0, "x": "ä"}, {"place": 1, "x": 2}])
    other = Journal(tmp_path / "j", {"a": 1}, rank=1)
    other.open()
    other.append([{"place": 2, "x": 3}])
    with (tmp_path / "j").open("a") as file:
        file.write('{"place": 3')
    assert sorted(Journal(tmp_path / "j", {"a": 1}).done()) == [0, 1, 2]
    book.open()
    book.append([{"place": 3, "x": 4}])
    found = book.done()
    book.finish([found[place] for place in range(4)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j"]
    assert [r["x"] for r in Journal(tmp_path / "j", {"a": 1}).done().values()] == ["ä", 2, 3, 4]
    lines = (tmp_path / "j").read_bytes().splitlines()
    damaged = [lines[0], b"{}", b"[1]", b"3", b"", b"\0\0", b'{"place": true}', lines[2], b'{"place": 9', lines[4]]
    (tmp_path / "j").write_bytes(b"\n".join(damaged) + b"\n")
    book = Journal(tmp_path / "j", {"a": 1}, lambda record: "x" in record)
    assert sorted(book.done()) == [1, 3]
    assert "j:2: damaged, left out" in caplog.text
    book.open()
    assert sorted(book.done()) == [1, 3]
    with pytest.raises(ValueError, match=r"another run \(other a\)"):
        Journal(tmp_path / "j", {"a": 2}).done()
