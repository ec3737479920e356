"""llama.cpp's types, by its own quantizer (ggml of llama-cpp-python), with an importance matrix of the job's windows.

    llama.cpp:type=Q3_K

All linears get the type, and those whose rows are no multiple of 256 the one that llama-quantize takes instead: IQ4_NL
for Q2_K and Q3_K, Q5_0 for Q4_K. The importance of a column is the mean square of its inputs in the original model, as
llama-imatrix computes it. `imatrix=no` goes without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch
from peers import ggml_library
from torch import Tensor, nn

from bitstrata.errors import UsageError

from .made import Job, Made, Options, linears_of, one_by_one, taken

BLOCK = 256
BITS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q4_0": 4, "IQ4_NL": 4, "Q5_0": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}
INSTEAD = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def missing() -> str | None:
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported" if absent else None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"llama-cpp-python": version("llama-cpp-python"), "gguf": version("gguf")}


def make(job: Job, options: Options) -> Iterator[Made]:
    import gguf

    asked, weighted = taken(options, "type", "Q4_K"), taken(options, "imatrix", "yes") == "yes"
    if asked not in BITS:
        raise UsageError(f"type {asked} is not known here", hint=f"one of {', '.join(BITS)}")
    importance = importance_of(job) if weighted else {}

    def quantized(name: str, weight: Tensor) -> tuple[Tensor, int]:
        kind = INSTEAD.get(asked, asked) if weight.shape[1] % BLOCK else asked
        packed = ggml_library.quantize(weight.numpy(), kind, importance.get(name))
        dense = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(np.ascontiguousarray(dense)), packed.nbytes

    weights, size = one_by_one(job, quantized)
    yield Made(BITS[asked], weights, size)


def importance_of(job: Job) -> dict[str, np.ndarray]:
    """Mean square of each input of each linear over the windows: name -> float32 [K]."""
    model = job.loaded()
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, linear in linears_of(model).items():
        sums[name] = torch.zeros(linear.in_features, dtype=torch.float64)

        def count(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            sums[name] += inputs[0].flatten(0, -2).double().square().sum(0)

        hooks.append(linear.register_forward_pre_hook(count))
    with torch.no_grad():
        for window in job.windows:
            model.base_model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = job.windows.numel()
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}
