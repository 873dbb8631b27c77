"""Count what a package's layout asks of a reader: `python tests/helpers/structure.py [src/fitprune]`.

With `--write` it writes the tree of folders, and the core with its lines, into README.md and docs/design.md.

A *room* is what one sees at the top of the package: a module, or a folder as one. An *arrow* is a pair of rooms of
which the first imports from the second, in a function or for types alone too. A *circle* is a set of rooms that import
each other. An *arrow back* is one that has to go so that no circle is left. A *floor* is a step of the longest chain of
imports, circles broken. Inside a folder the same is counted with its modules as rooms.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# docs/design.md explains the ladder: a package imports only from rungs above its own.
LADDER = [
    ["_version", "_support"],
    ["costs"],
    ["recipes"],
    ["fitting", "families", "scoring"],
    ["engine"],
    ["calibration"],
    ["baselines", "output_search", "speed", "analysis", "benchmarks"],
    ["pictures"],
    ["evaluation"],
    ["integrations", "cli"],
    ["__init__", "__main__"],
]


def imported(path: Path, package: Path) -> set[str]:
    """The modules of the package that a file imports, dotted, without the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = package.name + "."
    inner = {name.removeprefix(prefix) for name in found if f"{name}.".startswith(prefix)}
    return {"__init__" if name == package.name else module_of(name, package) for name in inner}


def module_of(name: str, package: Path) -> str:
    """Cut a dotted name to the module that holds it; "__init__" for a name of the package itself."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = package.joinpath(*parts[:end])
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return ".".join(parts[:end])
    return "__init__"


def rooms(package: Path) -> dict[str, list[Path]]:
    """The rooms at the top of a package, each with its files."""
    modules = {path.stem: [path] for path in sorted(package.glob("*.py"))}
    folders = {path.parent.name: sorted(path.parent.rglob("*.py")) for path in sorted(package.glob("*/__init__.py"))}
    return modules | folders


def arrows(package: Path) -> set[tuple[str, str]]:
    """Pairs (room, room that it imports from)."""
    return {
        (room, used)
        for room, paths in rooms(package).items()
        for path in paths
        for used in (name.split(".")[0] for name in imported(path, package))
        if used != room
    }


def arrows_inside(folder: Path, package: Path) -> set[tuple[str, str]]:
    """Pairs (module, module that it imports from) of one folder."""
    prefix = folder.name + "."
    return {
        (room, name.removeprefix(prefix).split(".")[0])
        for room, paths in rooms(folder).items()
        for path in paths
        for name in imported(path, package)
        if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] != room
    }


def circles(pairs: set[tuple[str, str]]) -> list[set[str]]:
    """Sets of rooms of which each can reach each other."""
    reached = {start: _reach(start, pairs) for pair in pairs for start in pair}
    found: list[set[str]] = []
    for room, others in reached.items():
        if room in others and not any(room in circle for circle in found):
            found.append({other for other in others if room in reached[other]})
    return found


def back(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows whose removal leaves no circle: few, though perhaps not the fewest."""
    removed: set[tuple[str, str]] = set()
    while found := circles(pairs - removed):
        inner = {pair for pair in pairs - removed if any(set(pair) <= circle for circle in found)}
        removed.add(min(sorted(inner), key=lambda pair: len(back_of(pairs - removed - {pair}))))
    return removed


def back_of(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows inside circles."""
    found = circles(pairs)
    return {pair for pair in pairs if any(set(pair) <= circle for circle in found)}


def floors(pairs: set[tuple[str, str]]) -> int:
    """Rooms of the longest chain of imports, circles broken."""
    straight = pairs - back(pairs)
    height: dict[str, int] = {}

    def of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((of(used) for user, used in straight if user == room), default=0)
        return height[room]

    return max((of(room) for pair in straight for room in pair), default=1)


def _reach(start: str, pairs: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        room = waiting.pop()
        new = {used for user, used in pairs if user == room} - found
        found |= new
        waiting += new
    return found


def tree() -> str:
    """One line a folder, in the order of the ladder: its name, and the first line of its docstring."""
    source = ROOT / "src" / "fitprune"
    rows = [("src/fitprune/", "the public names, loaded when first used, and the version")]
    for name in (name for rung in LADDER for name in rung if (source / name).is_dir()):
        text = ast.get_docstring(ast.parse((source / name / "__init__.py").read_text())) or ""
        rows.append((f"    {name}/", text.splitlines()[0].rstrip(".")))
    rows += [
        ("tests/", "one folder a package; behaviour/ has the matrices, helpers/ what tests share"),
        ("examples/", "a scorer, a baseline and a family from outside the package"),
        ("benchmarks/", "scripts that make figures of the pages"),
        ("training/", "how the bundled model and its data were made"),
    ]
    return "\n".join(f"{name:20} {text}" for name, text in rows)


# The core, in the order in which it is read.
CORE = {
    "recipes/rounding.py": "from fractions to counts: the one rounding rule",
    "fitting/rules.py": "two rules: which tokens could leave a layer, and which leave it",
    "fitting/budget.py": "what is asked for, what counts, whether it is met",
    "fitting/walk.py": "the first rule at one tolerance, for all samples at once",
    "fitting/fit.py": "the search for the tolerance, and the recipe",
    "scoring/softmax.py": "weights as the layer computes them",
    "scoring/received.py": "what a token receives in one layer",
    "scoring/view.py": "what a scorer may look at",
    "scoring/attention_scorers.py": "scorers; FitPrune's is the first",
    "engine/rows.py": "rows packed, taken, put back",
    "engine/masks.py": "masks cut to the rows and keys present",
    "engine/choose.py": "from a recipe and a scorer to the rows that stay",
    "engine/running.py": "one running prefill, layer by layer",
    "engine/remover.py": "the hooks on the model",
}


def core() -> str:
    """The core as a table: number, file, lines, what it is."""
    source = ROOT / "src" / "fitprune"
    counts = {name: lines([source / name]) for name in CORE}
    rows = [f"| {n} | `{name}` | {counts[name]} | {what} |" for n, (name, what) in enumerate(CORE.items(), 1)]
    total = f"| | together | {sum(counts.values()):,} | |"
    return "\n".join(["| | file | lines | |", "|---|---|---|---|", *rows, total])


def with_structure(page: str) -> str:
    """The page with today's tree and core between their marks."""
    for name, text in (("tree", f"```\n{tree()}\n```"), ("core", core())):
        new = f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"
        page = re.sub(rf"<!-- {name} -->\n.*?<!-- end of {name} -->", lambda _, new=new: new, page, flags=re.S)
    return page


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def main(package: Path) -> None:
    pairs = arrows(package)
    print(f"{'folder':16} {'files':>5} {'lines':>6} {'largest':>8} {'arrows':>7} {'back':>5} {'circles':>8}")
    for name, paths in rooms(package).items():
        inside = arrows_inside(package / name, package) if (package / name).is_dir() else set()
        largest = max(lines([path]) for path in paths)
        counts = f"{len(inside):7} {len(back(inside)):5} {len(circles(inside)):8}"
        print(f"{name:16} {len(paths):5} {lines(paths):6} {largest:8} {counts}")
    paths = sorted(package.rglob("*.py"))
    print(
        f"{len(rooms(package))} rooms on {floors(pairs)} floors, {len(pairs)} arrows, {len(back(pairs))} arrows back, "
        f"{len(circles(pairs))} circles; {len(paths)} files, {lines(paths)} lines, "
        f"{sum(lines([path]) > 300 for path in paths)} files above 300 lines"
    )


if __name__ == "__main__":
    if "--write" in sys.argv:
        for path in (ROOT / "README.md", ROOT / "docs" / "design.md"):
            path.write_text(with_structure(path.read_text()))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "src/fitprune"))
