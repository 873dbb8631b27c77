"""Pictures are written where they should be, and refuse what they cannot show."""

import pytest
import torch
from PIL import Image

from fitprune import PruningRecipe
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes
from fitprune.evaluation.figures import draw_keep_curves, draw_kept_tokens

SHAPE = ModelFingerprint("llava", DecoderSizes(4, 32, 48, 4, 2, 8, 97), VisionSizes(2, 16, 24, 32, 8))


def test_keep_curves_are_a_png(tmp_path):
    draw_keep_curves({"half": PruningRecipe((1.0, 0.5, 0.5, 0.5), SHAPE, 16)}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500


def test_removed_tokens_are_dark(tmp_path):
    image = Image.new("RGB", (40, 40), (250, 250, 250))
    kept = torch.arange(16) < 8
    draw_kept_tokens([(image, "caption", [kept | True, kept])], [0, 1], tmp_path / "kept.png")
    drawn = Image.open(tmp_path / "kept.png").convert("L")
    last = drawn.crop((drawn.width * 2 // 3, 0, drawn.width, drawn.height))
    upper, lower = (
        last.getpixel((last.width // 2, last.height // 3)),
        last.getpixel((last.width // 2, last.height * 4 // 5)),
    )
    assert upper > 200 > lower


def test_tokens_that_form_no_square_are_refused(tmp_path):
    with pytest.raises(ValueError, match="15 visual tokens: must form a square grid"):
        draw_kept_tokens([(Image.new("RGB", (8, 8)), "", [torch.ones(15).bool()])], [0], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
