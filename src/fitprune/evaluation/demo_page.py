"""The page that a demo ends in: tokens that leave, figures, the answers that changed, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fitprune._support.files import PICTURE_MARK
from fitprune._support.page import Html, escape, page, table
from fitprune._support.text_tables import scaled
from fitprune.evaluation import report_answers
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import DENSE
from fitprune.evaluation.tables import TIMES, lines, percent
from fitprune.pictures import player
from fitprune.pictures.curve import curve
from fitprune.pictures.example import Example
from fitprune.recipes.recipe import PruningRecipe

_NEXT = """# 1. a recipe for your model (a folder or a hub name), from a few dozen of your images and questions
fitprune recipe MODEL --data questions.jsonl --image-folder images --samples 64 --flops-reduction 0.6 -o r.json
# 2. see what it does to one picture, and answer dense and pruned
fitprune generate MODEL --recipe r.json --image photo.jpg --question "What is this?" --dense --picture kept.html
# 3. how many answers stay the same, and how much time is saved
fitprune evaluate MODEL --data test.jsonl --image-folder images --recipe r.json -o results.json"""

# A phone shows five columns of figures.
_STYLE = "@media (max-width:799px){[aria-label=results] :is(td,th){padding-left:.15em;padding-right:.15em}}"


def demo_page(
    results: Results, recipes: Mapping[str, PruningRecipe], visual_tokens: int, examples: Sequence[Example]
) -> str:
    """Make the page.

    Args:
        results: of the demo's one task, with answers.
        recipes: name -> recipe.
        visual_tokens: of an image.
        examples: samples to watch, with what stays of them at 60%.
    """
    (task,) = results.tasks
    (_, *recipes_of), *body = zip(*lines(task, results.rows, results.times()), strict=True)
    head = ("figure", *recipes_of)
    figures = {name: [Html(escape(cell).replace("..", "..<wbr>")) for cell in cells] for name, *cells in body}
    figures["KV bytes"] = [escape(scaled(row.kv_bytes, "B")) for row in results.rows]
    rows = [(name, *cells) for name, cells in figures.items()]
    players = "".join(player.player(example, number) for number, example in enumerate(examples))
    parts = [
        f"<p>{_summary(results)}</p>",
        "<h2>Watch tokens leave</h2><p>A picture enters as visual tokens, one for each square. At 60%, squares go "
        "dark at the layer from which on the model does without them. Shown is the last layer; where the browser runs "
        "scripts, Play goes through all of them.</p>",
        players,
        f"<h2>What it saves, what it keeps</h2>{table(head, rows, label='results')}",
        "<p class=small>Agreement is with the dense model's answers, KL the divergence of the first answer token; "
        f"{TIMES}.</p>",
        curve(recipes, visual_tokens, "Visual tokens that enter each layer"),
        *report_answers.changes(results, results.answers, None),
        f"<h2>Next: your own model</h2><pre>{escape(_NEXT)}</pre>",
    ]
    return page(
        "fitprune demo: which visual tokens leave, and what that changes",
        Html("\n".join(parts)),
        style=player.STYLE + report_answers.STYLE + _STYLE,
        script=player.script() + report_answers.SCRIPT,
        maker=PICTURE_MARK,
    )


def _summary(results: Results) -> str:
    """Say in two sentences what was run, and what 60% did."""
    dense, row = results.row(DENSE), results.row("60%")
    times = results.times().get((row.method, row.budget))
    prefill = f", and reads picture and question in {times['prefill_ratio']:.2f} of the time" if times else ""
    return (
        f"The small LLaVA that ships in the package answered {results.tasks[0].questions:,} questions about "
        f"handwritten digits that its training never saw. With {percent(row.flops_reduction)} of the visual tokens' "
        f"FLOPs removed it answers {percent(row.agreement)} of them as the dense model does "
        f"({percent(row.accuracy)} are right, {percent(dense.accuracy)} without pruning){prefill}. Nothing was trained."
    )
