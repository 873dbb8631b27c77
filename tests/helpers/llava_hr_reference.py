"""Run the LLaVA-HR authors' own modules at reduced width and keep what they give, for tests/test_llava_hr.py.

    python tests/llava_hr_reference.py CHECKOUT

CHECKOUT: github.com/luogen1996/LLaVA-HR at commit 1212ffbb0772c7c97fd3ce625e53fee6e6676536. Needs the versions that it
pins, beside any torch: timm==0.9.11 transformers==4.31.0 sentencepiece "numpy<2". Nothing of it is copied: what is kept
are names and shapes of weights, and numbers. Weights and images come from seeds (`weight`, `image`), which the tests
use too; the towers that it would download are replaced by small ones of its own classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

DATA = Path(__file__).parents[1] / "data"
COMMIT = "1212ffbb0772c7c97fd3ce625e53fee6e6676536"
CLIP = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
LARGE, XXLARGE = "convnext_large_mlp.clip_laion2b_ft_320", "convnext_xxlarge.clip_laion2b_soup"
DEPTHS, WIDTHS = [2, 1, 3, 1], [8, 16, 24, 40]
CASES = {  # name -> (ConvNeXt, image size, vision frozen as in the first stage of training)
    "1024": (LARGE, 1024, False),
    "768": (LARGE, 768, False),
    "384": (LARGE, 384, False),
    "384-frozen": (LARGE, 384, True),
    "x-1024": (XXLARGE, 1024, False),
    "x-1536": (XXLARGE, 1536, False),
}
KEPT = 13  # one visual token in this many is kept
PHOTOS = [(300, 500), (640, 427), (256, 256), (1500, 1100)]  # (height, width)
PROMPTS = [
    "<image>\nWhat is shown?",
    "Compare <image> and <image>: same?",
    "No image here",
    "<image><image> both?",
    "at the end<image>",
    "<image>\n<image>\n",
    " <image> behind a space",
    " no image, behind a space",
]
CONVERSATIONS = [["What is it?"], ["What is it?", "A cat.", "Sure?"]]


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A seeded weight of a size that keeps activations near one."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        values /= math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):  # of a norm, or a block's scale
        values = 1 + 0.2 * values
    else:
        values *= 0.1
    return torch.from_numpy(values.astype(np.float32))


def image(size: int) -> torch.Tensor:
    """A seeded image, [1, 3, size, size]: 64 x 64 values, each over a square of pixels, small for eps to show."""
    small = 0.1 * np.random.RandomState(2403).standard_normal((1, 3, 64, 64)).astype(np.float32)
    return torch.from_numpy(small.repeat(size // 64, 2).repeat(size // 64, 3))


def photo(number: int) -> Image.Image:
    """A seeded picture of smooth colours, with an edge."""
    height, width = PHOTOS[number]
    small = np.random.RandomState(number).randint(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def settings(slow: str, size: int, frozen: bool) -> dict:
    """What the authors' config.json says beside Llama's own."""
    return {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "vision_tower_slow": slow,
        "is_multipath_encoder": True,
        "input_image_size": size,
        "freeze_vision": frozen,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": CLIP["hidden_size"],
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import transformers

    folder = Path(tempfile.mkdtemp())
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)).save_pretrained(folder / "clip")
    transformers.CLIPImageProcessor().save_pretrained(folder / "clip")
    from llava_hr.conversation import conv_templates
    from llava_hr.mm_utils import process_images, tokenizer_image_token
    from llava_hr.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava_hr.model.multimodal_encoder import convnext, convnext_encoder

    # The authors' constructors name sizes and downloads; the classes are theirs.
    def small(eps, **more):
        return lambda name: convnext.ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=8, norm_eps=eps, **more)

    convnext_encoder.convnext_large_mlp = small(None, head_hidden_size=24)
    convnext_encoder.convnext_xxlarge = small(1e-5)
    convnext_encoder.ConvNextVisionTower.hidden_size = property(lambda self: WIDTHS[-1])

    kept, cases = {}, {}
    for name, (slow, size, frozen) in CASES.items():
        config = LlavaConfig(**TEXT, **settings(slow, size, frozen))
        config.mm_vision_tower = str(folder / "clip")
        model = LlavaLlamaForCausalLM(config).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        seeded = {
            key: weight(key, tuple(shape)) if value.is_floating_point() and "inv_freq" not in key else value
            for (key, value), shape in zip(model.state_dict().items(), shapes.values(), strict=True)
        }
        model.load_state_dict(seeded)
        with torch.no_grad():
            features = model.get_model().get_vision_tower()(image(size))
            projected = model.get_model().mm_projector(features)
            ids = torch.tensor([[1, 5, 6, 7, -200, 9, 10, 11, 12, 13]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), images=image(size)).logits
        kept[f"{name}.features"] = features[0, ::KEPT].clone()
        kept[f"{name}.projected"] = projected[0, ::KEPT].clone()
        kept[f"{name}.logits"] = torch.cat([logits[0, :-5:97], logits[0, -5:]])
        cases[name] = {"tokens": features.shape[1], "config": settings(slow, size, frozen), "weights": shapes}
        print(name, tuple(features.shape), tuple(logits.shape), float(features.std()), float(logits.std()))

    processor = model.get_model().get_vision_tower().image_processor
    processor.size, processor.crop_size = 768, {"height": 768, "width": 768}
    options = types.SimpleNamespace(image_aspect_ratio="pad")
    for number in range(len(PHOTOS)):
        pixels = process_images([photo(number)], processor, options)
        kept[f"pixels.{number}"] = pixels[0, :, ::24, ::24].clone().contiguous()

    train_tokenizer(folder)
    conversations = []
    for turns in CONVERSATIONS:
        template = conv_templates["vicuna_v1"].copy()
        for number, text in enumerate([*turns, None]):
            template.append_message(template.roles[number % 2], text)
        conversations.append(template.get_prompt())
    ids = {}
    for legacy in (False, True):  # either may stand beside a checkpoint
        transformers.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=legacy).save_pretrained(
            folder / str(legacy)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / str(legacy), use_fast=False)
        ids[str(legacy)] = [tokenizer_image_token(text, tokenizer) for text in [*PROMPTS, *conversations]]

    from safetensors.torch import save_file

    DATA.mkdir(exist_ok=True)
    save_file(kept, DATA / "llava_hr.safetensors", metadata={"commit": COMMIT})
    base = cases["1024"]["weights"]
    for name, case in cases.items():  # what differs from the first
        if name != "1024":
            shapes = case.pop("weights")
            case["without"] = [key for key in base if key not in shapes]
            case["instead"] = {key: shape for key, shape in shapes.items() if base.get(key) != shape}
    record = {
        "commit": COMMIT,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "timm": "0.9.11"},
        "text": TEXT,
        "cases": cases,
        "token_ids": ids,
        "prompts": [digest(text) for text in conversations],
    }
    (DATA / "llava_hr.json").write_text(json.dumps(record) + "\n")


def train_tokenizer(folder: Path) -> None:
    """A small SentencePiece model of Llama's kind: byte fallback, the same special tokens."""
    import sentencepiece

    text = [*__doc__.splitlines(), *PROMPTS, *(turn for turns in CONVERSATIONS for turn in turns)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=TEXT["vocab_size"], model_type="bpe",
        byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (DATA / "llava_hr.model").write_bytes(made.getvalue())
    (folder / "tokenizer.model").write_bytes(made.getvalue())


if __name__ == "__main__":
    main(sys.argv[1])
