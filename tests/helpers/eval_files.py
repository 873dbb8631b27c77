"""Small files of benchmarks, written by hand below a data root."""

import json


def put(path, content):
    """Write bytes as they are, a list into a .jsonl line by line, and all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        lines = content if path.suffix == ".jsonl" else [content]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(content)
    return path


def lined(number, image, text):
    """A line of LLaVA's question files."""
    return {"question_id": number, "image": image, "text": text, "category": "default"}
