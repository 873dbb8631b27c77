"""Data as users have it, and every way it can be broken."""

import dataclasses
import json
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import evaluate, load_samples, make_batches
from fitprune._support import assets
from fitprune.calibration import samples as calibration
from fitprune.calibration.entry import BadSample, fields_of
from fitprune.calibration.pictures import load_picture
from fitprune.calibration.prompts import format_prompt
from fitprune.calibration.samples import Sample


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(assets.folder("model"))


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (30, 40), (30, 30, 200)).save(tmp_path / "blue.jpg")
    return tmp_path


def write(folder, *lines, name="q.jsonl"):
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder / name


QUESTION = {"question_id": 1, "image": "red.png", "text": "What colour?"}


def test_the_authors_question_file(folder):
    data = write(folder, QUESTION, "", QUESTION | {"image": "blue.jpg", "answer": ["blue", "navy"], "kind": "colour"})
    first, second = load_samples(data)
    assert (first.id, first.text, first.answers, first.kind) == (1, "What colour?", (), "")
    assert (second.answers, second.kind) == (("blue", "navy"), "colour")
    assert second.load_image().size == (30, 40)


def test_llava_instruction_json_with_another_image_folder(folder, tmp_path_factory):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    data = write(
        tmp_path_factory.mktemp("other"), json.dumps([{"id": "a", "image": "red.png", "conversations": turns}])
    )
    (sample,) = load_samples(data, folder)
    assert (sample.id, sample.text, sample.answers) == ("a", "What is it?", ("A square.",))
    sample.load_image()


def test_a_datasets_folder_and_the_jsonl_loader_read_the_embedded_questions(monkeypatch, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = assets.folder("calibration")
    ours = load_samples(source)
    loaded = datasets.load_dataset(str(source), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(ours) == len(loaded) == 64
    assert [s.text for s in ours] == loaded["text"][:]
    loaded.save_to_disk(tmp_path / "saved")
    again = load_samples(tmp_path / "saved")
    assert [(s.text, s.answers, s.kind) for s in again] == [(s.text, s.answers, s.kind) for s in ours]
    assert again[3].load_image().tobytes() == ours[3].load_image().tobytes()
    assert not any(isinstance(s.image, bytes) for s in again)  # read when its batch comes, and not held


def test_the_embedded_sets_have_what_they_promise():
    assert len(load_samples(assets.folder("calibration"))) == 64
    test = load_samples(assets.folder("test"))
    assert len(test) >= 512
    kinds = {s.kind for s in test}
    assert all(sum(s.kind == kind for s in test) >= 64 for kind in kinds)
    assert len(kinds) == 8


def test_samples_are_drawn_by_seed_in_the_datas_order():
    source = assets.folder("calibration")
    draw = [s.id for s in load_samples(source, samples=10, seed=3)]
    assert draw == [s.id for s in load_samples(source, samples=10, seed=3)] == sorted(draw)
    assert draw != [s.id for s in load_samples(source, samples=10, seed=4)]
    with pytest.raises(ValueError, match="has only 64 usable"):
        load_samples(source, samples=65)
    with pytest.raises(ValueError, match="samples=0"):
        load_samples(source, samples=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"q\.jsonl:2: not JSON"),
        ("[1]", r"q\.jsonl:2: is a JSON list"),
        ({"text": "x"}, r"q\.jsonl:2: 'image' is None"),
        ({"image": "red.png"}, r"q\.jsonl:2: 'text' is None"),
        ({"image": "red.png", "text": "  "}, r"q\.jsonl:2: 'text' is '  '"),
        ({"image": ["a.png", "b.png"], "text": "x"}, r"q\.jsonl:2: 'image' is \['a.png', 'b.png'\]"),
        ({"image": "red.png", "text": "x", "answer": {"a": 1}}, r"q\.jsonl:2: 'answer' is"),
        ({"image": "red.png", "text": "x", "answer": True}, r"q\.jsonl:2: 'answer' is"),
        ({"image": "red.png", "conversations": "hello"}, r"q\.jsonl:2: 'conversations' must be"),
        ({"image": "red.png", "conversations": [{"from": "gpt", "value": "x"}]}, r"q\.jsonl:2: 'conversations'"),
    ],
)
def test_a_broken_line_is_named_and_can_be_skipped(folder, line, message, caplog):
    data = write(folder, QUESTION, line, QUESTION)
    with pytest.raises(BadSample, match=message):
        load_samples(data)
    assert len(load_samples(data, skip_bad=True)) == 2
    assert "1 of 3 entries" in caplog.text
    assert "q.jsonl:2" in caplog.text


def bad_image(folder, kind):
    path = folder / f"{kind}.jpg"
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        Image.effect_noise((200, 200), 50).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "one pixel":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "animated":
        path = path.with_suffix(".gif")
        frames = [Image.new("RGB", (20, 20), (i * 40, 0, 0)) for i in range(4)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "bomb":
        path = path.with_suffix(".png")
        Image.new("1", (20_000, 20_000)).save(path)
    return path.name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is not an image file"),
        ("empty", "is not an image file"),
        ("truncated", "cannot be decoded"),
        ("one pixel", "is 1x1 pixels: too small"),
        ("animated", "is animated .4 frames."),
        ("bomb", "decompression bomb"),
        ("missing", "does not exist; check --image-folder"),
    ],
)
def test_a_bad_image_is_named_with_its_line_and_can_be_skipped(folder, kind, message, caplog):
    data = write(folder, QUESTION, QUESTION | {"image": bad_image(folder, kind)})
    with pytest.raises(BadSample, match=message) as caught:
        load_samples(data)[1].load_image()
    assert "q.jsonl:2" in str(caught.value)
    assert len(load_samples(data, skip_bad=True)) == 1
    assert "1 of 2 entries" in caplog.text


@pytest.mark.parametrize("kind", ["CMYK", "L", "P", "RGBA", "I;16", "40 megapixels"])
def test_unusual_but_sound_images_are_read(folder, kind, processor):
    path = folder / ("odd.png" if kind != "CMYK" else "odd.jpg")
    if kind == "40 megapixels":
        Image.new("RGB", (8000, 5000), (9, 99, 9)).save(path, compress_level=1)
    else:
        Image.new(kind, (64, 48)).save(path)
    (sample,) = load_samples(write(folder, QUESTION | {"image": path.name}))
    assert sample.load_image().mode == "RGB"
    assert next(make_batches([sample], processor))["pixel_values"].shape == (1, 3, 96, 96)


def test_sixteen_bit_grey_is_scaled_and_a_phones_second_view_is_left_out(folder):
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(folder / "grey.png")
    grey, *_ = load_samples(write(folder, QUESTION | {"image": "grey.png"}))
    assert grey.load_image().getpixel((0, 0)) == (128, 128, 128)
    views = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    views[0].save(folder / "phone.mpo", save_all=True, append_images=views[1:])
    phone, *_ = load_samples(write(folder, QUESTION | {"image": "phone.mpo"}))
    assert phone.load_image().getpixel((8, 8))[0] > 200


def test_files_from_other_systems_are_read(folder):
    (folder / "w.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(QUESTION).encode() + b"\r\n")
    assert len(load_samples(folder / "w.jsonl")) == 1
    odd = json.dumps(QUESTION | {"text": "a\u2028b"}, ensure_ascii=False)
    assert load_samples(write(folder, odd))[0].text == "a\u2028b"


def test_an_image_marker_in_a_question(folder, processor):
    (sample,) = load_samples(write(folder, QUESTION | {"text": "<image>\nWhat?"}))
    assert sample.text == "What?"
    with pytest.raises(ValueError, match="contains the image token '<image>'"):
        format_prompt(processor, "<image> What?")


def test_a_bad_image_in_a_dataset_is_named_and_can_be_skipped(folder, caplog):
    import datasets

    rows = {"image": [str(folder / "red.png"), str(folder / "q.jsonl")], "text": ["a", "b"]}
    write(folder, QUESTION)
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(folder / "saved")
    with pytest.raises(BadSample, match=r"row 1: .* is not an image file"):
        [sample.load_image() for sample in load_samples(folder / "saved")]
    assert len(load_samples(folder / "saved", skip_bad=True)) == 1
    assert "row 1" in caplog.text


def test_a_file_that_is_not_there_or_no_text(folder):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_samples(folder / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="image folder"):
        load_samples(write(folder, QUESTION), folder / "none")
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_samples(folder / "binary.jsonl")
    with pytest.raises(ValueError, match="no usable sample"):
        load_samples(write(folder, ""))
    for kind in ("tsv", "csv"):
        with pytest.raises(ValueError, match=f"q.{kind}: is {kind.upper()}, must be JSONL or JSON; convert it"):
            load_samples(write(folder, "index\timage\tquestion", "0\tabc\tWhat?", name=f"q.{kind}"))
    assert len(load_samples(write(folder, QUESTION, name="jsonl.tsv"))) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *(({"data": data}, "must be the name of a file, a folder or a dataset") for data in (None, 3, ["q.jsonl"], "")),
        *(({"samples": samples}, "must be at least 1, a whole number") for samples in ("2", 2.0, True, 0, -1)),
        *(({"seed": seed}, "must be a whole number") for seed in (None, "a", 0.5, False)),
    ],
)
def test_an_argument_of_another_type_is_refused_with_its_value_and_rule(folder, argument, message):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: {message}")):
        load_samples(**{"data": write(folder, QUESTION)} | argument)


def test_a_long_name_without_a_dot_that_is_not_there_is_a_missing_file(folder):
    data = write(folder, QUESTION | {"image": "train2017/" + "0" * 41})
    with pytest.raises(BadSample, match=r"q\.jsonl:1: .* does not exist, and as base64 it is not an image.*--image-f"):
        load_samples(data)[0].load_image()


def test_a_column_of_classes_is_read_by_their_names_and_an_empty_dataset_says_so(folder):
    import datasets

    classes = datasets.ClassLabel(names=["no", "yes"])
    for column, values, kind, answers, name in [
        ("answer", [0, 1, None, -1], classes, [("no",), ("yes",), (), ()], ""),
        ("label", [0, 1, 1, 1], classes, [("no",), *[("yes",)] * 3], ""),
        ("answers", [[0, 1], [1], [], None], datasets.List(classes), [("no", "yes"), ("yes",), (), ()], ""),
        ("answers", [[{"answer": 0}]] * 4, datasets.List({"answer": classes}), [("no",)] * 4, ""),
        ("kind", [1] * 4, classes, [()] * 4, "yes"),
        ("category", [1] * 4, classes, [()] * 4, "yes"),
    ]:
        rows = {"image": [str(folder / "red.png")] * 4, "text": ["a"] * 4, column: values}
        features = {"image": datasets.Image(), "text": datasets.Value("string"), column: kind}
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.save_to_disk(folder / "classes")
        found = load_samples(folder / "classes")
        assert [s.answers for s in found] == answers
        assert {s.kind for s in found} == {name}
    made.select([]).save_to_disk(folder / "empty")
    with pytest.raises(ValueError, match=r"empty: (datasets cannot load it .it has no rows.|no usable sample in it)"):
        load_samples(folder / "empty")
    datasets.Dataset.from_dict({"image": [], "text": []}).save_to_disk(folder / "none")
    with pytest.raises(ValueError, match=r"none: (datasets cannot load it .it has no rows.|no usable sample in it)"):
        load_samples(folder / "none")


def test_prompts_come_from_the_chat_template_or_the_one_given(processor):
    prompt = format_prompt(processor, "Is there a 7?")
    assert prompt == "USER: <image>\nIs there a 7? ASSISTANT:"
    assert format_prompt(processor, "a{b}", "<image> {question} !") == "<image> a{b} !"
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        format_prompt(processor, "x", "USER: <image>")
    with pytest.raises(ValueError, match="no visual token in it; put '<image>'"):
        format_prompt(processor, "x", "USER: {question}")

    class Bare:
        chat_template = None

    with pytest.raises(ValueError, match="no chat template"):
        format_prompt(Bare(), "x")


def test_batches_are_padded(processor):
    samples = load_samples(assets.folder("calibration"))[:24]
    (batch,) = make_batches(samples, processor, batch_size=24)
    assert batch["input_ids"].shape[0] == 24
    assert not batch["attention_mask"].all()
    with pytest.raises(ValueError, match="batch_size=0"):
        make_batches(samples, processor, batch_size=0)


def test_a_sample_may_hold_an_image_itself():
    assert Sample("0", "x", Image.new("L", (8, 8))).load_image().mode == "RGB"


NAN = float("nan")
OTHER = QUESTION | {"image": "blue.jpg"}


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


def deep(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "red.png", "text": "x", "more": ' + deep(100_000) + "}", r"q\.jsonl:2: nested too deeply"),
        ('{"image": ' + deep(500) + ', "text": "x"}', r"q\.jsonl:2: 'image' is \[\[\["),
        (json.dumps(QUESTION | {"text": "hi \ud800"}), r"q\.jsonl:2: 'hi \\ud800' holds half of a surrogate"),
        (json.dumps(QUESTION | {"question_id": "\ud800"}), r"q\.jsonl:2: .* holds half"),
        (json.dumps(QUESTION | {"kind": "\udfff"}), r"q\.jsonl:2: .* holds half"),
        (json.dumps(QUESTION | {"answer": ["a", "\udfff"]}), r"q\.jsonl:2: .* holds half"),
        ('{"image": "a.png", "image": "b.png", "text": "x"}', r"q\.jsonl:2: has the key 'image' twice"),
        ('{"question_id": %s, "image": "red.png", "text": "x"}' % ("9" * 5000), r"q\.jsonl:2: 'question_id' is inf"),
        ('{"image": "red.png", "text": "x", "answer": 1e999}', r"q\.jsonl:2: 'answer' is inf"),
        ('{"image": "red.png", "text": "x", "answer": [["a"], "b"]}', r"q\.jsonl:2: 'answer' is"),
        ('{"image": "red.png", "text": "x", "kind": [1]}', r"q\.jsonl:2: 'kind' is \[1\]"),
        ('{"image": "red.png", "text": "x", "question_id": true}', r"q\.jsonl:2: 'question_id' is True"),
        ('{"image": "red.png", "text": "<image>"}', r"q\.jsonl:2: 'text' is '<image>'"),
        (
            '{"image": "red.png", "conversations": [{"from": "human", "value": null}]}',
            r"q\.jsonl:2: 'conversations' must",
        ),
        ('{"image": "red.png", "text": "x"} {"a": 1}', r"q\.jsonl:2: not JSON \(Extra data"),
        ('{"image": "%s", "text": "x"}' % ("x" * 9000 + "."), r"q\.jsonl:2: image .* cannot be read"),
        ('{"image": {"a": 1}, "text": "x"}', r"q\.jsonl:2: 'image' is \{'a': 1\}"),
        (json.dumps({"image": ["x" * 9000] * 9, "text": "x"}), r"q\.jsonl:2: 'image' is"),
    ],
)
def test_what_breaks_parsers_is_named_with_its_line_in_one_short_line_and_skipped(folder, line, message, caplog):
    data = write(folder, QUESTION, line, OTHER)
    with pytest.raises(BadSample, match=message) as caught:
        [sample.load_image() for sample in load_samples(data)]
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert len(load_samples(data, skip_bad=True)) == 2
    assert "q.jsonl:2: " in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (deep(100_000), r"d\.json:1: nested too deeply"),
        ('[{"image": "red.png", "text": "x"},\n {"image": ]', r"d\.json:2: not JSON"),
        ('[{"image": "red.png", "text": "x"},\n]', r"d\.json:2: not JSON"),
        ('[{"image": "red.png", "text": "x"}', r"d\.json:1: not JSON \(after entry 0"),
        ('[{"image": "red.png", "text": "x"}] []', r"d\.json:1: not JSON \(after entry 0"),
        ('[\n{"image": "red.png", "text": "x", "text": "y"}]', r"d\.json, entry 0: has the key 'text' twice"),
        (
            '{"data": [{"question": "x"}], "version": 1}',
            r"one JSON object with keys 'data', 'version'.*save its list 'd",
        ),
        ('{\n "data": [],\n "version": 1\n}\n', r"d\.json:1: the file is one JSON object with keys 'data', 'version'"),
        ('{"columns": ["image"], "index": [0], "data": [["red.png"]]}', r"or JSONL; with pandas: to_json\(.*'records'"),
        ('{"version": [1], "data": [{"question": "x"}]}', r"save its list 'data'"),
        ('{"v1_0": {"imagename": "a.png"}}', r"one JSON object with keys 'v1_0', must be a list of entries or JSONL$"),
        ("{}", "one JSON object with no keys"),
    ],
)
def test_a_whole_file_that_is_no_list_of_entries_says_what_it_is(folder, text, message):
    (folder / "d.json").write_text(text)
    with pytest.raises(BadSample, match=message):
        load_samples(folder / "d.json")


def test_lists_and_objects_are_read_whatever_space_is_between(folder):
    for text, count in [("[ ]", 0), ("\n[\n]\n", 0), (json.dumps([QUESTION, OTHER], indent=2) + "\n", 2)]:
        (folder / "d.json").write_text(text)
        if count == 0:
            with pytest.raises(ValueError, match="no usable sample"):
                load_samples(folder / "d.json")
        else:
            assert len(load_samples(folder / "d.json")) == count
    (folder / "d.json").write_text(json.dumps(QUESTION, indent=2))
    assert len(load_samples(folder / "d.json")) == 1


def turns(question="<image>\nWhat?", answer="A."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_entries_of_text_alone_in_llavas_mix_are_left_out_with_one_count(folder, caplog):
    rows = [{"id": str(n), "image": "red.png", "conversations": turns()} for n in range(6)]
    alone = [{"id": "a", "conversations": turns()}, {"id": "b", "image": None, "conversations": turns()}]
    data = write(folder, json.dumps([*rows[:3], *alone, *rows[3:]]), name="mix.json")
    assert [s.id for s in load_samples(data)] == list("012345")
    assert [r.getMessage() for r in caplog.records] == [f"2 of 8 entries of {data} have no image: left out"]
    expected = [s.id for s in load_samples(write(folder, json.dumps(rows), name="whole.json"), samples=3, seed=5)]
    assert [s.id for s in load_samples(data, samples=3, seed=5)] == expected
    with pytest.raises(BadSample, match=r"mix\.json, entry 0: 'image' is None.*no entry has an image"):
        load_samples(write(folder, json.dumps(alone), name="mix.json"))
    with pytest.raises(ValueError, match="no usable sample"):
        load_samples(write(folder, json.dumps(alone), name="mix.json"), skip_bad=True)
    assert len(load_samples(write(folder, json.dumps([*rows, rows[0] | {"image": ""}]), name="mix.json"))) == 6


def test_a_draw_decodes_what_it_draws_and_draws_again_for_bad_ones(folder, monkeypatch, caplog):
    decoded = []
    monkeypatch.setattr(calibration, "load_picture", lambda image: decoded.append(image) or load_picture(image))
    good = write(folder, *[QUESTION | {"question_id": n} for n in range(500)])
    plain = [s.id for s in load_samples(good, samples=16, seed=2)]
    assert plain == sorted(random.Random(2).sample(range(500), 16))
    assert not decoded
    assert [s.id for s in load_samples(good, samples=16, seed=2, skip_bad=True)] == plain
    assert len(decoded) == 16
    bad = plain[3:7]
    rows = [QUESTION | {"question_id": n} | ({"image": "none.png"} if n in bad else {}) for n in range(500)]
    mixed = write(folder, *rows)
    decoded.clear()
    again = [s.id for s in load_samples(mixed, samples=16, seed=2, skip_bad=True)]
    assert set(plain) - set(bad) < set(again)
    assert len(again) == 16
    assert not set(bad) & set(again)
    assert len(decoded) == 20
    assert "4 of 500 entries" in caplog.text
    assert again == [s.id for s in load_samples(mixed, samples=16, seed=2, skip_bad=True)] == sorted(again)
    with pytest.raises(ValueError, match="has only 496 usable ones; ask for fewer, or leave it out"):
        load_samples(mixed, samples=497, skip_bad=True)
    decoded.clear()
    with pytest.raises(ValueError, match="has only 500 usable"):
        load_samples(mixed, samples=1_000_000, skip_bad=True)
    assert not decoded


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory):
    """Train and test, saved to disk and as a folder of images."""
    import datasets

    folder = tmp_path_factory.mktemp("splits")
    splits = {}
    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True)
        path = folder / "images" / split / "a.png"
        Image.new("RGB", (8, 8)).save(path)
        write(path.parent, {"file_name": "a.png", "text": split}, name="metadata.jsonl")
        rows = datasets.Dataset.from_dict({"image": [str(path), None], "text": [split, split]})
        splits[split] = rows.cast_column("image", datasets.Image())
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    splits["test"].save_to_disk(folder / "alone")
    splits["test"].save_to_disk(folder / "with:colon")
    return folder


@pytest.mark.parametrize("kind", ["saved", "images"])
def test_a_split_is_chosen_by_its_name(two_splits, kind, caplog, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = two_splits / kind
    options = {"skip_bad": True, "samples": 1}
    assert [s.text for s in load_samples(f"{data}:test", **options)] == ["test"]
    assert [s.text for s in load_samples(f"{data}:train", **options)] == ["train"]
    assert "has splits" not in caplog.text
    (sample,) = load_samples(data, **options)
    assert sample.text == "train"
    assert re.search(r"has splits \['train', 'test'\]: 'train' is used; name another as .*:test", caplog.text)
    for other in ("validation", "train+test", "test[:1]"):
        with pytest.raises(ValueError, match=re.escape(f":{other}: no such split; there are train, test")):
            load_samples(f"{data}:{other}")


def test_a_split_of_a_hub_name_is_chosen_too(two_splits, monkeypatch):
    import datasets

    asked = []
    loaded = datasets.load_from_disk(str(two_splits / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or loaded)
    assert [s.text for s in load_samples("org/name:test", skip_bad=True)] == ["test"]
    assert asked == ["org/name"]


def test_what_is_there_goes_before_a_split_and_a_file_has_none(two_splits, folder):
    assert [s.text for s in load_samples(two_splits / "with:colon", samples=1, skip_bad=True)] == ["test"]
    with pytest.raises(ValueError, match=r"train: the dataset has no splits; name .*alone$"):
        load_samples(f"{two_splits / 'alone'}:train")
    with pytest.raises(ValueError, match=r"q\.jsonl has no splits; name"):
        load_samples(f"{write(folder, QUESTION)}:train")
    with pytest.raises(BadSample, match="row 1: 'image' is None"):
        load_samples(two_splits / "alone")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit-scenes/tests", "did you mean digit-scenes/test[?]"),
        ("digit-scenes/calib", "did you mean digit-scenes/calibration[?]"),
        ("digit_details/test", "did you mean digit-details/test[?]"),
        ("Digit-Scenes/test", "did you mean digit-scenes/test[?]"),
        ("digitscenes/test", "did you mean digit-scenes/test[?]"),
        ("digit-scene", "did you mean digit-scenes[?]"),
        ("digit-scenes/", "is a model's folder, must be data"),
        ("digit-scenes", "is a model's folder, must be data; bundled are digit-scenes/calibration"),
        ("digit-scenes:test", "is a model's folder, must be data; bundled are digit-scenes/calibration"),
        ("digit-scenes/test:train", "metadata.jsonl has no splits; name digit-scenes/test$"),
        ("https://huggingface.co/datasets/a/b", "is a URL, must be"),
    ],
)
def test_a_name_that_is_nearly_embedded_is_answered_without_datasets_and_network(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_samples(name)


def test_embedded_data_has_its_name_in_python_too(tmp_path, monkeypatch):
    assert len(load_samples("digit-scenes/calibration")) == len(load_samples("digit-scenes/calibration/")) == 64
    assert assets.resolve("digit-scenes/") == assets.resolve("digit-scenes")
    with pytest.raises(ValueError, match="samples=1000000: digit-scenes/test has only 640 usable"):
        load_samples("digit-scenes/test", samples=1_000_000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digit-scene").mkdir()
    assert assets.resolve("digit-scene") == "digit-scene"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_samples("x" * 5000 + ".jsonl")


def test_a_whole_number_as_id_stays_one_in_the_journal_and_in_the_answers(tmp_path, processor):
    model = AutoModelForImageTextToText.from_pretrained(assets.folder("model")).eval()
    samples = [dataclasses.replace(s, id=n) for n, s in enumerate(load_samples("digit-scenes/test")[:2])]
    options = {"journal": tmp_path / "answers.jsonl", "timed_batches": 0, "batch_size": 2, "max_new_tokens": 2}
    for _ in range(2):  # the second goes on from the first's journal
        found = evaluate(model, processor, samples, {}, **options).answers
        assert [(answer["id"], type(answer["id"])) for answer in found] == [(0, int), (1, int)]
