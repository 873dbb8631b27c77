"""The HTML that the app shows: answers with their words, costs beside dense, comparisons. All text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from fitprune._support.page import Html, escape, table
from fitprune._support.text_tables import plural, scaled
from fitprune.app.recipes import Choice
from fitprune.app.screen import Request, Screen
from fitprune.app.served import ServedModel
from fitprune.app.turns import Answer
from fitprune.app.words import Word
from fitprune.calibration.pictures import load_picture
from fitprune.pictures.example import Example
from fitprune.pictures.player import Heat, data_url, player

NONE = "-"  # where there is no figure
LITTLE_WORK = 50e9  # FLOPs of a dense prefill whose passes take milliseconds on any device


def examples(pictures: Sequence[tuple[Path, str]]) -> Html:
    """Show pictures that can be chosen, each with its question."""

    def button(number: int, path: Path, question: str) -> str:
        picture = load_picture(path)
        picture.thumbnail((192, 192))
        return (
            f"<button type=button data-example={number} title='{escape(question)}' aria-label='{escape(question)}'>"
            f"<img src={data_url(picture)} alt=''></button>"
        )

    return Html("".join(button(number, *each) for number, each in enumerate(pictures)))


def answers(
    screen: Screen | None, decode: Callable[[Sequence[int]], str], *, running: bool = False
) -> tuple[Html, Html]:
    """Show the pruned answer, whose words can be pressed, and the dense one.

    Args:
        screen: with the answers so far; None before anything was asked.
        decode: gives the text of tokens.
        running: whether more is to come.
    """
    if screen is None or screen.answered is None:
        return _answer("Pruned", "<p class=small>Press Run.</p>"), _answer("Dense", "<p class=small>Press Run.</p>")
    bodies = []
    for number, (answer, words) in enumerate(zip((screen.pruned, screen.dense), screen.words, strict=True)):
        pressed = screen.word if number == 0 and screen.current else -1
        if words:
            text = " ".join(_word(place, word, pressed) for place, word in enumerate(words))
        else:
            text = escape(decode(answer.ids if answer else [])) or ("" if running else "(an empty answer)")
        bodies.append(f"<p>{text}</p>")
    old = other = ""
    if not screen.fresh:
        old = other = " before question or picture changed: press Run for a new one"
    elif not screen.current and not running:
        old = f" at {_name(screen.answered)}: press Run for a new one"
    return _answer(f"Pruned{old}", bodies[0], running), _answer(f"Dense{other}", bodies[1], running)


def _answer(name: str, body: str, running: bool = False) -> Html:
    busy = " aria-busy=true" if running else ""
    return Html(f"<section class=answer{busy} aria-live=polite><h2>{escape(name)}</h2>{body}</section>")


def _word(number: int, word: Word, pressed: int | None) -> str:
    """Show a word; `pressed` is the number of the one that is looked at, None for none, -1 where none can be."""
    text = escape(word.text)
    body = f"<mark title='differs from the other answer'>{text}</mark>" if word.differs else text
    if pressed == -1:
        return f"<span>{body}</span>"
    return f"<button type=button data-word={number} aria-pressed={str(number == pressed).lower()}>{body}</button>"


def _name(choice: Choice) -> str:
    """Name a choice in a few words."""
    return choice.recipe or f"{choice.percent:g}%, {choice.method}"


def costs(screen: Screen | None) -> Html:
    """Show time, memory and work of both answers."""
    if screen is None:
        return Html("")
    cost = screen.cost
    current = screen.answered == screen.request.choice
    pruned, dense = (answer if answer and current else Answer() for answer in (screen.pruned, screen.dense))
    rows = [
        _row("time to first token", dense.first_seconds, pruned.first_seconds, lambda s: f"{1000 * s:,.0f} ms"),
        _row("tokens per second", dense.tokens_per_second, pruned.tokens_per_second, lambda n: f"{n:,.1f}"),
        _row("KV cache of the prompt", cost.dense_kv_bytes, cost.kv_bytes, lambda n: scaled(n, "B")),
        _row("prefill", cost.dense_prefill_flops, cost.prefill_flops, lambda n: scaled(n, "FLOPs")),
        _row("visual tokens a layer", cost.visual_tokens, cost.mean_visual_tokens, lambda n: f"{n:,.0f}"),
    ]
    hint = "<p class=small>Press a word of the pruned answer to see what the model looked at when it wrote it.</p>"
    small = (
        "<p class=small>Too small a prompt to save time: choosing tokens takes about as long as it saves. FLOPs and "
        "memory fall all the same.</p>" if cost.dense_prefill_flops < LITTLE_WORK else ""
    )  # fmt: skip
    return Html(hint + table(["this prompt", "dense", "pruned", "ratio"], rows, label="what both cost") + small)


def _row(name: str, dense: float | None, pruned: float | None, write: Callable[[float], str]) -> list[str]:
    ratio = f"{pruned / dense:.2f}x" if pruned is not None and dense else NONE
    return [name, *(NONE if value is None else write(value) for value in (dense, pruned)), ratio]


def comparison(
    first: str,
    request: Request,
    rows: Iterable[tuple[str, Screen | ValueError]],
    decode: Callable[[Sequence[int]], str],
) -> Html:
    """Show answers and costs of several choices, one a line.

    Args:
        first: name of the first column.
        request: what was asked.
        rows: name of each choice, and its screen or why there is none.
        decode: gives the text of tokens.
    """
    head = [first, "answer", "first token", "tokens a layer", "KV cache", "prefill FLOPs"]
    lines, dense = [], None
    for name, screen in rows:
        if isinstance(screen, ValueError):
            lines.append([name, Html(f"<td class=text colspan=5>{escape(screen)}</td>")])
            continue
        cost, pruned = screen.cost, screen.pruned or Answer()
        text = decode(pruned.ids).strip()
        dense = text if dense is None else dense
        body = f"<mark>{escape(text)}</mark>" if text != dense else escape(text)
        lines.append(
            [
                name,
                Html(f"<td class=text>{body}</td>"),
                NONE if pruned.first_seconds is None else f"{1000 * pruned.first_seconds:,.0f} ms",
                f"{cost.mean_visual_tokens:,.0f}",
                f"{cost.kv_bytes / cost.dense_kv_bytes:.0%}",
                f"{cost.prefill_flops / cost.dense_prefill_flops:.0%}",
            ]
        )
    at = request.choice.method if first == "budget" else f"{request.choice.percent:g}%"
    about = f"{request.question} ({request.picture.name}, {at})"
    return Html(f"<p class=small>{escape(about)}</p>{table(head, lines, label=f'answers by {first}')}")


def layers(now: Screen | None, attention: torch.Tensor | None = None) -> Html:
    """Make the player of what is left.

    Args:
        now: what is on the screen.
        attention: of the word that is looked at, [visual tokens], to colour them by; None for the scores.
    """
    if now is None or now.kept is None:
        return Html("<p class=small>Choose a picture, ask, and press Run: here is what is left of it.</p>")
    heat = None
    if attention is not None and now.word is not None:
        present = torch.stack([now.kept.present(layer) for layer in range(now.kept.layers)])
        values = torch.where(present, attention / attention.max().clamp(min=1e-9), torch.nan)
        word = now.words[0][now.word].text
        name = f"what the model looked at for the word {word}"
        heat = Heat(values, name, "attention, mean over heads and layers: none", "most", on=True)
    return player(Example(now.request.picture.small(), now.kept), heat=heat)


def about(served: ServedModel, title: str) -> Html:
    """Say what is served, and what its recipes are fitted from.

    Args:
        served: the model.
        title: its name.
    """
    fitter = served.recipes.fitter
    if fitter is not None:
        text = f"{title}, {served.layers} layers; recipes are fitted from {plural(len(fitter.stats), 'sample')}"
    else:
        text = (
            f"{title}, {served.layers} layers, without statistics: FitPrune's recipes need some. Measuring runs the "
            f"bundled calibration pictures; some like yours are better: fitprune app {title} --data ..."
        )
    return Html(f"<h1>fitprune: move the budget, see what leaves</h1><p class=small>{escape(text)}</p>")
