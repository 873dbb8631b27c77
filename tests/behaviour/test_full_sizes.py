"""The cost model against models at full size, on the meta device: no weights, but the real classes."""

import pytest
import torch

from fitprune.costs import flops
from fitprune.families.config import fingerprint_of
from helpers.full_sizes import FULL_SIZES, TEXT_TOKENS, build, hand_flops, prefill

ENTRIES = pytest.mark.parametrize("entry", FULL_SIZES, ids=lambda entry: entry.name.replace(" ", "-"))


@pytest.fixture(scope="session")
def built():
    """Each entry's model, built when first asked for."""
    models = {}

    def get(entry):
        if entry.name not in models:
            models[entry.name] = build(entry)
        return models[entry.name]

    return get


@ENTRIES
def test_the_model_has_the_published_number_of_parameters(entry, built):
    counted = sum(parameter.numel() for parameter in built(entry).parameters())
    assert counted == pytest.approx(entry.parameters, rel=0.005)
    if entry.exact:
        assert counted == entry.parameters


@ENTRIES
def test_the_decoder_has_the_published_shape_in_config_and_weights(entry, built):
    model, shape = built(entry), entry.decoder
    found = fingerprint_of(model.config).decoder
    assert found == shape
    assert found.vocab == shape.vocab  # which equality leaves out
    layers = model.model.language_model.layers
    assert len(layers) == shape.layers
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.weight.shape == (q, shape.hidden)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (kv, shape.hidden)
        assert attention.o_proj.weight.shape == (shape.hidden, q)
        assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (shape.intermediate, shape.hidden)
        assert mlp.down_proj.weight.shape == (shape.hidden, shape.intermediate)
    assert model.lm_head.weight.shape == (shape.vocab, shape.hidden)


@ENTRIES
def test_dense_prefill_flops_and_kv_bytes_are_those_that_run(entry, built):
    model = built(entry)
    counted, held = prefill(model, entry.tokens)
    fingerprint = fingerprint_of(model.config)
    dense = [0] * fingerprint.decoder.layers
    cost = flops.prefill_flops(fingerprint, entry.visual_tokens, dense, text_after=TEXT_TOKENS)
    assert cost.scoring == 0
    assert counted == cost.decoder + cost.head == hand_flops(entry.decoder, entry.tokens)
    assert held == flops.kv_bytes(fingerprint.decoder, entry.visual_tokens, dense, text_tokens=TEXT_TOKENS)
    # Keys and values, two bytes each.
    assert held == 2 * 2 * entry.tokens * entry.decoder.layers * entry.decoder.kv_heads * entry.decoder.head_dim


@ENTRIES
def test_the_image_encoder_makes_as_many_visual_tokens(entry, built):
    if entry.reads_grid:  # it mixes devices with "meta"
        vision = built(entry).config.vision_config
        assert entry.visual_tokens == (entry.shape.side // vision.patch_size // vision.spatial_merge_size) ** 2
        return
    pixels = entry.shape.pixels()
    pixels["pixel_values"] = pixels["pixel_values"].to("meta", torch.bfloat16)
    with torch.no_grad():
        features = built(entry).get_image_features(**pixels).pooler_output
    shapes = [image.shape for image in features]
    assert sum(shape[0] for shape in shapes) == entry.visual_tokens
    assert {shape[1] for shape in shapes} == {entry.decoder.hidden}


def test_gemma3_computes_all_pairs_but_holds_no_more_than_its_window(built):
    """Behind 1,023 tokens its sliding layers forget; the products on the meta device are masked, not skipped."""
    entry = next(entry for entry in FULL_SIZES if entry.name == "Gemma3-4B")
    tokens = 4 * entry.visual_tokens + TEXT_TOKENS  # four images
    counted, held = prefill(built(entry), tokens)
    text = built(entry).config.text_config
    sliding = text.layer_types.count("sliding_attention")
    assert (sliding, text.sliding_window) == (29, 1024)
    assert counted == hand_flops(entry.decoder, tokens)
    rows = sliding * (text.sliding_window - 1) + (entry.decoder.layers - sliding) * tokens
    assert held == 2 * 2 * rows * entry.decoder.kv_heads * entry.decoder.head_dim
