"""What a benchmark is: which files it needs, which questions they hold, how an answer is scored, what a server takes.

Each benchmark is one file of this package that makes one `Benchmark` (or one for each split); `table` lists them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune._support import files
from fitprune.benchmarks.measure import Measure, mean_by_group
from fitprune.calibration.samples import Sample

ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
EXTRA = "pip install 'fitprune[benchmarks]'"
SHORT, LONG = 128, 1024  # tokens of an answer at most: in LLaVA's model_vqa_loader.py, and in its other scripts


@dataclasses.dataclass(frozen=True)
class Needed:
    """A file or folder that a benchmark needs.

    Attributes:
        role: "questions", "annotations", "images", or another name by which `Benchmark.read` finds it.
        places: where it may lie, relative to the data root; the first that is there is taken.
        optional: whether the questions can be read without it.
    """

    role: str
    places: tuple[str, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Upload:
    """What a benchmark's own script or server takes.

    Attributes:
        ending: ends the file's name, such as ".json"; "" for a folder.
        write: writes the answers [questions] to the path.
        taker: the script or server that takes it.
        module: what must be installed to write it.
    """

    ending: str
    write: Callable[[Sequence[Sample], Sequence[str], Path], None]
    taker: str
    module: str = ""

    def require(self, name: str) -> None:
        """Refuse, before long work, where the file could not be written.

        Args:
            name: the benchmark's.

        Raises:
            ImportError: the module is not installed.
        """
        if self.module and importlib.util.find_spec(self.module) is None:
            raise ImportError(f"{name}: {self.module} is needed to write its upload file: {EXTRA}")

    def save(self, samples: Sequence[Sample], texts: Sequence[str], path: str | os.PathLike[str]) -> None:
        """Write the answers [questions]; each file whole, and none before all are."""
        if self.ending:
            with files.replacing(path) as temporary:
                self.write(samples, texts, temporary)
            return
        folder = Path(path).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as part:
                self.write(samples, texts, Path(part))
                for file in sorted(Path(part).iterdir()):
                    os.replace(file, folder / file.name)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}; make room, and run again") from error


def by_id(line: Mapping[str, Any]) -> Hashable:
    """Find the question of a line by its id; "12" and 12 are one."""
    return str(line["question_id"])


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One split of one benchmark.

    Attributes:
        name: what the user types.
        title: its name and split, for people.
        metric: what the figure is, for people.
        needs: its files.
        read: role -> path, to the questions in the files' order. `Sample.id` is the answers file's `question_id`;
            `text` the question as it follows the image; `answers` the accepted answers; `kind` the group; `facts` has
            what else is needed, and `facts["prompt"]` what the answers file holds as `prompt`, if it is not `text`.
        score: from an answer and its question to 0..1; None where no answers are published.
        measure: from the questions to how their scores become the figures; by default the mean, all and by group.
        maximum: the highest value of the figure.
        max_new_tokens: longest answer, as LLaVA's scripts have it.
        key: from a line of an answers file to what tells its question from others, the same for `line_of` a sample.
        unit: from a question to the unit that is drawn whole by `--samples`; None for the question itself.
        upload: what its script or server takes; None where that is the answers file itself.
        rebuild: makes the questions from the lines (where, line) of an answers file that holds them; None where none
            does.
        uncounted: whether a line of an answers file is of a question that its figure leaves out.
        by_lines: its official script, where that pairs answers and labels by lines, so that their order counts there.
        aliases: other names that users type.
    """

    name: str
    title: str
    metric: str
    needs: tuple[Needed, ...]
    read: Callable[[Mapping[str, Path]], list[Sample]]
    score: Callable[[str, Sample], float] | None
    measure: Callable[[Sequence[Sample]], Measure] = mean_by_group
    maximum: float = 100
    max_new_tokens: int = SHORT
    key: Callable[[Mapping[str, Any]], Hashable] = by_id
    unit: Callable[[Sample], Hashable] | None = None
    upload: Upload | None = None
    rebuild: Callable[[Sequence[tuple[str, Mapping[str, Any]]]], list[Sample]] | None = None
    uncounted: Callable[[Mapping[str, Any]], bool] | None = None
    by_lines: str = ""
    aliases: tuple[str, ...] = ()


def line_of(sample: Sample, text: str = "") -> dict[str, Any]:
    """Write an answer as LLaVA's answers files have it, without the ids of answer and model."""
    return {"question_id": sample.id, "prompt": sample.facts.get("prompt", sample.text), "text": text}
