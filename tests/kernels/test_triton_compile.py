"""Every Triton kernel, with the shapes of programs that the package chooses, compiled for sm_80 and sm_90.

No GPU is needed. What is checked is what decides their speed and can be seen without one: no register is spilled,
the limits leave room for the warps that hide latency, and the few-row kernel moves nothing between lanes.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (Linux only)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_compile import compile_for, meta_weight, recorded

from bitstrata.kernels.triton import launch

BF16, FP16 = torch.bfloat16, torch.float16
capabilities = pytest.mark.parametrize("capability", [80, 90])


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """compiled(capability, kernel, call): what becomes of the launch of `kernel` that `call` makes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("bitstrata.kernels.triton.config._hopper", lambda device: compiled_for[0] >= 90)
    compiled_for = [90]

    def run(capability, kernel, call):
        compiled_for[0] = capability
        return compile_for(capability, kernel, recorded(kernel, call, monkeypatch), tmp_path)

    return run


def x_of(rows, columns, dtype):
    return torch.empty(rows, columns, dtype=dtype, device="meta")


FEW = {  # out_features, in_features, bits, group_size, kind, rows, dtype, registers
    "2-bits": (4096, 14336, 2, 128, "affine", 1, BF16, 128),
    "2-bits-wide": (14336, 4096, 2, 128, "affine", 1, FP16, 128),
    "3-bits-wide": (14336, 4096, 3, 128, "affine", 1, BF16, 128),
    "2-bits-of-bytes": (14336, 4096, 2, 128, "affine8", 1, BF16, 128),
    "4-bits": (4096, 14336, 4, 128, "affine", 8, BF16, 128),
    "8-bits": (4096, 4096, 8, 64, "affine", 1, FP16, 255),
    "small-groups": (4096, 4096, 4, 32, "affine", 1, BF16, 255),
    "16-rows": (4096, 14336, 4, 128, "affine", 16, BF16, 255),
    "codebook": (4096, 4096, 4, 128, "codebook", 1, BF16, 255),
}


@pytest.mark.parametrize(
    ("capability", "case"),
    [*((90, case) for case in FEW), *((80, case) for case in ("2-bits", "4-bits", "small-groups"))],
)
def test_few_rows(compiled, capability, case):
    n, k, bits, group_size, kind, rows, dtype, registers = FEW[case]
    weight, x = meta_weight(n, k, (bits,), group_size, kind), x_of(rows, k, dtype)
    kernel = "few_rows_codebook" if kind == "codebook" else "few_rows_affine"
    result = compiled(capability, kernel, lambda: launch.few_rows(x, weight, bits))
    assert result.spills == 0
    assert result.registers <= registers
    assert "local_alloc" not in result.ttgir  # operands do not go through shared memory


@capabilities
@pytest.mark.parametrize("kind", ["affine", "codebook"])
def test_rows_at_their_own_bits(compiled, capability, kind):
    weight, x = meta_weight(4096, 4096, (2, 3, 4), 128, kind), x_of(8, 4096, BF16)
    row_bits = torch.empty(8, dtype=torch.int8, device="meta")
    kernel = "few_rows_codebook" if kind == "codebook" else "few_rows_affine"
    result = compiled(capability, kernel, lambda: launch.few_rows(x, weight, row_bits))
    assert result.spills <= (0 if kind == "affine" else 256)  # tables are decoded once for each bits
    assert "local_alloc" not in result.ttgir


@pytest.mark.parametrize(
    ("capability", "rows", "kind"),
    [(90, 32, "affine"), (90, 64, "affine8"), (90, 256, "affine"), (90, 64, "codebook"), (80, 64, "affine")],
    ids=str,
)
def test_many_rows(compiled, capability, rows, kind):
    weight, x = meta_weight(4096, 4096, (4,), 128, kind), x_of(rows, 4096, BF16)
    result = compiled(capability, "many_rows", lambda: launch.tiles(x, weight, 4))
    assert result.spills == 0
    assert result.shared <= 99 * 1024  # two programs on a multiprocessor


@pytest.mark.parametrize(("capability", "kind"), [(90, "affine"), (90, "affine8"), (80, "codebook")])
def test_decoding(compiled, capability, kind):
    weight = meta_weight(4096, 4096, (4,), 128, kind)
    result = compiled(capability, "decode_rows", lambda: launch.decode(weight, 4, BF16))
    assert result.spills == 0
    assert result.registers <= 128


ATTENTION = {  # query heads, key heads, width, dtype, the longest row
    "8b": (32, 8, 128, BF16, 4096),
    "8b-short": (32, 8, 128, BF16, 512),
    "small": (9, 3, 64, BF16, 4096),
    "wide": (8, 4, 256, FP16, 4096),
    "fp32": (9, 3, 64, torch.float32, 4096),
}


@pytest.mark.parametrize(
    ("capability", "case"), [*((90, case) for case in ATTENTION), *((80, case) for case in ("8b", "wide"))]
)
def test_attention(compiled, capability, case):
    heads, key_heads, width, dtype, longest = ATTENTION[case]
    rows, tokens = 4, 8192
    keys, values = (torch.empty(key_heads, tokens, width, dtype=dtype, device="meta") for _ in range(2))
    query = torch.empty(rows, heads, width, dtype=dtype, device="meta").transpose(0, 1)
    new = torch.empty(rows, key_heads, width, dtype=dtype, device="meta").transpose(0, 1)
    starts = torch.empty(rows, dtype=torch.int64, device="meta")

    def attend():
        launch.attend(query, keys, values, starts, starts, longest, 0.1, 0, 30.0)

    result = compiled(capability, "attend_chunk", attend)
    assert result.spills == 0
    assert result.shared <= 99 * 1024  # two programs on a multiprocessor
    results = [compiled(capability, "append_rows", lambda: launch.append(keys, values, new, new, starts, starts))]
    if longest > launch.ATTENTION_CHUNK:
        results.append(compiled(capability, "attend_whole", attend))
    assert all(result.spills == 0 for result in results)
