"""What tests/test_kernels.py needs another process for, each printed as JSON.

    python tests/kernel_cases.py run        small cases of received attention by the kernels, on the GPU where there is
                                            one, else in Triton's interpreter: how far each is from blocks on the CPU
    python tests/kernel_cases.py compile    what the kernels are compiled to for GPUs; none is needed

A process of its own, since Triton looks at TRITON_INTERPRET when a kernel is defined, its own library's among them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fitprune.families.images import images_of
from fitprune.scoring import received as attention
from fitprune.scoring.received import received_attention, text_after
from fitprune.scoring.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and kinds of one call; visual tokens are those of `images`, (first, end) of each, for each sample."""

    dtype: torch.dtype = torch.float32
    heads: int = 2
    groups: int = 2
    length: int = 70
    past: int = 0
    width: int = 64
    images: tuple[tuple[tuple[int, int], ...], ...] = (((5, 50),),)
    left: tuple[int, ...] = ()  # padding of each sample
    right: tuple[int, ...] = ()
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int = 16
    transposed: bool = False  # memory is [B, Q, H, D], and the keys are part of a larger cache


BF16, FP16 = torch.bfloat16, torch.float16
BATCH = (((12, 40),), ((20, 35), (40, 61)), ((2, 64),))  # of different images
CASES = {
    "fp32": Case(),
    "bf16": Case(BF16),
    "fp16": Case(FP16),
    "as long as a block": Case(BF16, length=64),
    "one token": Case(BF16, length=1, past=70, images=(((0, 1),),)),
    "grouped heads": Case(heads=6, groups=2),
    "one group": Case(BF16, heads=4, groups=1),
    "past": Case(past=37),
    "past in bf16, grouped": Case(BF16, heads=4, past=70),
    "padded left": Case(BF16, images=BATCH, left=(11, 19, 0)),
    "padded right": Case(images=BATCH, right=(11, 3, 0)),
    "padded by whole blocks": Case(BF16, length=150, images=(((70, 140),), ((3, 60),)), left=(66, 0), right=(0, 85)),
    "padded past": Case(BF16, past=20, images=BATCH, left=(25, 19, 0)),
    "several images": Case(images=(((3, 20), (22, 40), (41, 60)),)),
    "no question in one sample": Case(BF16, images=(((5, 70),), ((5, 50),))),
    "no image in one sample": Case(images=((), ((5, 50),))),
    "window": Case(window=20, past=9),
    "window larger than a block": Case(BF16, length=150, window=66, images=(((5, 120),),)),
    "softcap": Case(softcap=2.0),
    "softcap in bf16": Case(BF16, softcap=30.0),
    "sinks": Case(sinks=True),
    "sinks, window, padding": Case(BF16, heads=4, sinks=True, window=16, images=BATCH, left=(11, 19, 0)),
    "72 wide": Case(BF16, width=72),
    "80 wide": Case(width=80),
    "128 wide": Case(BF16, width=128),
    "256 wide": Case(heads=1, groups=1, width=256),
    "8 wide": Case(width=8),
    "transposed": Case(BF16, heads=4, images=BATCH, past=5, transposed=True),
    "more blocks than splits": Case(length=150, images=(((5, 120),),), splits=2),
}


def states(case: Case) -> tuple[torch.Tensor, ...]:
    """Make query, key, image, question, valid of a case; valid tells padding, also where there is none."""
    generator = torch.Generator().manual_seed(0)
    batch, keys = len(case.images), case.past + case.length
    shapes = [(batch, case.heads, case.length), (batch, case.groups, keys)]
    query, key = (torch.randn(*shape, case.width, generator=generator).to(case.dtype) for shape in shapes)
    query, key = query * 1.5, key * 1.5
    if case.transposed:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        key = torch.cat([key, key], 2)[:, :, :keys]
    visual = torch.zeros(batch, case.length, dtype=torch.bool)
    for row, images in enumerate(case.images):
        for first, end in images:
            visual[row, first:end] = True
    valid = torch.ones(batch, keys, dtype=torch.bool)
    for row, count in enumerate(case.left):
        valid[row, :count] = False
    for row, count in enumerate(case.right):
        valid[row, keys - count :] = False
    visual &= valid[:, case.past :]
    return query, key, images_of(visual), text_after(visual, valid[:, case.past :]), valid


def softmax_of(case: Case, valid: torch.Tensor, device: torch.device) -> Softmax:
    sinks = torch.linspace(-1, 2, case.heads, device=device, dtype=case.dtype) if case.sinks else None
    padded = valid.to(device) if case.left or case.right else None
    return Softmax(case.width**-0.5, padded, window=case.window, softcap=case.softcap, sinks=sinks)


def off(case: Case, device: torch.device) -> float:
    """Largest error against blocks in fp32 on the CPU, in units of 1e-6 + 1e-4 of the value; infinite for a NaN."""
    from fitprune.scoring import triton_kernels

    query, key, image, question, valid = states(case)
    attention._fused = lambda *_: False
    expected = received_attention(
        query.float(), key.float(), image, question, softmax_of(case, valid, torch.device("cpu"))
    )
    given = [tensor.to(device) for tensor in (query, key, image, question)]
    triton_kernels.SPLITS = case.splits
    attention._fused = lambda *_: True
    found = received_attention(*given, softmax_of(case, valid, device))
    worst = 0.0
    for name in ("self_attention", "cross_attention"):
        ours, theirs = getattr(found, name).cpu(), getattr(expected, name)
        error = (ours - theirs).abs() / (1e-6 + 1e-4 * theirs.abs())
        worst = max(worst, float(error.nan_to_num(nan=torch.inf).max()))
    return worst


def other_findings(device: torch.device) -> dict[str, bool]:
    """What holds beside equality: of rows that see nothing, of values where nothing is looked at, of single samples."""
    from fitprune.scoring.triton_kernels import received_on_gpu

    case = CASES["padded by whole blocks"]
    query, key, image, question, valid = (tensor.to(device) for tensor in states(case))
    weight = torch.stack([(image >= 0).float(), question.float()], 1)
    how = {"scaling": 0.1, "valid": valid}
    all_of_them = received_on_gpu(query, key, image, weight, **how)
    blind = received_on_gpu(query, key, image, torch.ones_like(weight), scaling=0.1, valid=torch.zeros_like(valid))
    padding = ~valid[:, None, :, None]
    spoilt = [states_.masked_fill(padding, torch.nan) for states_ in (query, key)]
    alone = [
        received_on_gpu(query[[row]], key[[row]], image[[row]], weight[[row]], scaling=0.1, valid=valid[[row]])
        for row in range(len(query))
    ]
    attention._fused = lambda *_: True
    softmax = Softmax(0.1, valid)
    whole = received_attention(query, key, image, question, softmax)
    shares = [
        received_attention(
            query, key, image, question, softmax, ranks=SimpleNamespace(number=n, count=2, sum=torch.clone)
        )
        for n in range(2)
    ]
    names = "self_attention", "cross_attention"
    return {
        "two ranks' rows add up": all(
            torch.allclose(sum(getattr(share, name) for share in shares), getattr(whole, name), atol=1e-7)
            and not any(torch.equal(getattr(share, name), getattr(whole, name)) for share in shares)
            for name in names
        ),
        "a row that sees no key gives nothing": not bool(blind.any()),
        "nothing is taken from padding": torch.equal(received_on_gpu(*spoilt, image, weight, **how), all_of_them),
        "a sample alone gives the same bits": torch.equal(torch.cat(alone), all_of_them),
        "two runs give the same bits": torch.equal(received_on_gpu(query, key, image, weight, **how), all_of_them),
    }


FINDINGS = (
    "two ranks' rows add up",
    "a row that sees no key gives nothing",
    "nothing is taken from padding",
    "a sample alone gives the same bits",
    "two runs give the same bits",
)


def interpret() -> None:
    """Have kernels run in the interpreter, whose dot takes the bits of bf16 for integers: here it is given fp32."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def fp32(tile: TensorHandle) -> TensorHandle:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, fp32(a), fp32(b), *rest)
    np.seterr(over="ignore", divide="ignore")  # infinities are as meant; a GPU does not tell of them


def run() -> dict[str, float | bool]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        interpret()
    return {**{name: off(case, device) for name, case in CASES.items()}, **other_findings(device)}


# Compute capability, type of the states, head size, and whether all that a layer's softmax may have is there.
COMPILED = ((80, "bf16", 128, True), (80, "fp32", 256, False), (90, "bf16", 256, False), (90, "fp32", 128, True))


def compiled(capability: int, dtype: str, width: int, everything: bool) -> dict[str, dict[str, int | bool]]:
    """Compile the kernels for a GPU: kernel -> bytes of shared memory and of stack, and which units multiply."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fitprune.scoring import triton_kernels

    pointers = {"query": dtype, "key": dtype, "row_weight": "fp32", "lse": "fp32", "parts": "fp32", "image": "i64"}
    types = {name: f"*{kind}" for name, kind in pointers.items()} | {"length": "i32", "keys": "i32", "scaling": "fp32"}
    constants: dict[str, float | None] = {"HEADS": 32, "GROUP": 4, "WINDOW": None, "SOFTCAP": None}
    constants |= {"query_d": 1, "key_d": 1}
    if everything:
        types |= {"valid": "*i1", "sinks": "*fp32"}
        constants |= {"WINDOW": 512, "SOFTCAP": 30.0}
    else:
        constants |= {"valid": None, "sinks": None}
    sizes = triton_kernels.launch_sizes(width, 2 if dtype == "bf16" else 4)
    found = {}
    for name, kernel in (("statistics", triton_kernels._row_statistics), ("sums", triton_kernels._column_sums)):
        launch = dict(sizes[name])
        options = {option: launch.pop(option) for option in ("num_warps", "num_stages")}
        fixed = {n: value for n, value in {**constants, **launch}.items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
        aligned = [n for n in kernel.arg_names if signature[n][0] == "*" or n.startswith(("query_", "key_"))]
        divisible = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in fixed}
        source = ASTSource(kernel, signature, fixed, divisible)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found[name] = {
            "shared": made.metadata.shared,
            "stack": stack(made.asm["cubin"]),
            "tensor cores": "mma" in made.asm["ptx"],
        }
    return found


def stack(cubin: bytes) -> int:
    """Bytes of stack of a kernel's thread: registers that were spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", told.stdout + told.stderr))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        print(json.dumps(run()))
    else:
        print(json.dumps([compiled(*setting) for setting in COMPILED]))


if __name__ == "__main__":
    main()
