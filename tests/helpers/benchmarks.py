"""A small root of benchmarks' files, and a benchmark that is none of the library's, for tests."""

import json

from fitprune.benchmarks.base import ONE_WORD, Benchmark, Needed, Upload
from fitprune.benchmarks.reading import read_jsonl
from fitprune.calibration.samples import Sample


def write_lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def make_pope(root, each=4):
    """POPE's files with `each` questions of each category; gives the questions and their labels."""
    questions, labels = [], []
    for place, category in enumerate(("adversarial", "popular", "random")):
        own = []
        for number in range(each):
            text = f"Is there a thing {number} in the image?"
            entry = {"question_id": number + 1, "image": f"{number}.jpg", "text": text}
            own.append({**entry, "label": ("yes", "no")[number % 2]})
            questions.append(
                {**entry, "question_id": place * each + number + 1, "text": text + ONE_WORD, "category": category}
            )
        labels += [entry["label"] for entry in own]
        write_lines(root / f"pope/coco/coco_pope_{category}.json", own)
    write_lines(root / "pope/llava_pope_test.jsonl", questions)
    return questions, labels


def answer(number, text, prompt="", **more):
    return {"question_id": number, "prompt": prompt, "text": text, **more}


def _read(paths):
    return [
        Sample(entry["question_id"], entry["text"], None, (entry["answer"],), where=where)
        for where, entry in read_jsonl(paths["questions"])
    ]


def _write(samples, texts, path):
    path.write_text(json.dumps({str(sample.id): text for sample, text in zip(samples, texts, strict=True)}))


def _write_folder(samples, texts, path):
    path.mkdir(exist_ok=True)
    _write(samples, texts, path / "all.txt")


def _rebuild(lines):
    return [Sample(line["question_id"], line["question"], None, (line["answer"],)) for _, line in lines]


UPLOAD = Upload(".json", _write, "the server")
FOLDER = Upload("", _write_folder, "the script")


def toy(**more):
    """Questions in toy/questions.jsonl; an answer is right if it is the accepted one."""
    facts = {
        "name": "toy",
        "title": "Toy test",
        "metric": "accuracy",
        "needs": (Needed("questions", ("toy/questions.jsonl", "toy/other.jsonl")), Needed("more", ("toy/more",), True)),
        "read": _read,
        "score": lambda text, sample: float(text == sample.answers[0]),
        "rebuild": _rebuild,
        "aliases": ("plaything",),
    }
    return Benchmark(**facts | more)


def make_toy(root, count=4):
    entries = [{"question_id": f"q{number}", "text": "?", "answer": "a"} for number in range(count)]
    write_lines(root / "toy/questions.jsonl", entries)
