"""Rows of Hugging Face datasets: their splits, classes and pictures."""

import re

import pytest
from PIL import Image

from fitprune import load_samples
from fitprune._support import assets
from fitprune.calibration.entry import BadSample
from helpers.questions import QUESTION, write


def test_a_datasets_folder_and_the_jsonl_loader_read_the_bundled_questions(monkeypatch, tmp_path):
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
