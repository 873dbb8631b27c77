"""Read a benchmark's files; what is wrong is named with its file and line."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fitprune._support import files
from fitprune._support.messages import line as one_line
from fitprune._support.messages import short
from fitprune.benchmarks.base import Benchmark, Needed, line_of
from fitprune.calibration.entry import BadSample
from fitprune.calibration.samples import Sample, draw

logger = logging.getLogger(__name__)

MOST_BYTES = 4 << 30


def located(benchmark: Benchmark, root: Path) -> dict[str, Path]:
    """Find a benchmark's files: role -> path, without those that are absent.

    Args:
        benchmark: the benchmark.
        root: folder laid out as LLaVA's `playground/data/eval`.
    """
    paths: dict[str, Path] = {}
    for needed in benchmark.needs:
        if place := next((root / place for place in needed.places if (root / place).exists()), None):
            paths[needed.role] = place
    return paths


def load_benchmark(
    benchmark: Benchmark, root: Path, *, images: bool = True, samples: int | None = None, seed: int = 0
) -> list[Sample]:
    """Read a benchmark's questions.

    Args:
        benchmark: the benchmark.
        root: folder laid out as LLaVA's `playground/data/eval`.
        images: whether the pictures are needed too.
        samples: how many to draw without replacement, whole units; all by default.
        seed: seed of the draw.

    Raises:
        FileNotFoundError: the root or a file is not there.
        BadSample: a file is broken, with its line, or is of another state than the questions.
        ValueError: ids are repeated, pictures are missing, or there are fewer questions than are to be drawn.
    """
    if not root.is_dir():
        raise FileNotFoundError(2, f"data root {root} is no folder: pass the one that holds {_first_folder(benchmark)}")
    paths = located(benchmark, root)
    for needed in benchmark.needs:
        if needed.role not in paths and not needed.optional and (images or needed.role != "images"):
            raise FileNotFoundError(2, f"{benchmark.name}: {missing(needed, root)}")
    questions = benchmark.read(paths)
    if not questions:
        raise ValueError(f"{paths.get('questions', root)}: holds no question; there must be at least one")
    keys = [benchmark.key(line_of(sample)) for sample in questions]
    require_unique(keys, [sample.where for sample in questions])
    if samples is not None:
        questions = drawn(benchmark, questions, samples, seed)
    if images:
        _require_pictures(benchmark, questions)
    return questions


def missing(needed: Needed, root: Path) -> str:
    """Say which file is not there, and where it is looked for."""
    other = f" (or {', '.join(needed.places[1:])})" if needed.places[1:] else ""
    return f"its {needed.role} are missing: {root / needed.places[0]}{other} is not there"


def drawn(benchmark: Benchmark, questions: Sequence[Sample], samples: int, seed: int) -> list[Sample]:
    """Draw whole units until there are as many questions as asked for; they stay in their order."""
    if samples > len(questions):
        raise ValueError(
            f"samples={samples}: {benchmark.name} has only {len(questions)}; ask for fewer, or leave it out"
        )
    units: dict[Hashable, list[int]] = {}
    for place, sample in enumerate(questions):
        units.setdefault(benchmark.unit(sample) if benchmark.unit else place, []).append(place)
    groups = list(units.values())
    chosen: list[int] = []
    for number in draw(len(groups), len(groups), seed):
        if len(chosen) >= samples:
            break
        chosen += groups[number]
    return [questions[place] for place in sorted(chosen)]


def _require_pictures(benchmark: Benchmark, questions: Iterable[Sample]) -> None:
    """Refuse questions whose pictures are not there, all at once, before the first answer."""
    paths = list(dict.fromkeys(sample.image for sample in questions if isinstance(sample.image, Path)))
    absent = [path for path in paths if not path.is_file()]
    if absent:
        names = ", ".join(str(path) for path in absent[:3])
        raise ValueError(
            f"{benchmark.name}: {len(absent)} of {len(paths)} images are missing: {names}"
            f"{', ...' if len(absent) > 3 else ''}; put them there, or draw --samples from what is there"
        )


def require_unique(keys: Sequence[Hashable], where: Sequence[str]) -> None:
    """Refuse a question that is there twice."""
    if len(set(keys)) < len(keys):
        key = Counter(keys).most_common(1)[0][0]
        first, second, *_ = [place for place, own in zip(where, keys, strict=True) if own == key]
        raise BadSample(f"{second}: question {short(key, 80)} is there already ({first}): remove one of the two")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) for each line that is not blank."""
    for where, text in read_lines(path):
        yield where, _object(_parsed(text, where), where)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, text) for each line that is not blank."""
    return _lines(_text(path), path)


def read_lines_or_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) for each line, or for each entry where the file is one JSON list; a pipe will do."""
    text = _text(path)
    if text.lstrip().startswith("["):
        return _entries(_parsed(text, str(path)), path)
    return ((where, _object(_parsed(line, where), where)) for where, line in _lines(text, path))


def read_questions(paths: Mapping[str, Path]) -> Iterator[Sample]:
    """Yield the questions of a JSONL of LLaVA's, as `question` makes them."""
    for where, entry in read_jsonl(paths["questions"]):
        number, text = field(entry, "question_id", where, (int, str)), field(entry, "text", where)
        yield question(paths, where, number, text, field(entry, "image", where))


def question(paths: Mapping[str, Path], where: str, number: int | str, text: str, picture: str) -> Sample:
    """Make a question with its picture, whose name in the file is `facts["image"]`."""
    image = paths["images"] / picture if "images" in paths else None
    return Sample(number, text, image, where=where, facts={"image": picture})


def index(
    entries: Iterable[tuple[str, dict[str, Any]]], name: Callable[[dict[str, Any], str], Hashable]
) -> dict[Hashable, tuple[str, dict[str, Any]]]:
    """Find annotations by a name each, which two cannot share.

    Args:
        entries: (where, annotation).
        name: from (annotation, where) to its name.
    """
    listed = list(entries)
    names = [name(entry, where) for where, entry in listed]
    require_unique(names, [where for where, _ in listed])
    return dict(zip(names, listed, strict=True))


def annotation(annotations: Mapping[Any, Any], name: Hashable, sample: Sample, path: Path, official: str) -> Any:
    """Give a question's annotation, which must be there.

    Args:
        annotations: by name.
        name: the question's.
        sample: the question.
        path: the annotations' file.
        official: name of the file that the questions are of.

    Raises:
        BadSample: it is not there; both files are named.
    """
    if name not in annotations:
        raise BadSample(
            f"{sample.where}: question {short(name, 120)} is not in {path}: one of the two files is of another state "
            f"or split; the questions are of {official}"
        )
    return annotations[name]


def annotators(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Give the answer of each annotator, from `answers`: [{"answer": ...}, ...].

    Args:
        entry: the annotation.
        where: file and line, for messages.

    Raises:
        BadSample: there is none, or one is no text.
    """
    people: list[Any] = [
        each.get("answer") if isinstance(each, dict) else None for each in field(entry, "answers", where, list)
    ]
    if not people or not all(isinstance(person, str) for person in people):
        raise BadSample(
            f"{where}: 'answers' is {short(entry['answers'], 80)}, must hold {{'answer': text}} for each annotator"
        )
    return tuple(people)


def read_list(path: Path, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give (where, object) for each entry of a JSON list, or of the one that an object has by a name."""
    return _entries(field(read_json(path), name, str(path), list) if name else read_json(path, list), path)


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds one object, or another type."""
    whole = _parsed(_text(path), str(path))
    if not isinstance(whole, kind):
        raise BadSample(f"{path}: is a JSON {type(whole).__name__}, must be {_NAMES[kind]}; is it another file?")
    return whole


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for each row of a table with tabs between columns, its first line their names."""
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t")
    try:
        for number, row in enumerate(rows, 1):
            where = f"{path}, row {number}"
            if None in row or None in row.values():
                raise BadSample(f"{where}: has not as many columns as the first line; copy the file again")
            yield where, row
    except csv.Error as error:
        raise BadSample(f"{path}:{rows.line_num}: no table ({error}); copy the file again") from None


def field(entry: Mapping[str, Any], name: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """Give a value that must be there and of a type.

    Args:
        entry: the object.
        name: its key.
        where: file and line, for messages.
        kind: str, int, list, dict, or several.

    Raises:
        BadSample: it is absent or of another type.
    """
    value = entry.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        rule = " or ".join(_NAMES[each] for each in kinds)
        if name not in entry:
            raise BadSample(f"{where}: has no {name!r}, must have {rule}; is it another file?")
        raise BadSample(f"{where}: {name!r} is {short(value, 80)}, must be {rule}")
    return value


_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object", float: "a number"}


def _text(path: Path) -> str:
    if path.is_dir():
        raise BadSample(f"{path}: is a folder, must be a file; put the file itself there")
    try:
        return files.read_text(path, MOST_BYTES)
    except ValueError as error:
        raise BadSample(f"{path}: {error}; save it as UTF-8") from None


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _entries(entries: Sequence[Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        yield where, _object(entry, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        place = f"{where}:{error.lineno}" if isinstance(error, json.JSONDecodeError) and "\n" in text else where
        raise BadSample(f"{place}: not JSON ({one_line(reason)}); copy the file again") from None


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise BadSample(f"{where}: is a JSON {type(entry).__name__}, must be an object; is it another file?")
    return entry


def _first_folder(benchmark: Benchmark) -> str:
    return benchmark.needs[0].places[0].split("/")[0] + "/"
