"""Results of answers made by hand: no model runs."""

import json

from fitprune import PruningRecipe
from fitprune.calibration.samples import Sample
from fitprune.evaluation import rows
from fitprune.evaluation.entries import Entry
from fitprune.evaluation.metrics import choose
from fitprune.evaluation.results import Results

RECIPE = PruningRecipe.published("llava-1.5-7b", 60)


def answered(accepted, said, *, metric=None, budget=0.6, questions=()):
    """Results of answers: `said` has those of "dense" and of each method, by its name or by (name, budget)."""
    pairs = {name: (name, budget) if isinstance(name, str) else name for name in said if name != "dense"}
    entries = [Entry(name, RECIPE, at) for name, at in pairs.values()]
    labels = {"dense": "dense", **{name: entry.label for name, entry in zip(pairs, entries, strict=True)}}
    records = [
        {
            "place": number,
            "task": "t",
            "id": str(number),
            "kind": "",
            "question": questions[number] if questions else "q",
            "accepted": list(texts),
            "sizes": [576, 5, 40, 1],
            "said": {labels[name]: answers[number] for name, answers in said.items()},
            "divergence": dict.fromkeys(labels.values(), 0.0),
        }
        for number, texts in enumerate(accepted)
    ]
    name = choose(metric, [texts for texts in accepted if any(text.strip() for text in texts)])
    samples = [Sample(record["id"], record["question"], b"", tuple(record["accepted"])) for record in records]
    parts = list(rows.judge({"t": samples}, {"t": name}, metric is None, list(labels.values()), records))
    return Results(
        tuple(rows.rows_of(RECIPE.model, parts, entries, 2)),
        tuple(rows.best_of(parts, entries)),
        recipes={},
        examples=tuple(
            {**record, "scores": {label: float(own[n]) for label, own in parts[0].scores.items() if n < len(own)}}
            | {"picture": "data:,", "layers_entered": {}}
            for n, record in enumerate(records[:4])
        ),
        tasks=tuple(part.task for part in parts),
        provenance={"model": "m", "dtype": "float32"},
        answers=tuple(records),
    )


def save_with_journal(results, folder, **run):
    """Save results, and their answers as a journal beside them, of this run unless `run` says otherwise."""
    results.save(folder / "results.json")
    head = {"run": {**results.provenance, "entries": {}, **run}}
    lines = [json.dumps(line) for line in (head, *results.answers)]
    (folder / "results.samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "results.json"
