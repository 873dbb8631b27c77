"""One design for everything that opens in a browser: colours, type, tables, and a page that needs nothing else.

Colours are Okabe and Ito's, which colour-blind readers tell apart, darker or lighter where they would be faint on the
background. Pages are dark or light as the reader's system is, and are read from a width of 390 px on.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

# --c0 is the strongest line; --c1 to --c7 are the others. --good and --bad never stand without a sign or a word.
_LIGHT = """color-scheme:light;--bg:#fff;--fg:#1a1d21;--muted:#565d66;--line:#d3d8de;--panel:#f3f5f7;--accent:#0068a3;
--good:#00694b;--bad:#a84300;--warn:#fff4d6;--c0:#1a1d21;--c1:#0072b2;--c2:#d55e00;--c3:#008f68;--c4:#b8578f;
--c5:#a97200;--c6:#2a8fca;--c7:#6b737d"""
_DARK = """color-scheme:dark;--bg:#14171a;--fg:#e8eaec;--muted:#a7b0ba;--line:#3a424b;--panel:#1e2328;--accent:#6dbdf2;
--good:#54d1a6;--bad:#ff9d5c;--warn:#3a3115;--c0:#fff;--c1:#4aa8e8;--c2:#ff8a3d;--c3:#2ec79b;--c4:#e39ac6;
--c5:#f0b429;--c6:#a5d8f7;--c7:#a7b0ba"""

CSS = f"""
:root{{{_LIGHT};--small:.8125rem;--large:1.25rem;--larger:1.5625rem;--largest:1.953rem;--gap:1rem}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:0;color:var(--fg);background:var(--bg);
overflow-wrap:anywhere}}
main{{max-width:72rem;margin:0 auto;padding:var(--gap)}}
h1{{font-size:var(--larger);line-height:1.2;margin:.5em 0}}
h2{{font-size:var(--large);line-height:1.3;margin:2em 0 .5em;padding-top:.6em;border-top:1px solid var(--line)}}
h3{{font-size:1rem;margin:1.5em 0 .4em}}p{{margin:.6em 0;max-width:70ch}}
@media (min-width:700px){{h1{{font-size:var(--largest)}}h2{{font-size:var(--larger)}}}}
a,summary{{color:var(--accent)}}summary{{cursor:pointer;padding:.4em 0}}code,pre{{font-family:ui-monospace,monospace}}
.small,caption,figcaption{{font-size:var(--small);color:var(--muted)}}
.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.note{{background:var(--warn);border-left:4px solid var(--c5);padding:.5em .8em;max-width:70ch}}
pre{{background:var(--panel);padding:.8em;overflow:auto;font-size:var(--small);white-space:pre-wrap}}
dl.facts{{display:grid;grid-template-columns:max-content 1fr;gap:.2em var(--gap);margin:var(--gap) 0}}
dl.facts dt{{color:var(--muted)}}dl.facts dd{{margin:0}}
.scroll{{overflow-x:auto;margin:.8em 0}}:focus-visible{{outline:2px solid var(--accent);outline-offset:2px}}
table{{border-collapse:collapse;font-size:var(--small);font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding-bottom:.4em}}
th,td{{padding:.35em .6em;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:normal}}
thead th{{border-bottom:2px solid var(--muted);vertical-align:bottom}}tbody th{{font-weight:400}}
th:first-child,td:first-child{{text-align:left;position:sticky;left:0;background:var(--bg);min-width:5.5rem;
max-width:11rem;overflow-wrap:break-word}}
@media (max-width:799px){{th,td{{padding:.35em .3em}}}}
tr.ours th,.best{{font-weight:700}}.best{{background:var(--panel)}}
button,select,input{{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--muted);
border-radius:4px;padding:.3em .6em;max-width:100%;min-height:2.2rem}}
thead button{{border:0;background:none;padding:0;min-height:24px;font-weight:700;text-align:inherit;cursor:pointer}}
thead button::after{{content:" \\2195";color:var(--muted)}}
[aria-sort=ascending] button::after{{content:" \\2191"}}[aria-sort=descending] button::after{{content:" \\2193"}}
.row{{display:flex;flex-wrap:wrap;gap:var(--gap);align-items:flex-start}}
figure{{margin:var(--gap) 0}}img,svg{{max-width:100%;height:auto;display:block}}
.chart svg{{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--fg)}}
.chart .narrow{{display:none}}
@media (max-width:799px){{.chart .wide{{display:none}}.chart .narrow{{display:block}}}}
"""

_SORT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const value = row => {
        const text = row.cells[column].textContent.trim(), number = parseFloat(text.replace(/,/g, ''));
        return text === '-' ? null : Number.isFinite(number) ? number : text;
      };
      const first = typeof value(body.rows[0]) === 'number' ? 'descending' : 'ascending';
      const other = first === 'ascending' ? 'descending' : 'ascending';
      const order = head.getAttribute('aria-sort') === first ? other : first;
      const sign = order === 'ascending' ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y)));
      });
      heads.forEach(each => each.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', order);
      body.append(...rows);
    };
  });
}
"""


class Html(str):
    """Text that is HTML already; all other text is escaped where it is put into a page."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Make HTML of any text, by escaping it; HTML stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def page(title: str, body: str, *, style: str = "", script: str = "", maker: str = "fitprune") -> str:
    """Make a page that loads nothing, and runs no script but the ones of its maker.

    Args:
        title: of the page, as plain text; it is its heading too.
        body: HTML, without a main element and without `h1`.
        style: CSS of this page, after the design's.
        script: JavaScript of this page, run when all of it is there.
        maker: what made it, by which `files.kind_of` knows the page again.
    """
    scripts = [text for text in (_SORT if "class=sortable" in body else "", script) if text]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    policy = (
        f"default-src 'none'; img-src data: blob:; media-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {' '.join(hashes) or repr('none')}; base-uri 'none'; form-action 'none'"
    )
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=generator content='{maker}'>\n"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">\n'
        f"<meta name=viewport content='width=device-width,initial-scale=1'>\n<title>{escape(title)}</title>\n"
        f"<style>{CSS}{style}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{body}\n</main>"
        + "".join(f"<script>{text}</script>" for text in scripts)
        + "</body></html>\n"
    )


def table(
    head: Sequence[object],
    body: Iterable[Sequence[object]],
    *,
    sortable: bool = False,
    label: str = "table",
    ours: str | None = None,
) -> Html:
    """Make a table that scrolls by itself where it is too wide; its first column stays.

    Args:
        head: the names of the columns.
        body: the rows, each with as many cells as `head`; a cell that is no `Html` is escaped.
        sortable: whether a click on a column's name sorts by it, where the browser runs scripts.
        label: what the table is, for screen readers.
        ours: the first cell of rows to stress.
    """
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    lines = []
    for name, *cells in body:
        mark = " class=ours" if ours is not None and name == ours else ""
        rest = "".join(
            cell if isinstance(cell, Html) and cell.startswith("<td") else f"<td>{escape(cell)}</td>" for cell in cells
        )
        lines.append(f"<tr{mark}><th scope=row>{escape(name)}</th>{rest}</tr>")
    kind = " class=sortable" if sortable and len(lines) > 1 else ""
    return Html(
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(label)}"><table{kind}>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """List what a page is about, a name and its value a line; both are escaped unless they are `Html`."""
    return Html(f"<dl class=facts>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in pairs)}</dl>")
