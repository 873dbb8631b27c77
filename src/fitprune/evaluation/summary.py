"""The figures of an evaluation as plain data: a task, a row for each method and budget, the best of each budget."""

from __future__ import annotations

import dataclasses

from fitprune.evaluation.bootstrap import Interval, is_sure

DENSE = "dense"
UNNAMED = "questions"  # the task of samples that come without a name
ALMOST_NOTHING = 0.05  # if dense is right in fewer questions, accuracy compares nothing


def label(method: str, budget: float | None) -> str:
    """Name a method at a budget: "fastv 60%"."""
    return method if budget is None else f"{method} {100 * budget:g}%"


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions, and how their answers are judged.

    Attributes:
        name: the task's name.
        questions: how many.
        answerable: how many of them have accepted answers.
        metric: a name of `fitprune.evaluation.metrics.METRICS`, or what a benchmark's figure is; None where no question
            has accepted answers.
        guess: whether the data chose the metric.
        dense: the dense model's accuracy.
        near: questions in which the dense answer is wrong, but holds an accepted one among other words or lies in one.
        mismatch: an accepted answer and the dense model's, where accuracy may measure the wording.
        always: the dense model's answer to every question, if it has only one and not all of them accept it.
        benchmark: a benchmark's title; None for other data.
        figure: the name of the benchmark's figure.
        maximum: its highest value, which an accuracy of 1 stands for.
        text_alone: questions without an image, which run dense; costs and agreement are of the others.
    """

    name: str
    questions: int
    answerable: int
    metric: str | None
    guess: bool
    dense: float | None
    near: int = 0
    mismatch: tuple[str, str] | None = None
    always: str | None = None
    benchmark: str | None = None
    figure: str = "accuracy"
    maximum: float = 1
    text_alone: int = 0

    @property
    def comparable(self) -> bool:
        """Whether accuracies compare anything: there are accepted answers, and the dense model gives some of them."""
        return self.dense is not None and self.dense >= ALMOST_NOTHING

    @property
    def heading(self) -> str:
        """Name, size and metric in one line."""
        why = f" (guessed{': ten answers a question' if self.metric == 'vqa' else ''})" if self.guess else ""
        size = f"{self.questions} question{'s' if self.questions != 1 else ''}"
        size += f" ({self.text_alone} of text alone, dense)" if self.text_alone else ""
        name = "" if self.name == UNNAMED else f"{self.benchmark or self.name}, "
        return f"{name}{size}" + (f", metric {self.metric}{why}" if self.metric else "")

    def as_text(self, accuracy: float | None) -> str:
        """Write an accuracy as people know it: a benchmark's figure as published, others in percent."""
        if accuracy is None:
            return "-"
        return f"{self.maximum * accuracy:.2f}" if self.benchmark else f"{100 * accuracy:.1f}%"

    def interval_text(self, spread: Interval | None, dash: str = "..") -> str:
        """Write an interval in the same unit."""
        if spread is None:
            return "-"
        scale, digits = (self.maximum, 2) if self.benchmark else (100, 1)
        return dash.join(f"{scale * end:.{digits}f}" for end in spread)

    def warnings(self) -> list[str]:
        """Say what the figures do not show, a line each."""
        notes = []
        if self.always is not None:
            notes.append(f"the dense model answers {_quoted(self.always)} to every question: check the prompt")
        if self.dense is None:
            if self.benchmark:
                return [*notes, "no answers are published, so a server scores the upload file: agreement is shown"]
            return [*notes, "no accepted answers: accuracy unknown, agreement with dense is shown"]
        if missing := self.questions - self.answerable:
            notes.append(
                f"{missing} of {self.questions} questions have no accepted answer: accuracy is of the other "
                f"{self.answerable}"
            )
        if self.mismatch is not None:
            accepted, answer = map(_quoted, self.mismatch)
            if self.comparable:
                notes.append(
                    f"in {self.near} of {self.answerable} questions the dense model is wrong by words around alone: "
                    f"check the accepted answers: e.g. accepted {accepted}, answered {answer}"
                )
            else:
                near = f"; {self.near} answers are wrong by words around alone" if self.near else ""
                notes.append(
                    f"the dense model is right in {self.dense * self.answerable:.3g} of {self.answerable} questions: "
                    f"accuracy compares nothing; check --metric or the accepted answers: e.g. accepted {accepted}, "
                    f"answered {answer}{near}"
                )
        return notes


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one method at one budget on one task; over several seeds, their mean.

    Attributes:
        task: the task's name.
        method: the method's name; "dense" is the model without pruning.
        budget: the budget that the method was solved for; None for the dense model and for recipes of no stated budget.
        seeds: how many seeds the figures are the mean of.
        samples: how many samples.
        accuracy: mean score of the task's metric over the samples with accepted answers; None where there are none.
        accuracy_interval: its 95% bootstrap interval, over samples, and over seeds where there are several.
        relative_accuracy: accuracy as a fraction of the dense model's; None where that is almost nothing.
        relative_interval: its interval, dense and pruned resampled together.
        agreement: fraction of all samples answered as the dense model answers.
        divergence: mean KL divergence, in nats, of the first answer token's distribution from the dense model's.
        accuracy_by_kind: accuracy for each kind of question; empty for a benchmark.
        figures: of a benchmark, all its figures as published, the first of which `accuracy` is a fraction of.
        flops_reduction: fraction of visual-token FLOPs removed (the paper's accounting), mean over samples.
        prefill_flops_ratio: FLOPs of the whole prefill, with text, scoring, tower and head, as a ratio to dense.
        mean_visual_tokens: visual tokens that enter a layer, mean over layers and samples.
        visual_tokens_left: visual tokens after the last layer, mean over samples.
        kv_bytes: bytes of a sample's KV cache after prefill, mean over samples.
    """

    task: str
    method: str
    budget: float | None
    seeds: int
    samples: int
    accuracy: float | None
    accuracy_interval: Interval | None
    relative_accuracy: float | None
    relative_interval: Interval | None
    agreement: float
    divergence: float
    accuracy_by_kind: dict[str, float]
    figures: dict[str, float]
    flops_reduction: float
    prefill_flops_ratio: float
    mean_visual_tokens: float
    visual_tokens_left: float
    kv_bytes: float

    @property
    def label(self) -> str:
        """Name and budget in one."""
        return label(self.method, self.budget)

    @property
    def is_recipe(self) -> bool:
        """Whether it is of a recipe that was not solved for a budget: its place is the FLOPs that it removes."""
        return self.budget is None and self.method != DENSE


@dataclasses.dataclass(frozen=True)
class Best:
    """The best method at one budget on one task, compared with FitPrune.

    Attributes:
        task: the task's name.
        budget: the budget.
        method: the most accurate method.
        lead: by how much its accuracy is above FitPrune's; 0 if it is FitPrune.
        interval: 95% bootstrap interval of that difference; it contains 0 where the two do not differ surely.
        questions: number of questions with accepted answers.
        equals: other methods that are as accurate as the best.
        unsure: methods that may be ahead of FitPrune by more than `fitprune.evaluation.rows.ROOM`, as far as these
            questions tell.
    """

    task: str
    budget: float
    method: str
    lead: float
    interval: Interval
    questions: int
    equals: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    @property
    def sure(self) -> bool:
        """Whether the method is more accurate than FitPrune, beyond the luck of the draw."""
        return is_sure(self.lead, self.interval, self.questions)

    @property
    def cannot_tell(self) -> bool:
        """Whether the questions are too few to say which method is best."""
        return bool(self.unsure) and not self.sure


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
