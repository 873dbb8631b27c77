"""Question files and conversations for tests of the calibration data."""

import json

import torch


def write(folder, *lines, name="q.jsonl"):
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder / name


QUESTION = {"question_id": 1, "image": "red.png", "text": "What colour?"}
OTHER = QUESTION | {"image": "blue.jpg"}


def turns(question="<image>\nWhat?", answer="A."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def turn(*content, role="user"):
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in content]
    return {"role": role, "content": parts}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name
