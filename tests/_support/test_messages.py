"""Values, text and errors in messages: one line, whatever they hold."""

import pytest

from fitprune._support.messages import line, short

LONG = "a" * 1000 + "z"


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), ("a b", "'a b'"), ("a\nb", "'a\\nb'"), ([1, 2], "[1, 2]"), ({"a": None}, "{'a': None}"), (None, "None")],
)
def test_a_small_value_is_shown_as_python_writes_it(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    "value", [LONG, list(range(10**6)), {str(n): LONG for n in range(100)}, 10**4000, b"\xff" * 1000, object]
)
@pytest.mark.parametrize("most", [20, 41, 60, 300])
def test_no_value_takes_more_room(value, most):
    assert len(short(value, most)) <= most


def test_a_deep_value_is_not_followed():
    value = []
    for _ in range(10**4):
        value = [value]
    assert len(short(value)) <= 60


def test_both_ends_of_a_long_text_are_shown():
    assert line(LONG, 20) == "a" * 10 + "..." + "aaaaaaz"
    assert short(LONG, 20) == "'" + "a" * 9 + "..." + "aaaaaz'"


@pytest.mark.parametrize("text", ["", "a", " a  b ", "é", "a" * 60])
def test_short_text_is_shown_as_it_is(text):
    assert line(text) == text


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\ud800", "\x00" * 1000, "\U000e0001" * 60])
def test_text_is_one_printable_line(text):
    assert line(text).isprintable()
    assert len(line(text)) <= 60


def test_an_errors_message_is_one_line():
    assert line(ValueError("a\n  b\tc")) == "a b c"
    assert line(KeyError()) == "KeyError"
    assert len(line(OSError(LONG), 300)) == 300
