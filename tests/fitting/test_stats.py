"""Measurement, statistics on disk, and runs that were killed."""

import dataclasses
import os

import pytest
import torch
from safetensors.torch import save_file

from fitprune import AttentionStats, PruningRecipe, measure
from fitprune._support import files
from fitprune.families.adapter import adapt
from helpers.models import tiny_inputs, tiny_model


def same(a, b):
    return (
        torch.equal(a.self_attention, b.self_attention)
        and torch.equal(a.cross_attention, b.cross_attention)
        and (a.visual_tokens, a.text_tokens, a.digests, a.model) == (b.visual_tokens, b.text_tokens, b.digests, b.model)
    )


def test_file_round_trip(tmp_path, family):
    model = tiny_model(family)
    stats = measure(model, [tiny_inputs(model, batch=2), tiny_inputs(model, seed=9)])
    stats.save(tmp_path / "s.safetensors")
    loaded = AttentionStats.load(tmp_path / "s.safetensors")
    assert same(loaded, stats)
    assert loaded.provenance == stats.provenance
    assert len(loaded) == 3


def test_concatenated_parts_give_the_whole_and_counts_a_sample_once():
    model = tiny_model()
    batches = [tiny_inputs(model, seed=s) for s in range(4)]
    whole = measure(model, batches)
    parts = [measure(model, batches[:2]), measure(model, batches[1:])]
    assert same(AttentionStats.concat(parts), whole)


def test_a_batched_measurement_equals_single_samples():
    model = tiny_model()
    batch = tiny_inputs(model, batch=3, before=8, pad=(2, 0, 5))
    together = measure(model, [batch])
    for row, pad in enumerate((2, 0, 5)):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        alone |= {k: alone[k][:, pad:] for k in ("input_ids", "attention_mask")}
        single = measure(model, [alone])
        assert single.digests[0] == together.digests[row]
        assert torch.allclose(together.select([row]).self_attention, single.self_attention, rtol=1e-4, atol=1e-7)
        assert single.text_tokens[0] == together.text_tokens[row]


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        measure(model, [inputs])
        assert torch.equal(model(**inputs).logits, before)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_a_killed_run_continues_with_what_it_has(tmp_path):
    model = tiny_model()
    batches = [tiny_inputs(model, seed=s) for s in range(4)]
    forwards = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def dying():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, dying(), parts=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    forwards.clear()
    continued = measure(model, batches, parts=tmp_path)
    assert len(forwards) == 2
    handle.remove()
    assert same(continued, measure(model, batches))


def test_parts_of_other_weights_or_another_dtype_are_measured_again(tmp_path, caplog):
    model, other = tiny_model(), tiny_model(seed=3)
    inputs = tiny_inputs(model)
    measure(model.bfloat16(), [inputs], parts=tmp_path)
    model = model.float()
    assert measure(model, [inputs], parts=tmp_path).provenance["dtype"] == "float32"
    assert same(measure(other, [inputs], parts=tmp_path), measure(other, [inputs]))
    (part,) = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:99])
    assert same(measure(other, [inputs], parts=tmp_path), measure(other, [inputs]))
    assert "measured again" in caplog.text


def test_only_own_parts_are_forgotten(tmp_path):
    from fitprune.calibration.measure import forget_parts

    (tmp_path / "notes.txt").write_text("mine")
    model = tiny_model()
    measure(model, [tiny_inputs(model)], parts=tmp_path)
    forget_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_link_is_followed_and_special_files_are_refused(tmp_path):
    thing = PruningRecipe.dense(adapt(tiny_model()).fingerprint, 16)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    thing.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert PruningRecipe.load(tmp_path / "target") == thing
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        thing.save(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a folder"):
        thing.save(f"{tmp_path}/new/")


def test_parts_of_another_model_are_refused(tmp_path):
    model, other = tiny_model(), tiny_model(layers=4)
    inputs = tiny_inputs(model)
    measure(model, [inputs], parts=tmp_path)
    with pytest.raises(ValueError, match="of another model: layers 5 there, 4 here"):
        measure(other, [inputs], parts=tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        AttentionStats.concat([measure(model, [inputs]), measure(other, [inputs])])


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        measure(tiny_model(), [])
    with pytest.raises(ValueError, match="at least one AttentionStats"):
        AttentionStats.concat([])


def test_samples_without_image_or_question_are_refused():
    model = tiny_model()
    inputs = tiny_inputs(model)
    no_image = inputs | {"input_ids": inputs["input_ids"].clamp(min=10)}
    with pytest.raises(ValueError, match="sample 0 of the batch has no visual token"):
        measure(model, [no_image])
    no_question = {k: v[:, : 3 + 16] if v.ndim == 2 else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match="sample 0 of the batch has no text after its last visual token"):
        measure(model, [no_question])


@pytest.mark.parametrize("damage", ["truncated", "foreign tensors", "text", "empty"])
def test_a_file_that_is_no_statistics_is_refused(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    model = tiny_model()
    measure(model, [tiny_inputs(model)]).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign tensors":
        save_file({"weight": torch.ones(2)}, path)
    else:
        path.write_text("hello" if damage == "text" else "")
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        AttentionStats.load(path)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="fitprune measure"):
        AttentionStats.load(tmp_path / "none.safetensors")


def test_inconsistent_or_non_finite_statistics_are_refused():
    model = tiny_model()
    stats = measure(model, [tiny_inputs(model)])
    with pytest.raises(ValueError, match="must be \\[layers, visual tokens"):
        dataclasses.replace(stats, visual_tokens=(15,))
    with pytest.raises(ValueError, match="non-finite"):
        dataclasses.replace(stats, self_attention=stats.self_attention * float("nan"))
    with pytest.raises(ValueError, match="text_tokens holds"):
        dataclasses.replace(stats, text_tokens=(-1,))
    with pytest.raises(ValueError, match="digests holds"):
        dataclasses.replace(stats, digests=([],))
    with pytest.raises(ValueError, match="differ in length"):
        dataclasses.replace(stats, digests=())


@pytest.mark.parametrize("kind", ["recipe", "stats"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind):
    model = tiny_model()
    path = tmp_path / "out"
    thing = (
        PruningRecipe.dense(adapt(model).fingerprint, 16) if kind == "recipe" else measure(model, [tiny_inputs(model)])
    )
    thing.save(path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device; nothing was changed"):
        thing.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unwritable_path_names_itself(tmp_path):
    (tmp_path / "file").write_text("")
    thing = PruningRecipe.dense(adapt(tiny_model()).fingerprint, 16)
    with pytest.raises(OSError, match="choose another output path"):
        thing.save(tmp_path / "file" / "r.json")
    with pytest.raises(OSError, match="is a folder"):
        thing.save(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda stats: AttentionStats.concat(None), "parts is NoneType: must be a list of them"),
        (lambda stats: stats.select([2]), "sample=2: must be an integer from 0 to 1"),
        (lambda stats: stats.select([-1]), "sample=-1: must be an integer from 0 to 1"),
        (lambda stats: stats.select(["a"]), "sample='a': must be an integer"),
        (lambda stats: dataclasses.replace(stats, self_attention=stats.self_attention.numpy()), "must be a Tensor"),
        (lambda stats: dataclasses.replace(stats, visual_tokens=None), "visual_tokens is a NoneType: must be a tuple"),
        (lambda stats: dataclasses.replace(stats, model="llava"), "model is a str: must be a ModelFingerprint"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        make(measure(model, [tiny_inputs(model, batch=2)]))
