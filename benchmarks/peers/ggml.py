"""ggml, the library under llama.cpp: `mul_mat` on its CPU backend, one graph with one product for each matrix.

Where ggml can also put a type's weights into another order for faster kernels, as llama.cpp does when it loads a
model, that is a contender of its own ("repacked"). x is float32; ggml makes it int8 inside the product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitstrata.errors import CheckError

from . import ggml_library
from .contender import Contender, Problem

KINDS = {"Q2_K": 2, "TQ2_0": 2, "Q3_K": 3, "Q4_K": 4}  # type -> which of our precisions it is compared to
NODES = 8
_backends: dict[int, ggml_library.Cpu] = {}


def missing() -> str | None:
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported" if absent else None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    features = " ".join(_backend(1).features())
    return {"llama-cpp-python": version("llama-cpp-python"), "gguf": version("gguf"), "ggml features": features}


def _backend(threads: int) -> ggml_library.Cpu:
    if threads not in _backends:
        _backends[threads] = ggml_library.Cpu(threads)
    return _backends[threads]


def contenders(problem: Problem) -> list[Contender]:
    backend = _backend(problem.threads)
    repacked = backend.repacked_buffers()
    found = []
    for kind, bits in KINDS.items():
        packed = ggml_library.quantize(problem.weight.numpy(), kind)
        orders = [(kind, backend.plain_buffers())] + ([(f"{kind} repacked", repacked)] if repacked else [])
        for name, buffers in orders:
            products = _Products(backend, problem, kind, packed, buffers)
            if products.supported:
                products.fill(packed)
                calls = [products.call(index) for index in range(products.copies)]
                decoded = _decoded(packed, kind)
                found.append(
                    Contender(
                        "ggml",
                        f"ggml {name}",
                        "fp32",
                        packed.nbytes,
                        problem.x,
                        calls,
                        products.result,
                        decoded,
                        bits,
                    )
                )
    return found


def _decoded(packed: np.ndarray, kind: str) -> Callable[[int, int], Tensor]:
    import gguf

    which = gguf.GGMLQuantizationType[kind]
    return lambda first, last: torch.from_numpy(gguf.quants.dequantize(packed[first:last], which)).double()


class _Products:
    """The matrices of one type in one buffer, x, and a graph y = x W^T for each matrix."""

    def __init__(
        self, backend: ggml_library.Cpu, problem: Problem, kind: str, packed: np.ndarray, buffers: int
    ) -> None:
        lib = self._lib = ggml_library.library()
        self._backend = backend
        self.copies = problem.copies(packed.nbytes)
        self._shape = (problem.rows, problem.out_features)
        self._x = np.ascontiguousarray(problem.x.numpy())
        self._contexts = [
            ggml_library.context(self.copies),
            ggml_library.context(self.copies + 1, graphs=self.copies, nodes=NODES),
        ]
        columns, rows = problem.in_features, problem.rows
        weights, products = self._contexts
        self._weights = [
            lib.ggml_new_tensor_2d(weights, ggml_library.TYPES[kind], columns, problem.out_features)
            for _ in range(self.copies)
        ]
        self._input = lib.ggml_new_tensor_2d(products, ggml_library.TYPES["F32"], columns, rows)
        self._outputs = [lib.ggml_mul_mat(products, weight, self._input) for weight in self._weights]
        self._buffers = [
            lib.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffers),
            lib.ggml_backend_alloc_ctx_tensors_from_buft(products, backend.plain_buffers()),
        ]
        self.supported = lib.ggml_backend_dev_supports_op(backend.device, self._outputs[0])
        self._graphs = []
        for output in self._outputs:
            graph = lib.ggml_new_graph_custom(products, NODES, False)
            lib.ggml_build_forward_expand(graph, output)
            self._graphs.append(graph)

    def fill(self, packed: np.ndarray) -> None:
        for weight in self._weights:
            self._lib.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        self._lib.ggml_backend_tensor_set(self._input, self._x.ctypes.data, 0, self._x.nbytes)

    def call(self, index: int) -> Callable[[], object]:
        compute, backend, graph = self._lib.ggml_backend_graph_compute, self._backend.backend, self._graphs[index]
        return lambda: compute(backend, graph)

    def result(self, index: int) -> Tensor:
        status = self.call(index)()
        if status != 0:
            raise CheckError(f"ggml_backend_graph_compute ended with status {status}")
        y = np.empty(self._shape, np.float32)
        self._lib.ggml_backend_tensor_get(self._outputs[index], y.ctypes.data, 0, y.nbytes)
        return torch.from_numpy(y)

    def __del__(self) -> None:
        for buffer in getattr(self, "_buffers", []):
            if buffer:
                self._lib.ggml_backend_buffer_free(buffer)
        for context in getattr(self, "_contexts", []):
            self._lib.ggml_free(context)
