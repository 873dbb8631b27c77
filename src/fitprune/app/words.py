"""An answer's words: which tokens they are made of, and which differ from another answer's. Knows no model."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of an answer.

    Attributes:
        text: the word, without the spaces around it.
        tokens: its tokens, counted from the answer's first.
        differs: whether the other answer has another word there, or none.
    """

    text: str
    tokens: tuple[int, ...]
    differs: bool = False


def words_of(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Word]:
    """Split an answer into words.

    Args:
        ids: its tokens.
        decode: gives the text of tokens.
    """
    texts = ["", *(decode(ids[: count + 1]) for count in range(len(ids)))]
    # Where each token changes the text: the second of a letter's two tokens changes what the first one left open.
    spans = [(_common(before, text), len(text)) for before, text in itertools.pairwise(texts)]
    return [
        Word(
            match[0],
            tuple(token for token, (begin, end) in enumerate(spans) if begin < match.end() and end > match.start()),
        )
        for match in re.finditer(r"\S+", texts[-1])
    ]


def _common(one: str, other: str) -> int:
    """Count the letters that two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def marked(answers: Sequence[Sequence[Word]]) -> list[list[Word]]:
    """Mark the words in which two answers differ."""
    first, second = ([word.text for word in words] for words in answers)
    same: list[set[int]] = [set(), set()]
    for block in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    return [
        [dataclasses.replace(word, differs=place not in alike) for place, word in enumerate(words)]
        for words, alike in zip(answers, same, strict=True)
    ]
