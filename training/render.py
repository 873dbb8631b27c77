"""Render the embedded calibration and test sets: digit scenes and digit details as JPEG with one question each.

    python training/render.py --out src/fitprune/data

Each folder is an image folder that `datasets` loads, and its `metadata.jsonl` is a question file for fitprune. No scan
of the test set is in the training or calibration set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import scenes


def render(split: str, count: int, out: Path, seed: int, *, details: bool = False) -> None:
    """Write `count` scenes, the kinds of question taken in turn."""
    rng = np.random.default_rng([seed, len(split), 1] if details else [seed, len(split)])
    bank = scenes.GlyphBank(scenes.split_scans()[split], variants=8, rng=rng, small=details)
    kinds, compose, ask = (
        (scenes.DETAIL_KINDS, scenes.compose_details, scenes.ask_detail)
        if details
        else (scenes.KINDS, scenes.compose, scenes.ask)
    )
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        scene = compose(bank, rng)
        kind = kinds[number % len(kinds)]
        question, answer = ask(scene, kind, rng)
        name = f"images/{number:04d}.jpg"
        Image.fromarray(scene.pixels).save(out / name, quality=92, subsampling=0)
        entry = {
            "question_id": f"{split}-{number:04d}",
            "file_name": name,
            "text": question,
            "answer": answer,
            "kind": kind,
        }
        lines.append(json.dumps(entry))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--calibration", type=int, default=64, help="calibration images of each family")
    args = parser.parse_args()
    for name, tests in (("scenes", 640), ("details", 600)):
        folder = args.out / f"digit_{name}"
        render("calibration", args.calibration, folder / "calibration", args.seed, details=name == "details")
        render("test", tests, folder / "test", args.seed, details=name == "details")


if __name__ == "__main__":
    main()
