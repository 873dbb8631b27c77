"""The app's look: the one design of all pages, put into Gradio's theme and page."""

from __future__ import annotations

import gradio as gr

from fitprune._support import page
from fitprune.pictures import player

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")

# What is the app's own has the class "fp"; the rest is Gradio's, by the theme.
HEAD = f"""<style>
:root{{{page.LIGHT};--small:.8125rem;--large:1.25rem;--larger:1.5625rem;--largest:1.953rem;--gap:1rem}}
.dark{{{page.DARK}}}
.fp{{{page.ELEMENTS}{player.STYLE}
color:var(--fg);font-size:1rem;line-height:1.5;
h1{{font-size:var(--large);margin:0}}
h2{{margin:0;padding:0;border:0;font-size:var(--small);color:var(--muted);font-weight:600}}
.answer{{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;
min-height:5rem;height:100%}}
.answer p{{margin:.3rem 0 0;font-size:var(--large);line-height:1.6;max-width:none}}
.answer p.small{{font-size:var(--small)}}
.answer button{{border:1px dotted var(--muted);background:none;min-height:0;padding:0 .3rem;margin:.1rem;
cursor:pointer}}
.answer button[aria-pressed=true]{{border:2px solid var(--accent);background:var(--bg)}}
mark{{background:none;color:var(--bad);text-decoration:underline wavy 2px;text-underline-offset:.2em;font-weight:700}}
[data-example]{{padding:0;overflow:hidden;width:4.5rem;height:4.5rem;margin-right:.5rem;cursor:pointer}}
[data-example] img{{width:100%;height:100%;object-fit:cover}}
td.text{{text-align:left;white-space:normal;min-width:8rem}}
table{{width:100%}}td{{white-space:nowrap}}
input[type=checkbox]{{appearance:auto;accent-color:var(--accent);min-height:0;width:1rem;height:1rem}}
}}
:is(#budgets,#methods) thead th:nth-child(2){{text-align:left}}
footer .divider{{display:none}}.html-container{{padding:0!important}}
#picture img{{width:100%;height:100%;object-fit:contain}}
#python textarea{{font-family:ui-monospace,monospace;font-size:.8125rem}}
@media (max-width:799px){{.fp td,.fp th{{padding:.35em .3em}}footer{{display:none!important}}
#tabs .tab-container button{{padding:0 .6rem}}
/* A comparison: figures in one line, and the answer below them. */
:is(#budgets,#methods){{table,thead,tbody{{display:block}}thead th:nth-child(2){{display:none}}
tr{{display:grid;grid-template-columns:2.1fr repeat(4,1fr);border-bottom:1px solid var(--line)}}
th,td{{border:0!important;min-width:0!important}}td.text{{grid-column:1/-1;order:1;padding-top:0}}}}
}}
.gradio-container{{max-width:80rem!important}}
</style>"""


def theme() -> gr.themes.Base:
    """Make Gradio's theme of the page's colours."""
    colours = {
        "body_background_fill": "var(--bg)",
        "body_text_color": "var(--fg)",
        "body_text_color_subdued": "var(--muted)",
        "background_fill_primary": "var(--bg)",
        "background_fill_secondary": "var(--panel)",
        "block_background_fill": "var(--bg)",
        "block_label_background_fill": "var(--bg)",
        "block_label_text_color": "var(--fg)",
        "block_title_text_color": "var(--fg)",
        "block_info_text_color": "var(--muted)",
        "block_border_color": "var(--line)",
        "border_color_primary": "var(--line)",
        "border_color_accent": "var(--accent)",
        "color_accent": "var(--accent)",
        "input_background_fill": "var(--panel)",
        "input_border_color": "var(--muted)",
        "input_placeholder_color": "var(--muted)",
        "slider_color": "var(--accent)",
        "link_text_color": "var(--accent)",
        "button_primary_background_fill": "var(--accent)",
        "button_primary_background_fill_hover": "var(--fg)",
        "button_primary_text_color": "var(--bg)",
        "button_secondary_background_fill": "var(--panel)",
        "button_secondary_background_fill_hover": "var(--line)",
        "button_secondary_text_color": "var(--fg)",
        "table_border_color": "var(--line)",
        "table_even_background_fill": "var(--bg)",
        "table_odd_background_fill": "var(--panel)",
    }
    base = gr.themes.Base(font=_FONTS, font_mono=("ui-monospace", "monospace"))
    dark = {f"{name}_dark": value for name, value in colours.items() if hasattr(base, f"{name}_dark")}
    return base.set(**colours, **dark)
