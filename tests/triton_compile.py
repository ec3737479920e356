"""Compiling Triton kernels ahead of time, without a GPU, for exactly the calls that the package makes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitstrata.kernels.triton import KERNEL, TiledWeight, launch

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass
class Compiled:
    """What the assembler says of one kernel. spills: bytes; shared: bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    ttgir: str


def meta_weight(n: int, k: int, bits: tuple[int, ...], group_size: int = 128, kind: str = "affine") -> TiledWeight:
    """A weight without memory."""
    shape = TiledWeight((), {}, n, k, group_size, kind, KERNEL)
    planes = tuple(
        torch.empty(shape.blocks * shape.chunks * 128, dtype=torch.int32, device="meta") for _ in range(max(bits))
    )
    sizes = {value: shape._scales_size(value) for value in bits}
    scales = {value: torch.empty(count, dtype=dtype, device="meta") for value, (dtype, count) in sizes.items()}
    return TiledWeight(planes, scales, n, k, group_size, kind, KERNEL)


class _Recorded:
    """Stands in for a kernel: kernel[grid](...) keeps the arguments."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            self.arguments, self.options = arguments, options

        return call


def recorded(kernel: str, call: Callable[[], object], monkeypatch: Any) -> _Recorded:
    """The arguments with which `call` launches `kernel`, a name in the package's launch module."""
    with monkeypatch.context() as patched:
        for name, held in list(vars(launch).items()):
            if isinstance(held, triton.JITFunction):
                patched.setattr(launch, name, _Recorded())
        record: _Recorded = getattr(launch, kernel)
        call()
    return record


def compile_for(capability: int, kernel: str, record: _Recorded, folder: Path) -> Compiled:
    """`kernel` as it would be compiled for these arguments on a GPU of this compute capability (80, 90)."""
    function = getattr(launch, kernel)
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, name in enumerate(function.arg_names):
        value = record.arguments[index] if index < len(record.arguments) else record.options[name]
        if index >= len(record.arguments) or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(POINTERS[tensor.dtype] for tensor in value)
            attributes |= {(index, at): aligned for at in range(len(value))}
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = aligned
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = aligned
    options = {name: record.options[name] for name in OPTIONS if record.options.get(name) is not None}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = folder / f"{kernel}.ptx"
    path.write_text(compiled.asm["ptx"])
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = [str(assembler), "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert used, said
    assert spilled, said
    return Compiled(int(used[1]), int(spilled[1]), compiled.metadata.shared, compiled.asm["ttgir"])
