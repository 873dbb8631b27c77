"""LLaVA's own prompts and images, held against what its code gives (run outside of this repository), and when."""

import functools
import hashlib
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers import AutoProcessor

from fitprune import make_batches
from fitprune._support import assets
from fitprune.calibration.batches import usable
from fitprune.calibration.entry import BadSample
from fitprune.calibration.prompts import format_prompt
from fitprune.calibration.protocol import Protocol, protocol_for, square
from fitprune.calibration.samples import Sample
from fitprune.families import llava_hr
from helpers import families as F
from helpers import vicuna
from helpers.questions import assert_same

# What haotian-liu/LLaVA at c121f04 gives: tokenizer_image_token of conv_vicuna_v1's prompts, with vicuna.tokenizer(),
# an image as -200; and expand2square of `noise`, with CLIP's mean colour. {size: hash}: (width, height).
IDS = "ff8e9efa6098af3c4ac169eea7a80570069a242010ac12d7e6a0cae0189f23bc"
SQUARES = {
    (7, 4): "a56ad5deddea8a53",
    (4, 7): "1abd7544b3a405cb",
    (5, 5): "cd10c35a94b9d2d2",
    (8, 3): "1d93f493b4f561a7",
    (3, 8): "7c3e2ff30091eabc",
    (40, 1): "9d0f13ee1f12e689",
}
MEAN = (122, 116, 104)
TEXT = F.TEXT | {"vocab_size": 800}
MODELS = {
    "llava": tf.LlavaForConditionalGeneration,
    "llava_next": tf.LlavaNextForConditionalGeneration,
    "llava_hr": llava_hr.LlavaHrForConditionalGeneration,
}


def processor_of(kind, tokens=None, template=vicuna.TEMPLATE):
    make = {"llava": F.llava_processor, "llava_next": F.llava_next_processor, "llava_hr": F.llava_hr_processor}[kind]
    processor = make(tokens or vicuna.tokenizer())
    processor.chat_template = template
    return processor


def config_of(kind, text=tf.LlamaConfig):
    ids = F.Ids(vicuna.tokenizer())
    if kind == "llava_hr":
        config = F.llava_hr_config(ids)
        config.text_config.vocab_size = TEXT["vocab_size"]
        return config
    more = {"image_seq_length": 16} if kind == "llava" else {"image_grid_pinpoints": F.PINPOINTS}
    make = tf.LlavaConfig if kind == "llava" else tf.LlavaNextConfig
    return F.llava_config(make, text(**TEXT), ids, **more)


def chosen(name=None, kind="llava", processor=None, config=None):
    model = SimpleNamespace(config=config or config_of(kind))
    return protocol_for(name, processor or processor_of(kind), model)


def noise(size):
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def slice_samples():
    """The questions of every benchmark; those of text alone come last."""
    pairs = [(name, text) for name, own in vicuna.QUESTIONS.items() for text in own]
    return [
        Sample(number, text, None if name == "scienceqa-text" else F.picture(number, (30 + number, 40)))
        for number, (name, text) in enumerate(pairs)
    ]


def rows_of(batches, image_id):
    """Ids without padding, an image as one -200."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padding is on the left
            runs = itertools.groupby(ids[mask.bool()].tolist())
            yield [n for token, run in runs for n in ([-200] if token == image_id else [token] * len([*run]))]


# -- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("kind", MODELS)
def test_ids_are_those_of_llavas_own_code(kind, scheme, batch_size):
    processor = processor_of(kind, vicuna.tokenizer(scheme=scheme))
    found, protocol = slice_samples(), chosen("llava", kind)
    rows = {}
    for alone in (False, True):
        part = [sample for sample in found if (sample.image is None) == alone]
        batches = make_batches(part, processor, batch_size=batch_size, protocol=protocol)
        rows |= zip([sample.id for sample in part], rows_of(batches, processor.image_token_id), strict=True)
    lines = [" ".join(map(str, rows[number])) for number in sorted(rows)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == IDS


def test_the_processors_own_ids_lack_the_blank_piece_after_an_image():
    """Of a newer tokenizer of LLaVA's; LLaVA-HR's processor writes it by itself."""
    for kind in MODELS:
        processor = processor_of(kind, template=llava_hr.processing.CHAT_TEMPLATE)
        (sample,) = (sample for sample in slice_samples() if sample.text.startswith("Can you"))
        own, llava = (
            next(make_batches([sample], processor, protocol=protocol)) for protocol in (None, chosen("llava", kind))
        )
        blank = processor.tokenizer.convert_tokens_to_ids(vicuna.BLANK)
        places = (llava["input_ids"][0] == processor.image_token_id).nonzero()
        ids = llava["input_ids"][0].tolist()
        if kind != "llava_hr":
            assert ids.pop(places[-1] + 1) == blank
        assert own["input_ids"][0].tolist() == ids


def test_ids_and_mask_alone_are_changed_and_token_types_left_out():
    processor = processor_of("llava_next")
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    found = slice_samples()[:3]
    own, llava = (
        next(make_batches(found, processor, batch_size=3, protocol=protocol))
        for protocol in (Protocol(), chosen("llava", "llava_next"))
    )
    assert own.keys() - llava.keys() == {"token_type_ids"}
    assert llava["input_ids"].shape == llava["attention_mask"].shape
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(own[name], llava[name])


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_8_gives_the_answers_of_batches_of_1(kind):
    model = F.build(MODELS[kind], config_of(kind))
    processor = processor_of(kind)
    protocol = protocol_for(None, processor, model)
    assert protocol.name == "llava"
    for alone in (False, True):
        part = [sample for sample in slice_samples() if (sample.image is None) == alone][:8]
        answers = [
            row.tolist()
            for size in (1, 8)
            for batch in make_batches(part, processor, batch_size=size, protocol=protocol, model=model)
            for row in model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
        ]
        assert answers[: len(part)] == answers[len(part) :]
        assert len({*map(tuple, answers)}) == len(part)


# -- text alone ----------------------------------------------------------------------------------------------------


def test_a_question_of_text_alone_is_written_without_an_image():
    processor = processor_of("llava")
    write = functools.partial(format_prompt, processor, "x", has_image=False)
    assert write(None) == "USER: x ASSISTANT:"
    assert write("USER: <image>\n{question} ASSISTANT:") == "USER: x ASSISTANT:"
    assert write("USER: {question} <image> ASSISTANT:") == "USER: x  ASSISTANT:"
    assert write("<image>\n\n{question}") == "\nx"
    prompt = write(chosen("llava").template)
    assert prompt.startswith("A chat between a curious user and an artificial intelligence assistant. The assistant")
    assert prompt.endswith("polite answers to the user's questions. USER: x ASSISTANT:")
    with pytest.raises(ValueError, match="no visual token in it"):
        write("{question}")


@pytest.mark.parametrize(
    "options",
    [{}, {"protocol": Protocol()}, {"prompt_template": "<image>\n{question} A:"}, {"protocol": "llava"}],
    ids=["none", "chat", "template", "llava"],
)
def test_batches_of_text_alone(caplog, options):
    processor = processor_of("llava")
    options = {**options, **({"protocol": chosen("llava")} if options.get("protocol") == "llava" else {})}
    alone, seen = Sample("a", "what?", None), Sample("b", "what is this?", F.picture(0, (30, 40)))
    batch = next(make_batches([alone, alone], processor, batch_size=2, **options))
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert processor.image_token_id not in batch["input_ids"]
    assert len(list(make_batches([alone, seen], processor, **options))) == 2
    with pytest.raises(
        ValueError, match=r"samples 'a' to 'b' are one batch, and some .* must all have one or none"
    ) as e:
        next(make_batches([alone, seen], processor, batch_size=2, **options))
    assert not isinstance(e.value, BadSample)
    assert usable([alone, seen, Sample("c", "</s>", None)], processor, **options) == [alone, seen]
    assert "skipped: sample 'c': question '</s>' contains" in caplog.text


def test_the_bundled_model_answers_text_alone():
    processor = AutoProcessor.from_pretrained(assets.folder("model"))
    batch = next(make_batches([Sample("a", "what?", None)], processor))
    assert batch.keys() == {"input_ids", "attention_mask"}


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SQUARES)
def test_squares_are_those_of_llavas_own_code(size):
    padded = square(noise(size), MEAN)
    assert padded.size == (max(size), max(size))
    assert hashlib.sha256(padded.tobytes()).hexdigest()[:16] == SQUARES[size]
    assert square(noise(size), None).size == size


def test_images_are_padded_where_the_authors_did_and_once():
    sample = Sample("a", "what?", noise((60, 20)))
    bare = processor_of("llava")
    padding = processor_of("llava")
    padding.image_processor = tf.models.llava.image_processing_pil_llava.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size=F.SQUARE
    )
    pixels = {}
    for name, processor in (("ours", bare), ("theirs", padding)):
        protocol = chosen("llava", processor=processor)
        assert protocol.background == (MEAN if name == "ours" else None)
        pixels[name] = next(make_batches([sample], processor, protocol=protocol))["pixel_values"]
    expected = bare.image_processor(square(sample.image, MEAN), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels["ours"], expected)
    torch.testing.assert_close(pixels["theirs"], expected, atol=0.05, rtol=0)
    plain = next(make_batches([sample], bare))["pixel_values"]  # its centre alone
    assert not torch.allclose(plain, expected, atol=0.5)
    for kind in ("llava_next", "llava_hr"):
        assert chosen("llava", kind).background is None
    for ratio, background in (("pad", MEAN), ("square", None), ("anyres", None), (None, None)):
        config = config_of("llava")
        config.image_aspect_ratio = ratio
        assert chosen("llava", config=config).background == background


def test_llavas_pictures_are_converted_and_nothing_else(tmp_path):
    """As Image.open(...).convert("RGB"): what is transparent shows the colour beneath, and EXIF turns nothing."""
    image = Image.new("RGBA", (40, 20), (200, 10, 10, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    expected = Image.open(tmp_path / "a.png").convert("RGB")
    assert expected.getpixel((0, 0)) == (200, 10, 10)
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png")):
        sample = Sample("a", "what?", source)
        assert sample.load_image(as_shown=False).tobytes() == expected.tobytes()
        assert sample.load_image().size == (20, 40)
        protocol = chosen("llava")
        pixels = next(make_batches([sample], processor_of("llava"), protocol=protocol))["pixel_values"]
        padded = processor_of("llava").image_processor(square(expected, MEAN), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, padded)


# -- which ---------------------------------------------------------------------------------------------------------


def test_the_default_is_llavas_for_vicuna_and_the_processors_own_elsewhere():
    for kind in MODELS:
        assert chosen(None, kind).name == "llava"
        assert chosen("chat", kind) == Protocol("chat", None, None)
    inst, late = "[INST] <image>\n{{ messages[0].content[1].text }} [/INST]", vicuna.TEMPLATE + "{{ ' Sure' }}"
    for template in (None, inst, late):
        processor = processor_of("llava", template=template)
        assert chosen(None, processor=processor) == Protocol()
        assert chosen("llava", processor=processor).name == "llava"
    assert chosen(None, config=config_of("llava", tf.MistralConfig)) == Protocol()
    byte_level = processor_of("llava", F.tokenizer([], {"image_token": "<image>"}))
    assert chosen(None, processor=byte_level) == Protocol()
    bundled = AutoProcessor.from_pretrained(assets.folder("model"))
    config = tf.AutoConfig.from_pretrained(assets.folder("model"))
    assert protocol_for(None, bundled, SimpleNamespace(config=config)) == Protocol()


def test_chat_changes_nothing():
    processor = processor_of("llava")
    found = slice_samples()[:3]
    batch, same = (next(make_batches(found, processor, batch_size=3, protocol=p)) for p in (None, chosen("chat")))
    assert_same(batch, same)
    template = "{question} <image>"
    one, two = (
        next(make_batches(found, processor, batch_size=3, protocol=p, prompt_template=template))
        for p in (None, chosen("chat"))
    )
    assert_same(one, two)


def test_what_cannot_be_had_is_refused_with_a_remedy():
    def refused(message):
        return pytest.raises(ValueError, match="^" + re.escape(message) + "$")

    with refused("protocol='vicuna': must be one of llava, chat, or None for the model's own"):
        chosen("vicuna")
    row = next(row for row in F.ROWS if row.name == "qwen2_vl")
    with refused("protocol='llava': the model is a qwen2_vl: must be one of llava, llava_next, llava_hr; use 'chat'"):
        protocol_for("llava", row.processor(), row.make_model())
    bundled = AutoProcessor.from_pretrained(assets.folder("model"))
    with pytest.raises(ValueError, match=r"begins a text with \[.*\]: must be BOS and '\u2581'.*; use 'chat'$"):
        chosen("llava", processor=bundled)
    processor, found = processor_of("llava"), slice_samples()[:1]
    with refused("protocol='llava': must be a Protocol, as protocol_for returns it, or None"):
        make_batches(found, processor, protocol="llava")
    with refused("prompt_template='<image> {question}': protocol='llava' has its own; leave one out"):
        make_batches(found, processor, protocol=chosen("llava"), prompt_template="<image> {question}")
