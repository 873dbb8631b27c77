"""Received attention by the Triton kernels: in the interpreter, as compiled for GPUs, and on one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fitprune.families.images import images_of
from fitprune.scoring import received
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax
from helpers.kernel_cases import CASES, COMPILED, FINDINGS

triton_needed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
cuda_needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def elsewhere(command, folder):
    """What tests/kernel_cases.py prints. `folder` gets what Triton compiles, so that nothing is from earlier runs."""
    run = [sys.executable, Path(__file__).parents[1] / "helpers" / "kernel_cases.py", command]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return elsewhere("run", tmp_path_factory.mktemp("triton"))


@triton_needed
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_give_what_blocks_give(case, found):
    assert found[case] < (1 if torch.cuda.is_available() else 0.1)  # a GPU's exponentials are approximate


@triton_needed
@pytest.mark.parametrize("finding", FINDINGS)
def test_the_kernels_keep_to(finding, found):
    assert found[finding]


@triton_needed
def test_the_kernels_compile_for_gpus(tmp_path):
    for (capability, dtype, width, _), kernels in zip(COMPILED, elsewhere("compile", tmp_path), strict=True):
        for name, made in kernels.items():
            what = f"{name}, {capability}, {dtype}, {width}: {made}"
            assert made["shared"] <= 99 * 1024, what
            assert made["stack"] <= 512, what
            assert made["tensor cores"] == (dtype == "bf16"), what  # which would round fp32 to tf32


def test_the_kernels_are_used_where_they_can_be(monkeypatch):
    def asked(width=128, dtype=torch.bfloat16, cuda=True, **softmax):
        query = SimpleNamespace(is_cuda=cuda, shape=(1, 2, 9, width), element_size=lambda: dtype.itemsize, device="gpu")
        return received._fused(query, Softmax(1.0, **softmax))

    works = SimpleNamespace(usable=lambda device: device == "gpu")
    monkeypatch.setitem(sys.modules, "fitprune.scoring.triton_kernels", works)
    monkeypatch.setattr(received, "_has_triton", lambda: True)
    assert asked()
    assert asked(256, torch.float32, window=7, softcap=2.0, valid=torch.ones(1, 9), sinks=torch.ones(2))
    assert not asked(257)
    assert not asked(dtype=torch.float64)
    assert not asked(cuda=False)
    assert not asked(mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    works.usable = lambda device: False
    assert not asked()
    monkeypatch.setattr(received, "_has_triton", lambda: False)
    monkeypatch.setitem(sys.modules, "fitprune.scoring.triton_kernels", None)  # importing it raises
    assert not asked()


def test_fitprune_does_not_import_the_kernels():
    code = (
        "import sys, fitprune, fitprune.scoring.received; assert 'fitprune.scoring.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@triton_needed
def test_where_triton_cannot_compile_blocks_are_used_and_that_is_told():
    code = (
        "import logging, types, torch, triton\n"
        "from fitprune.scoring.triton_kernels import usable\n"
        "logging.basicConfig()\n"
        "def fail(): raise RuntimeError('Failed to find C compiler.')\n"
        "torch.cuda.get_device_capability = lambda device: (9, 0) if device == 'new' else (7, 5)\n"
        "triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=fail))\n"
        "assert not usable('old') and not usable('new') and not usable('new')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("Failed to find C compiler") == 1


def large(groups, heads, dtype=torch.bfloat16):
    """Query, key, image, question of one prompt with 2,880 visual tokens among 2,944."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (torch.randn(1, n, 2944, 128, generator=generator, device="cuda").to(dtype) for n in (heads, groups))
    visual = torch.zeros(1, 2944, dtype=torch.bool, device="cuda")
    visual[:, 20:2900] = True
    return query * 1.5, key * 1.5, images_of(visual), text_after(visual, None)


@pytest.mark.gpu
@cuda_needed
@triton_needed
@pytest.mark.parametrize(("heads", "groups"), [(32, 32), (28, 4)])
def test_on_cuda_a_large_prompt_gives_what_blocks_give(heads, groups, monkeypatch):
    query, key, image, question = large(groups, heads)
    softmax = Softmax(128**-0.5)
    assert received._fused(query, softmax)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = received_attention(query, key, image, question, softmax)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20
    again = received_attention(query, key, image, question, softmax)
    monkeypatch.setattr(received, "_fused", lambda *_: False)
    exact = received_attention(query.float(), key.float(), image, question, softmax)
    rounded = received_attention(query, key, image, question, softmax)  # its products are rounded to bf16
    for name in ("self_attention", "cross_attention"):
        assert torch.equal(getattr(again, name), getattr(found, name))
        assert torch.allclose(getattr(found, name), getattr(exact, name), rtol=1e-3, atol=1e-8)
        assert torch.allclose(getattr(found, name), getattr(rounded, name), rtol=0.05, atol=1e-6)


@pytest.mark.gpu
@cuda_needed
@triton_needed
def test_on_cuda_fp32_is_fp32(monkeypatch):
    query, key, image, question = large(8, 8, torch.float32)
    found = received_attention(query, key, image, question, Softmax(128**-0.5))
    monkeypatch.setattr(received, "_fused", lambda *_: False)
    exact = received_attention(query.double(), key.double(), image, question, Softmax(128**-0.5))
    assert torch.allclose(found.self_attention, exact.self_attention, rtol=1e-4, atol=1e-8)
    assert torch.allclose(found.cross_attention, exact.cross_attention, rtol=1e-4, atol=1e-8)


@pytest.mark.gpu
@cuda_needed
@triton_needed
def test_on_cuda_the_rows_of_ranks_add_up():
    query, key, image, question = large(4, 28)
    at = query, key, image, question, Softmax(128**-0.5)
    whole = received_attention(*at)
    ranks = [SimpleNamespace(number=number, count=4, sum=torch.clone) for number in range(4)]
    shares = [received_attention(*at, ranks=each) for each in ranks]
    for name in ("self_attention", "cross_attention"):
        total = torch.stack([getattr(share, name) for share in shares]).sum(0)
        assert torch.allclose(total, getattr(whole, name), rtol=1e-4, atol=1e-8)
