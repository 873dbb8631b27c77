"""The keys of an entry, read by what their values mean."""

import numpy as np
import pytest

from fitprune import load_samples
from fitprune.calibration.entry import fields_of
from fitprune.calibration.samples import Sample
from helpers.questions import QUESTION, write

NAN = float("nan")


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": 3.0}, ("3",)),
        ({"answer": 3}, ("3",)),
        ({"answer": -0.0}, ("0",)),
        ({"answer": 2.5}, ("2.5",)),
        ({"answer": 1e300}, ("1e+300",)),
        ({"answer": NAN}, ()),
        ({"answer": None}, ()),
        ({"answer": ""}, ()),
        ({"answers": ["a", None, NAN, " ", 2.0]}, ("a", "", "", "", "2")),  # of annotators, each counts
        ({"answers": ["yes"] * 5 + [""] * 5}, ("yes",) * 5 + ("",) * 5),
        ({"answers": [{"answer": "a"}, {"answer": ""}, {"answer": None}]}, ("a", "", "")),
        ({"answers": ["", None]}, ()),
        ({"answers": [{"answer": None}] * 10}, ()),
        ({"answer": "", "answers": ["a"]}, ("a",)),
        ({"answer": [], "answers": "a"}, ("a",)),
        ({"answer": [None], "label": "a"}, ("a",)),
        ({"answer": {"answer": [], "answer_id": []}, "answers": " ", "label": "a"}, ("a",)),
        ({"answer": 2.0**53}, ("9007199254740992",)),
        ({"answer": None, "answers": ["a"]}, ("a",)),
        ({"answer": NAN, "answers": "a"}, ("a",)),
        ({"answers": [{"answer": "a", "answer_id": 1}] * 3}, ("a",) * 3),
        ({"answers": {"answer": ["a", "b"], "answer_id": [1, 2]}}, ("a", "b")),
        ({"label": "yes"}, ("yes",)),
        ({"label": 3}, ()),
        ({"answer": np.float64(3)}, ("3",)),
        ({"answer": np.int64(3)}, ("3",)),
    ],
)
def test_accepted_answers_are_read_by_what_they_mean(folder, answer, accepted):
    assert fields_of(QUESTION | answer, folder, "x")["answers"] == accepted
    if "numpy" not in str(type(answer.get("answer"))):
        assert load_samples(write(folder, QUESTION | answer))[0].answers == accepted


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"text": None, "question": "What?"}, "What?"),
        ({"text": NAN, "question": "What?"}, "What?"),
        ({"text": NAN, "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "What?"),
        ({"text": "What?", "conversations": None}, "What?"),
        ({"image": None, "file_name": "red.png"}, "What?"),
        ({"image": NAN, "file_name": "red.png"}, "What?"),
        ({"question_id": None, "id": 7}, 7),
        ({"question_id": NAN, "id": "x"}, "x"),
        ({"question_id": 7.0}, 7),
        ({"question_id": "7"}, "7"),
        ({"question_id": "007"}, "007"),
        ({"question_id": 0}, 0),
        ({"question_id": 2.5}, "2.5"),
        ({"question_id": 10**300}, 10**300),
        ({"question_id": np.int64(7)}, 7),
        ({"question_id": None}, "x"),
        ({"kind": None, "category": "random"}, "random"),
        ({"kind": 0}, "0"),
        ({"kind": 2.0, "category": "random"}, "2"),
        ({"category": ["a", "b"]}, ""),
        ({"kind": "", "category": "random"}, "random"),
        ({"text": "", "question": "What?"}, "What?"),
        ({"image": "", "file_name": "red.png"}, "What?"),
        ({"image": {"bytes": None, "path": None}, "file_name": "red.png"}, "What?"),
        ({"question_id": "", "id": 7}, 7),
        ({"question_id": [], "id": ""}, "x"),
        ({"question_id": 2.0**53}, 2**53),
    ],
)
def test_a_key_without_a_value_falls_through_to_its_synonym_and_ids_keep_their_type(folder, keys, found):
    sample = Sample(**fields_of(QUESTION | {"text": "What?"} | keys, folder, "x"))
    got = sample.id if {"question_id", "id"} & set(keys) else sample.kind if "category" in keys else sample.text
    if "kind" in keys:
        got = sample.kind
    assert (got, type(got)) == (found, type(found))
    sample.load_image()
