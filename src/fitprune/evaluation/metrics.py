"""Metrics: each scores an answer from 0 to 1 by the accepted ones. Pure Python.

A metric's name is its function's; `METRICS` has them all. A blank accepted answer counts as none, unless a metric says
otherwise.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

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
    people = [evalai(text) for text in accepted]
    agree, count = people.count(evalai(answer)), len(people)
    return (agree * min(1, (agree - 1) / 3) + (count - agree) * min(1, agree / 3)) / count if agree else 0.0


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
    texts = [_joined(_words(_folded(text))) for text in (answer, *accepted)]
    ours, *theirs = [f" {text} " if text else "" for text in texts]
    return any(bool(ours and text) and (text in ours or ours in text) for text in theirs)


@functools.lru_cache(2**16)
def evalai(text: str) -> str:
    """Normalise an answer as the EvalAI server does: case, punctuation, number words, articles, contractions.

    Quirks, kept: commas go even between digits ("3,5" is "35"), "none" is 0, "let's" is two words, a hyphen is a space
    ("-3" is "3"), a mark that touches a space anywhere is cut everywhere instead; "%", "$", ":" and "'" stay.

    Source: EvalAIAnswerProcessor of Pythia and MMF, as in LLaVA's m4c_evaluator.py.
    """
    return _joined([word for word in _words(text) if word not in _ARTICLES])


@functools.lru_cache(2**16)
def _plain(text: str) -> str:
    folded = _folded(text)
    return evalai(folded) or _joined(_words(folded)) or text.strip().lower()


def _folded(text: str) -> str:
    """Make typographic and full-width characters plain, cut quotes around words, and keep numbers apart."""
    text = _EDGES.sub("", unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY))
    return _SIGN.sub("\N{MINUS SIGN}", _LIST.sub(" ", text))


def _joined(words: Sequence[str]) -> str:
    return " ".join(_CONTRACTED.get(word, word) for word in words)


def _words(text: str) -> list[str]:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cut = text
    for mark in _MARKS:
        cut = cut.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    cut = re.sub(r"\.(?!\d)", "", cut, count=32)  # 32 and no more: theirs passes a flag as the count
    return [_NUMBERS.get(word, word) for word in cut.split()]


_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`!'
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
# Written with any one apostrophe left out, each is read as if it were there.
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTED = (
    {"somebody'd": "somebodyd"}
    | {  # the first is theirs as it is
        whole[:at] + whole[at + 1 :]: whole for whole in _WHOLE.split() for at, sign in enumerate(whole) if sign == "'"
    }
)
_FULL_WIDTH = {0xFF01 + place: 0x21 + place for place in range(94)}
_TYPOGRAPHY = _FULL_WIDTH | str.maketrans("\u2018\u2019\u201c\u201d\u3002\u2026", "''\"\"..")
_EDGES = re.compile(r"(?<!\w)['*]+|['*:]+(?!\w)")
_LIST = re.compile(r"(?<=\d),(?=\d{1,2}(?!\d))")  # not the comma of 1,000
_SIGN = re.compile(r"(?<!\w)-(?=\.?\d)")
