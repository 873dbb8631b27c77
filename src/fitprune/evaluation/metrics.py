"""Metrics: each scores an answer from 0 to 1 by the accepted ones. Pure Python.

A metric's name is its function's; `METRICS` has them all. A blank accepted answer counts as none, unless a metric says
otherwise.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

from fitprune.benchmarks.evalai import evalai, joined, opened, words
from fitprune.benchmarks.soft_accuracy import soft_accuracy

Metric = Callable[[str, Sequence[str]], float]

ANNOTATORS = 10
FEWEST_ANNOTATORS = 4  # of fewer, each is left out once, and three others cannot agree: no answer could score 1


def exact(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the answer, stripped and in lower case, is one of the accepted ones."""
    return float(answer.strip().lower() in {text.strip().lower() for text in accepted if text.strip()})


def normalized(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the answer is one of the accepted ones, both normalised as for VQA (`evalai`), and more carefully.

    Typographic and full-width characters count as plain ones, quotes and asterisks around words go, as a colon after
    one does; "-3" keeps its sign, "3,5" is two numbers, and articles stay where nothing else is left ("A", "the").
    """
    return float(_plain(answer) in {_plain(text) for text in accepted if text.strip()})


def vqa(answer: str, accepted: Sequence[str]) -> float:
    """Score VQA's soft accuracy: min(1, matches / 3), mean over the annotators left out one at a time.

    Of fewer than four accepted answers any one is right, as for `normalized`: there are too few annotators to count.

    Quirks: one annotator of ten gives 0.3, two 0.6, three 0.9, four and more 1; a blank annotator counts, and an answer
    of which nothing is left ("", "the") agrees with those of which nothing is left ("", "a").

    Source: VQA's evaluation, answers normalised as EvalAI does it for TextVQA, VQAv2 and VizWiz (`evalai`).
    """
    if len(accepted) < FEWEST_ANNOTATORS:
        return normalized(answer, accepted)
    return soft_accuracy(evalai(answer), [evalai(text) for text in accepted])


METRICS: dict[str, Metric] = {metric.__name__: metric for metric in (exact, normalized, vqa)}


def choose(metric: str | None, accepted: Sequence[Sequence[str]]) -> str:
    """Name the metric: the one passed, or by the data: "vqa" for ten annotators' answers, else "normalized".

    Most questions decide: more than half have ten answers, some (not blank) the same, as alternatives never are.

    Args:
        metric: a name of `METRICS`, or None.
        accepted: each question's accepted answers; none are blank alone.

    Raises:
        ValueError: there is no such metric, or it cannot be made of these answers.
    """
    if metric is None:
        annotated = [[text for text in texts if text.strip()] for texts in accepted if len(texts) == ANNOTATORS]
        return "vqa" if 2 * sum(len(set(texts)) < len(texts) for texts in annotated) > len(accepted) else "normalized"
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(METRICS)}")
    if metric == "vqa" and accepted and (most := max(map(len, accepted))) < FEWEST_ANNOTATORS:
        raise ValueError(
            f"metric='vqa': no question has more accepted answers than {most}, where VQA's soft accuracy is of ten "
            f"annotators, at least {FEWEST_ANNOTATORS}: pass normalized or exact"
        )
    return metric


def is_near(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer holds an accepted one among other words, or lies in one: "A. cat" and "A"."""
    texts = [joined(words(opened(_folded(text)))) for text in (answer, *accepted)]
    ours, *theirs = [f" {text} " if text else "" for text in texts]
    return any(bool(ours and text) and (text in ours or ours in text) for text in theirs)


@functools.lru_cache(2**16)
def _plain(text: str) -> str:
    folded = _folded(text)
    return evalai(folded) or joined(words(opened(folded))) or text.strip().lower()


def _folded(text: str) -> str:
    """Make typographic and full-width characters plain, cut quotes around words, and keep numbers apart."""
    text = _EDGES.sub("", unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY))
    return _SIGN.sub("\N{MINUS SIGN}", _LIST.sub(" ", text))


_FULL_WIDTH = {0xFF01 + place: 0x21 + place for place in range(94)}
_TYPOGRAPHY = _FULL_WIDTH | str.maketrans("\u2018\u2019\u201c\u201d\u3002\u2026", "''\"\"..")
_EDGES = re.compile(r"(?<!\w)['*]+|['*:]+(?!\w)")
_LIST = re.compile(r"(?<=\d),(?=\d{1,2}(?!\d))")  # not the comma of 1,000
_SIGN = re.compile(r"(?<!\w)-(?=\.?\d)")
