"""No sample is lost or confused: what names a sample holds all of its own inputs and nothing of the batch around it."""

import functools
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fitprune import AttentionStats, evaluate, load_model, measure
from fitprune._support import assets
from fitprune.calibration.samples import Sample
from fitprune.families import provenance
from fitprune.families.adapter import adapt
from fitprune.families.inputs import input_digests
from helpers import families
from helpers.models import batch_of, prompts, tiny_model

ROWS = {row.name: row for row in families.ROWS}
MEASURED = ["llava", "llava_next", "qwen2_5_vl", "glm4v-video", "internvl", "idefics3", "mistral3"]


@functools.cache
def parts(name):
    """A model and its row's four samples: of different lengths, images and counts of images."""
    model = ROWS[name].make_model()
    return model, ROWS[name].samples(model)


def pixels_of(sample):
    return [name for name in sample if name.startswith("pixel_values")]


def other_image(sample):
    """The last number of the last image that is no filling is another one."""
    (name, *_) = pixels_of(sample)[::-1]
    pixels = sample[name].clone()
    pixels[tuple(torch.nonzero(pixels)[-1])] += 0.5
    return {**sample, name: pixels}


def other_question(sample):
    ids = sample["input_ids"].clone()
    ids[0, -1] += 1 if ids[0, -1] < families.VOCABULARY - 1 else -1
    return {**sample, "input_ids": ids}


def side_by_side(model, sample):
    """Leave no text between the first visual token and the last one."""
    ids, tokens = sample["input_ids"][0], list(adapt(model).token_ids.values())
    visual = torch.isin(ids, torch.tensor(tokens))
    first, last = torch.nonzero(visual)[[0, -1], 0].tolist()
    keep = visual | (torch.arange(len(ids)) < first) | (torch.arange(len(ids)) > last)
    return {name: value[:, keep] if name in families.PADDING else value for name, value in sample.items()}


def without_images(sample):
    return {name: value[:, :3] for name, value in sample.items() if name in families.PADDING}


def batches(row, samples, size, side="left"):
    for start in range(0, len(samples), size):
        batch = row.collate(samples[start : start + size])
        if side == "right":  # each row's padding goes to its end
            for index, width in enumerate((batch["attention_mask"] == 0).sum(1).tolist()):
                for name in batch.keys() & families.PADDING.keys():
                    batch[name][index] = batch[name][index].roll(-width)
        yield batch


def digests(model, row, samples, size, side="left"):
    found = (input_digests(adapt(model), batch) for batch in batches(row, samples, size, side))
    return list(itertools.chain.from_iterable(found))


@pytest.mark.parametrize("name", ROWS)
def test_a_sample_has_one_name_in_every_batch_and_no_two_share_it(name):
    """Equal questions, equal images, both; one image or several, adjacent ones, and rows of text alone."""
    (model, own), row = parts(name), ROWS[name]
    own = list(own)
    closer = [side_by_side(model, sample) for sample in own]
    own += [new for new, old in zip(closer, own, strict=True) if new["input_ids"].shape != old["input_ids"].shape]
    assert len(own) > 4
    samples = [*own, *map(other_image, own), *map(other_question, own), without_images(own[0]), *own]
    alone = digests(model, row, samples, 1)
    different = 3 * len(own) + 1
    assert len(set(alone[:different])) == different
    assert alone[different:] == alone[: len(own)]
    for size in range(2, 9):
        assert digests(model, row, samples, size) == alone, size
    assert digests(model, row, samples, 5, "right") == alone


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some processors turn tensors to numpy as numpy 2 dislikes
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.processor and "video" not in name])
def test_a_batch_of_the_processor_names_samples_as_each_alone(name):
    """With the processor's own padding: tiles, rows and columns that fill up a batch, and text."""
    row = ROWS[name]
    model, processor = parts(name)[0], row.processor()
    texts = [f"see {row.image} what?", f"{row.image} and {row.image} too: what?", f"oh {row.image} what?"]
    own = [[families.picture(n + i, families.SIZES[n + i]) for i in range(text.count(row.image))]
           for n, text in enumerate(texts)]  # fmt: skip
    more, images = {}, own
    if name == "got_ocr2":
        more, images = {"num_image_tokens": 16, "crop_to_patches": True, "max_patches": 2}, list(itertools.chain(*own))
    given = list(zip(texts, own, [[]] * len(texts), strict=True))
    alone = families.process(processor, given, nested=name != "got_ocr2", **more)
    together = processor(text=texts, images=images, padding=True, return_tensors="pt", **more)
    adapted = adapt(model)
    assert input_digests(adapted, together) == [input_digests(adapted, sample)[0] for sample in alone]


@pytest.mark.parametrize("name", MEASURED)
def test_every_row_is_a_sample_with_the_same_bytes_through_parts(name, tmp_path, caplog):
    (model, own), row = parts(name), ROWS[name]
    samples = [own[0], other_image(own[0]), own[0], own[1], other_question(own[1]), own[0], own[2], own[1]]
    for size in (1, 3, 8):
        caplog.clear()
        whole = measure(model, batches(row, samples, size))
        assert len(whole) == 8
        assert len(set(whole.digests)) == 5
        assert "3 of 8 samples are equal to earlier ones, and each counts" in caplog.text
        whole.save(tmp_path / "whole")
        for _ in range(2):  # measured, and then found
            through = measure(model, batches(row, samples, size), parts=tmp_path / "parts")
            through.save(tmp_path / "through")
            assert (tmp_path / "through").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_cannot_be_dealt_enters_whole_with_the_place():
    model = tiny_model()
    samples = prompts(model, [[3, 6], [3, 6], [2, 4, 5]])
    samples[1] = samples[0]
    batch = batch_of(samples)
    plain = input_digests(adapt(model), batch)
    assert plain[0] == plain[1] != plain[2]
    for unknown in (
        {"regions": torch.arange(7)},
        {"regions": torch.arange(4)},
        {"boxes": [[1, 2], [3, 4]]},
        {"boxes": [[1], []]},
    ):
        found = input_digests(adapt(model), {**batch, **unknown})
        assert len({*plain, *found}) == 2 + 3
    first, second = ({"boxes": [[1, 2], [3, last]]} for last in (4, 5))
    assert not {*input_digests(adapt(model), batch | first)} & {*input_digests(adapt(model), batch | second)}


def test_images_encoded_ahead_are_not_confused():
    model = tiny_model()
    batch = batch_of(prompts(model, [[3, 6], [3, 6]]))
    batch["input_ids"][1] = batch["input_ids"][0]
    with torch.no_grad():
        found = [model.model.get_image_features(batch["pixel_values"] + more) for more in (0, 0.5)]
    named = [
        input_digests(adapt(model), {**batch, "pixel_values": None, "mm_encoder_outputs": {"image": outputs}})
        for outputs in found
    ]
    assert len({*named[0], *named[1]}) == 4


def test_numbers_beside_the_images_count():
    """What a processor says beside the pixels is part of a sample: two with equal pixels are two."""
    for name, said in (("qwen2_5_vl-video", "second_per_grid_ts"), ("lfm2_vl", "spatial_shapes"),
                       ("idefics3", "pixel_attention_mask"), ("gemma3", "token_type_ids"),
                       ("qwen2_vl", "image_grid_thw"), ("llava_next", "image_sizes")):  # fmt: skip
        model, (own, *_) = parts(name)
        changed = own[said].clone()
        changed[..., -1] = changed[..., 0] + 1 if said != "image_grid_thw" else changed[..., -1]
        if said == "image_grid_thw":
            changed = changed * torch.tensor([1, 2, 1]) // torch.tensor([1, 1, 2])  # other sides, as many patches
        one, other = input_digests(adapt(model), own), input_digests(adapt(model), {**own, said: changed})
        assert one != other, name


def test_statistics_of_several_files_count_a_sample_once_and_say_so(caplog):
    model = tiny_model()
    one, two, three = prompts(model, [[3, 6], [9, 12], [4, 4]])
    first, second = measure(model, [one, two, one]), measure(model, [two, three, three])
    caplog.clear()
    whole = AttentionStats.concat([first, second])
    assert whole.digests == (*first.digests, *second.digests[1:])
    assert "1 of 6 samples are in earlier statistics too and are left out: 5 are left" in caplog.text


@pytest.mark.parametrize("place", [0, 50, -1])
def test_one_changed_weight_is_another_model(place, tmp_path):
    model = tiny_model()
    inputs = batch_of(prompts(model, [[3, 6]]))
    before = measure(model, [inputs], parts=tmp_path)
    weight = model.model.multi_modal_projector.linear_2.weight.data.flatten()
    kept = weight[place].clone()
    weight[place] += 0.5
    after = measure(model, [inputs], parts=tmp_path)
    assert after.provenance["weights"] != before.provenance["weights"]
    assert not torch.equal(after.self_attention, before.self_attention)
    weight[place] = kept
    assert measure(model, [inputs], parts=tmp_path).provenance == before.provenance
    part = weight[1:8]  # where no whole number of 8 bytes begins
    assert provenance._sum_of_bits(part) == provenance._sum_of_bits(part.clone())


def test_a_journal_of_images_of_another_shape_or_made_ready_otherwise_is_refused(tmp_path):
    """Their bytes are the same: 16 x 8 pixels and 8 x 16."""
    model, processor = load_model("digit-scenes")
    bytes_ = np.random.default_rng(0).integers(0, 256, 16 * 8 * 3, dtype=np.uint8)
    wide, high = (Sample("0", "what?", Image.fromarray(bytes_.reshape(*size, 3))) for size in ((8, 16), (16, 8)))
    run = functools.partial(evaluate, model, processor, methods={}, journal=tmp_path / "journal", max_new_tokens=1)
    run([wide])
    with pytest.raises(ValueError, match="other tasks"):
        run([high])
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(ValueError, match="other settings"):
        run([wide])
    processor.image_processor = type(processor.image_processor).from_pretrained(assets.folder("model"))
    run([wide])
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match="other settings"):
        run([wide])
