"""The HTML that the app shows: answers with their words, costs beside dense, comparisons. All text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fitprune._support.page import Html, escape, table
from fitprune._support.text_tables import scaled
from fitprune.app.screen import Screen
from fitprune.app.turns import Answer
from fitprune.app.words import Word

NONE = "-"  # where there is no figure


def answer(name: str, text: str, words: Sequence[Word] = (), *, done: bool = False, pressed: bool = False) -> Html:
    """Show an answer.

    Args:
        name: whose it is.
        text: the answer so far; while it grows it is one text.
        words: the answer's words once it has ended.
        done: whether it has ended.
        pressed: whether a word can be pressed, to see what the model looked at.
    """
    if words:
        body = " ".join(_word(number, word, pressed) for number, word in enumerate(words))
    elif done:
        body = "<span class=muted>(an empty answer)</span>"
    else:
        body = escape(text)
    growing = "" if done else " aria-busy=true"
    return Html(f"<section class=answer{growing} aria-live=polite><h3>{escape(name)}</h3><p>{body}</p></section>")


def _word(number: int, word: Word, pressed: bool) -> str:
    text, title = escape(word.text), " title='differs from the other answer'" if word.differs else ""
    body = f"<mark{title}>{text}</mark>" if word.differs else text
    return f"<button type=button data-word={number}>{body}</button>" if pressed else f"<span>{body}</span>"


def costs(screen: Screen | None) -> Html:
    """Show time, memory and work of both answers."""
    if screen is None:
        return Html("")
    cost, pruned, dense = screen.cost, screen.pruned or Answer(), screen.dense or Answer()
    rows = [
        _row("time to first token", dense.first_seconds, pruned.first_seconds, lambda s: f"{1000 * s:,.0f} ms"),
        _row("tokens per second", dense.tokens_per_second, pruned.tokens_per_second, lambda n: f"{n:,.1f}"),
        _row("KV cache of the prompt", cost.dense_kv_bytes, cost.kv_bytes, lambda n: scaled(n, "B")),
        _row("prefill", cost.dense_prefill_flops, cost.prefill_flops, lambda n: scaled(n, "FLOPs")),
        _row("visual tokens a layer", cost.visual_tokens, cost.mean_visual_tokens, lambda n: f"{n:,.0f}"),
    ]
    return table(["", "dense", "pruned", "pruned / dense"], rows, label="what both cost")


def _row(name: str, dense: float | None, pruned: float | None, write: Callable[[float], str]) -> list[str]:
    ratio = f"{pruned / dense:.2f}x" if pruned is not None and dense else NONE
    return [name, *(NONE if value is None else write(value) for value in (dense, pruned)), ratio]


def comparison(first: str, rows: Iterable[tuple[str, Screen | ValueError]], decode: Callable[[Sequence[int]], str]) -> Html:
    """Show answers and costs of several choices, one a line.

    Args:
        first: name of the first column.
        rows: name of each choice, and its screen or why there is none.
        decode: gives the text of tokens.
    """
    head = [first, "answer", "first token", "tokens left", "KV cache", "prefill"]
    lines, dense = [], None
    for name, screen in rows:
        if isinstance(screen, ValueError):
            lines.append([name, Html(f"<td class=answer colspan=5>{escape(screen)}</td>")])
            continue
        cost, pruned = screen.cost, screen.pruned or Answer()
        text = decode(pruned.ids).strip()
        dense = text if dense is None else dense
        body = f"<mark>{escape(text)}</mark>" if text != dense else escape(text)
        lines.append(
            [
                name,
                Html(f"<td class=answer>{body}</td>"),
                NONE if pruned.first_seconds is None else f"{1000 * pruned.first_seconds:,.0f} ms",
                f"{cost.kept[-1]:,} of {cost.visual_tokens:,}",
                f"{cost.kv_bytes / cost.dense_kv_bytes:.0%}",
                f"{cost.prefill_flops / cost.dense_prefill_flops:.0%}",
            ]
        )
    return table(head, lines, label=f"answers by {first}")
