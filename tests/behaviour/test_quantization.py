"""Quantized weights: the engine prunes what it is given. Each part runs where its package is installed."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fitprune import PruningRecipe, fit, load_model, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.cli.main import main
from fitprune.families.adapter import adapt
from fitprune.families.quantization import QUANTIZATIONS, quantization_config
from helpers.models import Oracle, greedy_logits, tiny_inputs, tiny_model

KEEP = (1.0, 0.75, 0.75, 0.5, 0.25)
# Of the largest logit. With bitsandbytes a row depends on its batch, in dense models too: in 8 bits, outliers are
# looked for in the whole batch.
NOISE = {"torchao-int8": 1e-5, "bnb-4bit": 2e-3, "bnb-8bit": 2e-2}


@pytest.fixture(params=list(QUANTIZATIONS), scope="module")
def quantization(request):
    pytest.importorskip(QUANTIZATIONS[request.param])
    return request.param


@pytest.fixture(scope="module")
def quantized(quantization):
    model, processor = load_model("digit-scenes", quantization=quantization)
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert type(model.lm_head.weight) is torch.nn.Parameter
    return model, processor, load_samples(assets.folder("test"), samples=4)


def test_an_all_keep_recipe_is_bit_identical_to_the_quantized_model(quantized):
    model, processor, samples = quantized
    inputs = next(make_batches(samples, processor, batch_size=4))
    with torch.no_grad():
        dense = model(**inputs).logits
        with prune(model, PruningRecipe.dense(adapt(model).fingerprint, 144)):
            assert torch.equal(model(**inputs).logits, dense)


def test_a_row_gives_what_its_sample_gives_alone(quantized, quantization):
    model, processor, samples = quantized
    fingerprint = adapt(model).fingerprint
    recipe = PruningRecipe(tuple(1 - 0.1 * layer for layer in range(fingerprint.decoder.layers)), fingerprint, 144)
    with prune(model, recipe), torch.no_grad():
        together = model(**next(make_batches(samples, processor, batch_size=4)), logits_to_keep=1).logits[:, -1]
        for row, sample in zip(together, make_batches(samples, processor), strict=True):
            alone = model(**sample, logits_to_keep=1).logits[0, -1]
            assert (row - alone).abs().max() < NOISE[quantization] * alone.abs().max()
            assert row.argmax() == alone.argmax()


def test_a_quantized_model_is_measured(quantized):
    model, processor, samples = quantized
    stats = measure(model, make_batches(samples, processor, batch_size=4))
    assert 0.6 <= fit(stats, flops_reduction=0.6).cost().flops_reduction < 0.61


def test_a_checkpoint_that_is_quantized_already_needs_no_option(quantized, quantization, tmp_path):
    model, processor, samples = quantized
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    inputs = next(make_batches(samples, processor, batch_size=4))
    weights = [m.model.language_model.layers[0].mlp.up_proj.weight for m in (model, again)]
    assert type(weights[0]) is type(weights[1]) is not torch.nn.Parameter
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_pruning_equals_masking_in_the_quantized_model(family, tmp_path):
    pytest.importorskip("torchao")  # whose rounding does not depend on how many rows there are
    tiny_model(family).save_pretrained(tmp_path)
    config = quantization_config("torchao-int8", torch.float32)
    models = []
    for attention in ("sdpa", "eager"):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, quantization_config=config, device_map={"": "cpu"}, attn_implementation=attention
        ).eval()
        model.generation_config.pad_token_id = 0
        models.append(model)
    model, reference = models
    inputs = tiny_inputs(model, batch=2, pad=(2, 0))
    with prune(model, PruningRecipe(KEEP, adapt(model).fingerprint, 16)):
        pruned, _ = greedy_logits(model, inputs, 4)
    expected, _ = greedy_logits(reference, inputs, 4, oracle=Oracle(reference, KEEP))
    assert torch.allclose(pruned, expected, atol=1e-4)


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
def test_without_its_package_a_quantization_says_what_to_install(name, monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == QUANTIZATIONS[name] else found(n))
    with pytest.raises(ImportError, match=f"pip install {QUANTIZATIONS[name]}"):
        load_model("digit-scenes", quantization=name)
    command = ["measure", "digit-scenes", "--data", "digit-scenes/test", "--samples", "1", "-o", str(tmp_path / "s")]
    assert main([*command, "--quantization", name]) == 1
    assert "pip install" in capsys.readouterr().err
