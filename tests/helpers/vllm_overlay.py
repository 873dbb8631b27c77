"""Lay a newer vLLM's Python over the compiled parts of the CPU build that is installed, which has no newer release.

    python vllm_overlay.py WHEEL FOLDER

With FOLDER in PYTHONPATH, vLLM is the wheel's. That runs what the plug-in hooks, which is Python, but vLLM supports no
such combination.
"""

import importlib.util
import re
import sys
import zipfile
from pathlib import Path


def main():
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with zipfile.ZipFile(wheel) as whole:
        for name in whole.namelist():
            if name.startswith("vllm/") and name.endswith((".py", ".json", ".jinja")):
                whole.extract(name, folder)
        (metadata,) = (name for name in whole.namelist() if name.endswith(".dist-info/METADATA"))
        text = whole.read(metadata).decode()
    path = folder / metadata
    path.parent.mkdir()
    path.write_text(re.sub("^(Version: .*)$", r"\1+cpu", text, count=1, flags=re.MULTILINE))  # by which it knows itself
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    for compiled in installed.rglob("*.so"):
        (folder / "vllm" / compiled.relative_to(installed)).symlink_to(compiled)


if __name__ == "__main__":
    main()
