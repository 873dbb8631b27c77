"""Data as users have it, and every way it can be broken."""

import dataclasses
import json
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from fitprune import evaluate, load_samples, make_batches
from fitprune._support import assets
from fitprune.calibration import samples as calibration
from fitprune.calibration.entry import BadSample
from fitprune.calibration.pictures import load_picture
from fitprune.calibration.samples import Sample
from helpers.questions import QUESTION, turns, write


def test_the_bundled_sets_have_what_they_promise():
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


def test_batches_are_padded(processor):
    samples = load_samples(assets.folder("calibration"))[:24]
    (batch,) = make_batches(samples, processor, batch_size=24)
    assert batch["input_ids"].shape[0] == 24
    assert not batch["attention_mask"].all()
    with pytest.raises(ValueError, match="batch_size=0"):
        make_batches(samples, processor, batch_size=0)


def test_a_sample_may_hold_an_image_itself():
    assert Sample("0", "x", Image.new("L", (8, 8))).load_image().mode == "RGB"


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
    monkeypatch.setattr(
        calibration, "load_picture", lambda image, **how: decoded.append(image) or load_picture(image, **how)
    )
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
def test_a_name_that_is_nearly_bundled_is_answered_without_datasets_and_network(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_samples(name)


def test_bundled_data_has_its_name_in_python_too(tmp_path, monkeypatch):
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


def test_a_sample_can_be_a_key():
    sample = Sample("a", "what?", "a.png", facts={"row": {}})
    assert {sample: 1}[Sample("a", "what?", "a.png", facts={"row": {}})] == 1
