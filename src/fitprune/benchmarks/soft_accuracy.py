"""VQA's soft accuracy, of an answer by those of ten annotators. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from fitprune.benchmarks.evalai import one_line, vizwiz_eval, vqa_eval


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Compute min(1, matches / 3), mean over the annotators left out one at a time; all are normalised already.

    Quirk: one annotator of ten gives 0.3, two 0.6, three 0.9, four and more 1.
    """
    agree = people.count(answer)
    return sum(min(1.0, (agree - (person == answer)) / 3) for person in people) / len(people) if agree else 0.0


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Score an answer as VQA's own evaluation does.

    Quirk, kept: answers are normalised only if annotators differ. Where all say "none" only "none" is right, not "0",
    and "Yes" is wrong where all say "yes".

    Source: vqaEval.py of the VQA authors.
    """
    answer, people = one_line(answer), [one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, people = vqa_eval(answer), [vqa_eval(person) for person in people]
    return soft_accuracy(answer, people)


def vizwiz_accuracy(answer: str, people: Sequence[str]) -> float:
    """Score an answer as VizWiz's own evaluation does.

    Quirk, kept: the answer is normalised and the annotators' are not, so one with capitals, an article or "two" agrees
    with no answer.

    Source: vqaEval.py of VizWiz's API (Qing Li).
    """
    return soft_accuracy(vizwiz_eval(answer), people)
