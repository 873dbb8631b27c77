"""Data as users have it, and every way it can be broken."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from fitprune import embedded, load_samples, make_batches
from fitprune.batches import format_prompt
from fitprune.calibration import BadSample, Sample


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded.folder("model"))


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
    source = embedded.folder("calibration")
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
    assert len(load_samples(embedded.folder("calibration"))) == 64
    test = load_samples(embedded.folder("test"))
    assert len(test) >= 512
    kinds = {s.kind for s in test}
    assert all(sum(s.kind == kind for s in test) >= 64 for kind in kinds)
    assert len(kinds) == 8


def test_samples_are_drawn_by_seed_in_the_datas_order():
    source = embedded.folder("calibration")
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
    samples = load_samples(embedded.folder("calibration"))[:24]
    (batch,) = make_batches(samples, processor, batch_size=24)
    assert batch["input_ids"].shape[0] == 24
    assert not batch["attention_mask"].all()
    with pytest.raises(ValueError, match="batch_size=0"):
        make_batches(samples, processor, batch_size=0)


def test_a_sample_may_hold_an_image_itself():
    assert Sample("0", "x", Image.new("L", (8, 8))).load_image().mode == "RGB"
