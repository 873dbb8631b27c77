"""The two accountings of FLOPs, by hand."""

from fitprune.costs.flops import prefill_flops, visual_macs
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint, VisionSizes

SHAPE = ModelFingerprint("llava", DecoderSizes(4, 32, 48, 4, 2, 8, 97), VisionSizes(2, 16, 24, 32, 8))


def test_the_paper_formula_by_hand():
    shape = DecoderSizes(layers=1, hidden=3, intermediate=5, heads=1, kv_heads=1, head_dim=3)
    n, k, d, m = 7, 2, 3, 5
    expected = 3 * n * d * d + 2 * n * n * d + (n - k) * d * d + 3 * (n - k) * d * m
    assert visual_macs(shape, n, [k]) == expected


def test_prefill_flops_by_parts():
    parts = prefill_flops(SHAPE, 16, [0, 8, 0, 4], text_before=2, text_after=5, logits=1)
    assert parts.head == 2 * 32 * 97
    width = 4 * 32  # heads of 8 columns, then 2 of their log-sum-exp, rounded up to 32
    assert parts.scoring == 2 * width * (16 + 5) * 16 + 2 * width * (8 + 5) * 8  # rows after the text, visual keys
    assert parts.total == parts.vision + parts.decoder + parts.scoring + parts.head
