"""Run the paper's benchmarks through lmms-eval, dense and with recipes, and print the table.

    python benchmarks/lmms_table.py --out lmms-table --batch-size 8
    python benchmarks/lmms_table.py --out try --model digit-scenes --recipe recipe.json --benchmark digit_scenes

Each cell is one lmms-eval run, in a folder of its own under --out. A finished cell is not run again, so the same
command goes on where it was stopped. Needs lmms-eval (pip install 'fitprune[lmms-eval]'), its data sets from the hub,
and for LLaVA-1.5-7B a GPU. Prints one JSON document last. docs/lmms-eval.md says what the figures can be compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from fitprune.integrations.lmms_eval_tasks import folder


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of lmms-eval's tasks, the metric that is shown, and the factor that brings it to the papers' scale."""

    task: str
    metric: str
    factor: float = 100
    judged: bool = False


BENCHMARKS = {
    "VQAv2": Benchmark("vqav2_val", "exact_match"),
    "GQA": Benchmark("gqa", "exact_match"),
    "VizWiz": Benchmark("vizwiz_vqa_val", "exact_match"),
    "SQA": Benchmark("scienceqa_img", "exact_match"),
    "TextVQA": Benchmark("textvqa_val", "exact_match"),
    "POPE": Benchmark("pope", "pope_f1_score"),
    "MME": Benchmark("mme", "mme_perception_score", factor=1),
    "MMBench": Benchmark("mmbench_en_dev_static", "gpt_eval_score", factor=1),
    "SEED": Benchmark("seedbench", "seed_image"),
    "MM-Vet": Benchmark("mmvet", "gpt_eval_score", factor=1, judged=True),
}
# Not part of the table: the bundled questions, to try the script without a download.
TRIAL = {"digit_scenes": Benchmark("digit_scenes", "accuracy")}

# Only what could be read at the place named. The table of the FitPrune paper could not, so it is not here.
PUBLISHED = {
    "dense (LLaVA, docs/MODEL_ZOO.md)": {
        "VQAv2": 78.5, "GQA": 62.0, "VizWiz": 50.0, "SQA": 66.8, "TextVQA": 58.2, "POPE": 85.9, "MME": 1510.7,
        "MMBench": 64.3, "MM-Vet": 31.1,
    },
    "FitPrune 90% (run by the authors of VisiPruner, Table 6)": {
        "GQA": 52.4, "SQA": 67.8, "TextVQA": 52.1, "POPE": 60.5, "MME": 1210.2, "MMBench": 55.4, "MM-Vet": 24.2,
    },
}  # fmt: skip
LLAVA_1_5 = "llava-hf/llava-1.5-7b-hf"


def command(args: argparse.Namespace, recipe: str | None, benchmark: Benchmark, out: Path) -> list[str]:
    """Give lmms-eval's command line for one cell."""
    options = ["--limit", str(args.limit)] if args.limit else []
    return [
        *shlex.split(args.launcher), "-m", "lmms_eval", "--model", "fitprune", "--model_args", model_args(args, recipe),
        "--include_path", str(folder()), "--tasks", benchmark.task, "--batch_size", str(args.batch_size),
        "--log_samples", "--output_path", str(out), *options,
    ]  # fmt: skip


def model_args(args: argparse.Namespace, recipe: str | None) -> str:
    """Give the plug-in's arguments for one row."""
    return ",".join(
        [f"pretrained={args.model}", f"dtype={args.dtype}", *([f"recipe={recipe}"] if recipe else []), *args.model_arg]
    )


def finished(args: argparse.Namespace, recipe: str | None, benchmark: Benchmark, out: Path) -> float | None:
    """Read a cell's figure; None if it was not run to its end, with other arguments, or with an older recipe file."""
    stated = (model_args(args, recipe), args.limit)
    changed = Path(recipe).stat().st_mtime if recipe and Path(recipe).exists() else 0.0
    for path in sorted(out.glob("*/*_results.json"), reverse=True):
        try:
            figures: dict[str, Any] = json.loads(path.read_text())
            same = (figures["config"]["model_args"], figures["config"]["limit"]) == stated
            value = figures["results"][benchmark.task][f"{benchmark.metric},none"]
        except (json.JSONDecodeError, KeyError):
            continue  # cut off in the middle
        if same and path.stat().st_mtime > changed and isinstance(value, (int, float)):
            return benchmark.factor * value
    return None


def cell(args: argparse.Namespace, recipe: str | None, name: str, benchmark: Benchmark) -> float | None:
    """Run one cell unless it is finished; None if it failed. lmms-eval exits with 0 in any case: its file decides."""
    row = "dense" if recipe is None else Path(recipe).name.removesuffix(".json").replace(":", "-")
    out = Path(args.out) / row / benchmark.task
    value = finished(args, recipe, benchmark, out)
    if value is None:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{row} {name}: running, output in {out / 'log.txt'}", file=sys.stderr, flush=True)
        with (out / "log.txt").open("w") as log:
            subprocess.run(command(args, recipe, benchmark, out), stdout=log, stderr=log, check=False)
        value = finished(args, recipe, benchmark, out)
        if value is None:
            print(f"{row} {name}: failed, see {out / 'log.txt'}", file=sys.stderr, flush=True)
    return value


def table(rows: dict[str, dict[str, float | None]], names: list[str]) -> str:
    """Line the rows up; a figure that is not there is a dash."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in names)]
    for row, figures in rows.items():
        shown = (figures.get(name) for name in names)
        lines.append(row.ljust(width) + "".join(f"{'-' if f is None else f'{f:.1f}':>13}" for f in shown))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of all runs")
    parser.add_argument("--model", default=LLAVA_1_5)
    parser.add_argument("--recipe", nargs="*", default=[f"llava-1.5-7b:{p}" for p in (40, 60, 80, 90)],
                        help="recipe files or published ones")  # fmt: skip
    parser.add_argument("--benchmark", nargs="+", default=list(BENCHMARKS), choices=[*BENCHMARKS, *TRIAL])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--limit", type=int, help="questions of each benchmark; for trials alone")
    parser.add_argument("--model-arg", nargs="*", default=[], help="more arguments of the plug-in, such as scorer=self")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable),
                        help="what starts lmms-eval, for example 'torchrun --nproc_per_node 4'")  # fmt: skip
    args = parser.parse_args()

    chosen = {name: {**BENCHMARKS, **TRIAL}[name] for name in args.benchmark}
    unjudged = [name for name, one in chosen.items() if one.judged and not os.environ.get("OPENAI_API_KEY")]
    for name in unjudged:
        print(f"{name}: left out: its judge needs OPENAI_API_KEY, without which all answers score 0", file=sys.stderr)
        del chosen[name]
    rows: dict[str, dict[str, float | None]] = {}
    for recipe in [None, *args.recipe]:
        rows[recipe or "dense"] = {name: cell(args, recipe, name, one) for name, one in chosen.items()}
    failed = sum(figure is None for figures in rows.values() for figure in figures.values())
    published = PUBLISHED if args.model == LLAVA_1_5 else {}
    print(table({**rows, **published}, args.benchmark))
    print(json.dumps({"rows": rows, "published": published, "limit": args.limit}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
