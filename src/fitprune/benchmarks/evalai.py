"""Answers as the VQA server normalises them: case, punctuation, number words, articles, contractions. Pure Python."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence


@functools.lru_cache(2**16)
def evalai(text: str) -> str:
    """Normalise an answer as the EvalAI server does: `vqa_eval`, with commas and question marks cut first.

    Quirks, kept: commas go even between digits ("3,5" is "35"), "let's" is two words, and those of `vqa_eval`.

    Source: EvalAIAnswerProcessor of Pythia and MMF, as in LLaVA's m4c_evaluator.py.
    """
    return vqa_eval(opened(text))


@functools.lru_cache(2**16)
def vqa_eval(text: str) -> str:
    """Normalise an answer as VQA's own evaluation does.

    Quirks, kept: "none" is 0, a hyphen is a space ("-3" is "3"), a mark that touches a space anywhere is cut everywhere
    instead, and so is every mark where a comma is between digits; "%", "$", ":" and "'" stay.

    Source: processPunctuation and processDigitArticle of the VQA authors' vqaEval.py.
    """
    return joined([word for word in words(text) if word not in _ARTICLES])


def vizwiz_eval(text: str) -> str:
    """Normalise an answer as VizWiz's own evaluation does: `vqa_eval`, with typographic apostrophes in contractions.

    Quirk, kept: "dont" becomes "don\N{RIGHT SINGLE QUOTATION MARK}t", but "cant" and seven others get a plain one.

    Source: vqaEval.py of VizWiz's API.
    """
    return joined([word for word in words(one_line(text)) if word not in _ARTICLES], _TYPOGRAPHIC)


def one_line(text: str) -> str:
    """Make line ends and tabs spaces, and cut spaces around."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def opened(text: str) -> str:
    """Cut commas and question marks, and part "'s" from its word; in lower case."""
    return one_line(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def words(text: str) -> list[str]:
    """Cut punctuation and split into words in lower case, numbers as digits."""
    cut, every = text, re.search(r"\d,\d", text)
    for mark in _MARKS:
        cut = cut.replace(mark, "" if every or f"{mark} " in text or f" {mark}" in text else " ")
    cut = re.sub(r"\.(?!\d)", "", cut, count=32)  # 32 and no more: theirs passes a flag as the count
    return [_NUMBERS.get(word, word) for word in cut.lower().split()]


def joined(parts: Sequence[str], contracted: Mapping[str, str] | None = None) -> str:
    """Join words, apostrophes put back into contractions.

    Args:
        parts: the words.
        contracted: from what is written to the contraction; by default that of VQA's evaluation.
    """
    table = _CONTRACTED if contracted is None else contracted
    return " ".join(table.get(word, word) for word in parts)


_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
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
_PLAIN = ["aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove", "couldn'tve", "hadn'tve"]
_TYPOGRAPHIC = {
    key if key in _PLAIN else key.replace("'", "\u2019"): value if key in _PLAIN[:8] else value.replace("'", "\u2019")
    for key, value in _CONTRACTED.items()
}
