"""The app's look: the one design of all pages, put into Gradio's theme and page."""

from __future__ import annotations

import gradio as gr

from fitprune._support import page
from fitprune.pictures import player

STYLE = f"""
.fp{{{page.LIGHT}}}.dark .fp{{{page.DARK}}}
.fp{{color:var(--fg);background:none}}
"""
