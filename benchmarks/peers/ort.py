"""ONNX Runtime: the operator MatMulNBits with int8 activations (accuracy_level 4), symmetric, one fp32 scale a group.

Every matrix is a session of its own with one node. All sessions share one pool of threads; x and y are bound once, so
that a call copies neither.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contender import Contender, Problem

BITS = (2, 4, 8)
INT8_ACTIVATIONS = 4  # a level of the operator, not bits
LUT = "mlas.use_lut_gemm"  # its second way with 2 bits, table lookups instead of int8 dot products
_pool_threads: list[int] = []


def missing() -> str | None:
    absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported" if absent else None


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


def contenders(problem: Problem) -> list[Contender]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    if not _pool_threads:  # once a process
        onnxruntime.set_global_thread_pool_sizes(problem.threads, 1)
        _pool_threads.append(problem.threads)
    found = []
    for bits, lut in ((2, False), (2, True), (4, False), (8, False)):
        name = f"ORT {bits} bits{' lut' if lut else ''}"
        try:
            found.append(_contender(problem, bits, lut, name))
        except Exception as error:  # the library raises its own classes, with nothing but Exception in common
            problem.skipped.append(f"{name}: {str(error).splitlines()[0]}")
    return found


def _contender(problem: Problem, bits: int, lut: bool, name: str) -> Contender:
    packed, scales = quantize(problem.weight.numpy(), bits, problem.group_size)
    size = packed.nbytes + scales.nbytes
    model = _model(packed, scales, problem, bits)
    x = np.ascontiguousarray(problem.x.numpy())
    bound = [_bind(model, x, lut, problem.out_features) for _ in range(problem.copies(size))]
    calls: list[Callable[[], object]] = [_call(session, binding) for session, binding, _ in bound]

    def result(index: int) -> Tensor:
        calls[index]()
        return torch.from_numpy(bound[index][2].numpy())

    def decoded(first: int, last: int) -> Tensor:
        return torch.from_numpy(dequantize(packed[first:last], scales[first:last], bits))

    return Contender("ort", name, "fp32", size, problem.x, calls, result, decoded, bits if bits in (2, 4) else None)


def _call(session: Any, binding: Any) -> Callable[[], object]:
    return lambda: session.run_with_iobinding(binding)


def quantize(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes around 2^(bits-1), low bits first in a byte: uint8 [N, K/group, group*bits/8], scales [N, K/group]."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    middle = 1 << (bits - 1)
    scales = (np.abs(grouped).max(-1) / (middle - 0.5)).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    apiece = codes.reshape(*codes.shape[:2], -1, 8 // bits)
    packed = np.zeros(apiece.shape[:3], np.uint8)
    for place in range(8 // bits):
        packed |= apiece[..., place] << (place * bits)
    return packed, scales


def dequantize(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The packed bytes as float64 [N, K]."""
    places = np.arange(8 // bits) * bits
    codes = (packed[..., None] >> places) & ((1 << bits) - 1)  # [N, K/group, bytes, codes a byte]
    values = codes.reshape(*packed.shape[:2], -1) - float(1 << (bits - 1))
    return (values * scales[..., None].astype(np.float64)).reshape(packed.shape[0], -1)


def _model(packed: np.ndarray, scales: np.ndarray, problem: Problem, bits: int) -> bytes:
    from onnx import TensorProto, helper

    rows, outs, columns = problem.rows, problem.out_features, problem.in_features
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=outs,
        bits=bits,
        block_size=problem.group_size,
        accuracy_level=INT8_ACTIVATIONS,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outs])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return bytes(model.SerializeToString())


def _bind(model: bytes, x: np.ndarray, lut: bool, out_features: int) -> tuple[Any, Any, Any]:
    """A session, its bound x and y, and y."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    if lut:
        options.add_session_config_entry(LUT, "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.full((x.shape[0], out_features), np.nan, np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", y)
    return session, binding, y
