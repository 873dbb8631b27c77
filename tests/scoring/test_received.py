"""Received attention against full maps, and what it costs in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitprune.families.images import images_of
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax
from helpers.models import IMAGE, tiny_inputs, tiny_model


def full_map_reference(query, key, image, question, scaling, valid):
    """The definition, written with whole maps: softmax, maximum over heads, mean over query rows."""
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * scaling
    hidden = torch.triu(torch.ones(length, past + length, dtype=torch.bool), past + 1) | ~valid[:, None, None]
    weights = scores.masked_fill(hidden, -1e300).softmax(-1).amax(1)[..., past:]
    own, cross = torch.zeros(2, batch, length, dtype=torch.float64)
    for row in range(batch):
        for number in range(int(image[row].max()) + 1):
            member = image[row] == number
            own[row] += weights[row][member].mean(0) * member
        if question[row].any():
            cross[row] = weights[row][question[row]].mean(0) * (image[row] >= 0)
    return own, cross


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [9, 70, 201])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 37])
def test_received_attention_equals_the_full_map(groups, length, padded, past):
    torch.manual_seed(length + groups)
    query, key = torch.randn(4, 4, length, 8) * 2, torch.randn(4, groups, past + length, 8) * 2
    visual = torch.zeros(4, length, dtype=torch.bool)  # the last sample has no image
    for row, (first, last) in enumerate([(2, length - 2), (3, length // 2 + 2), (4, length - 3)]):
        visual[row, first:last] = True
    visual[1, 5] = False  # text between images
    valid = torch.ones(4, past + length, dtype=torch.bool)
    if padded:
        valid[0, :2] = valid[2, :1] = False  # left
        valid[1, -1] = False  # right
        valid[1, : past // 2] = False
    image, question = images_of(visual), text_after(visual, valid[:, past:])
    found = received_attention(query, key, image, question, Softmax(0.3, valid if padded else None))
    own, cross = full_map_reference(query, key, image, question, 0.3, valid)
    assert torch.allclose(found.self_attention.double(), own, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.cross_attention.double(), cross, rtol=1e-5, atol=1e-7)


def test_it_equals_the_eager_models_own_maps(family):
    from fitprune import measure

    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2)
    stats = measure(model, [inputs])
    eager = tiny_model(family, attention="eager")
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
    ids = inputs["input_ids"]
    for layer, weights in enumerate(maps):
        for row in range(2):
            visual = ids[row] == IMAGE
            last = torch.nonzero(visual).max()
            strongest = weights[row].amax(0)
            own, cross = strongest[visual].mean(0)[visual], strongest[last + 1 :].mean(0)[visual]
            one = stats.select([row])
            assert torch.allclose(one.self_attention[layer], own, rtol=1e-5, atol=1e-7)
            assert torch.allclose(one.cross_attention[layer], cross, rtol=1e-5, atol=1e-7)


def test_bfloat16_is_scored_in_fp32():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4, 60, 16, dtype=torch.bfloat16)
    visual = torch.zeros(1, 60, dtype=torch.bool)
    visual[:, 5:50] = True
    image, question = images_of(visual), text_after(visual, None)
    found = received_attention(query, key, image, question, Softmax(0.25))
    own, _ = full_map_reference(query, key, image, question, 0.25, torch.ones(1, 60, dtype=torch.bool))
    assert found.self_attention.dtype == torch.float32
    assert torch.allclose(found.self_attention.double(), own, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_log_sum_exp_in_fp32_serves_any_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 40, 16, generator=generator).to(dtype)
    visual = torch.zeros(1, 40, dtype=torch.bool)
    visual[:, 3:30] = True
    products = 0.25 * query.float() @ key.float().transpose(2, 3)
    lse = products.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).logsumexp(-1)
    at = query, key, images_of(visual), text_after(visual, None), Softmax(0.25)
    told, made = received_attention(*at, lse), received_attention(*at)
    assert torch.allclose(told.self_attention, made.self_attention, rtol=0.02, atol=1e-4)
    assert torch.allclose(told.cross_attention, made.cross_attention, rtol=0.02, atol=1e-4)


PEAK = """
import sys
import torch
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax
from fitprune.families.images import images_of
torch.set_num_threads(1)
query, key = torch.randn(2, 1, 32, 3000, 128, dtype=getattr(torch, sys.argv[1]))
visual = torch.zeros(1, 3000, dtype=torch.bool)
visual[:, 40:2920] = True
image, question = images_of(visual), text_after(visual, None)
lse = torch.full((1, 32, 3000), 20.0) if sys.argv[2] == "told" else None

def score(at):
    told = None if lse is None else lse[:, :, at]
    received_attention(query[:, :, at], key[:, :, at], image[:, at], question[:, at], Softmax(0.1), told)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

score(slice(2880, None))  # loads the libraries
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on, not that of loading torch
before = status("VmRSS:")
score(slice(None))
print(status("VmHWM:") - before)
"""


# No other system resets a process's peak memory: there the bound is not measured.
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "lse", "most"),
    [("bfloat16", "told", 64), ("float32", "told", 64), ("bfloat16", "unknown", 110), ("float32", "unknown", 64)],
)
def test_extra_megabytes_at_2880_tokens_and_32_heads(dtype, lse, most):
    """A map of rows x keys x heads would be 527 MiB in bf16, and 1,055 in fp32."""
    done = subprocess.run([sys.executable, "-c", PEAK, dtype, lse], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < most  # a block alone is more than a megabyte: less means nothing was measured


def test_fewer_keys_than_queries_are_refused():
    with pytest.raises(ValueError, match="5 queries against 4 keys"):
        received_attention(
            torch.randn(1, 2, 5, 4),
            torch.randn(1, 2, 4, 4),
            torch.zeros(1, 5, dtype=torch.long),
            torch.ones(1, 5, dtype=torch.bool),
            Softmax(1),
        )


@pytest.mark.parametrize("what", ["plain", "valid", "window", "bool mask", "float mask", "softcap", "sinks"])
def test_weights_are_made_as_a_layer_makes_them(what):
    generator = torch.Generator().manual_seed(0)
    batch, heads, length, past = 2, 3, 9, 4
    keys = past + length
    products = torch.randn(batch, heads, length, keys, generator=generator) * 3
    rows = torch.arange(length)
    seen = torch.arange(keys) <= past + rows[:, None]
    logits, given = products.clone(), {}
    if what == "valid":
        given["valid"] = torch.rand(batch, keys, generator=generator) > 0.2
        given["valid"][:, past:] = True
        seen = seen & given["valid"][:, None, None]
    elif what == "window":
        given["window"] = 3
        seen = seen & (torch.arange(keys) > past + rows[:, None] - 3)
    elif what.endswith("mask"):
        seen = torch.rand(batch, 1, length, keys, generator=generator) > 0.4
        seen[..., 0] = True
        given["mask"] = seen if what == "bool mask" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    elif what == "softcap":
        given["softcap"], logits = 2.0, 2 * torch.tanh(products / 2)
    logits = logits.masked_fill(~seen, -torch.inf)
    if what == "sinks":
        given["sinks"] = torch.randn(heads, generator=generator)
        column = given["sinks"].view(1, heads, 1, 1).expand(batch, -1, length, 1)
        expected = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    else:
        expected = logits.softmax(-1)
    softmax = Softmax(1.0, **given)
    assert torch.allclose(softmax.weights(products, rows, past), expected, atol=1e-6)
    assert softmax.causal == (not what.endswith("mask"))
