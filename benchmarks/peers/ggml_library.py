"""The ggml that llama-cpp-python ships, through ctypes: only the functions that the benchmarks call.

Functions of the CPU backend are asked of the backend by name, so that packages with one library and packages with one
CPU library an instruction set both work: loading the backends picks the right one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitstrata.errors import ResourceError

TYPES = {
    "F32": 0, "Q4_0": 2, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "TQ2_0": 35,
}  # fmt: skip
CPU_DEVICE = 0
REPACKED = b"CPU_REPACK"  # buffers that put weights into the order of the fastest kernels

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
}


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENT = _LOG(lambda level, text, data: None)  # kept here: the library calls it as long as it is loaded
_SIGNATURES["ggml_log_set"] = (None, [_LOG, c_void_p])


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Feature(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("value", c_char_p)]


def folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries; None without it."""
    found = importlib.util.find_spec("llama_cpp")
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) / "lib" if places else None


@cache
def library() -> Any:
    """The functions above, callable; loaded once."""
    place = folder()
    endings = {"darwin": ("lib", ".dylib"), "win32": ("", ".dll")}
    prefix, suffix = endings.get(sys.platform, ("lib", ".so"))
    path = None if place is None else place / f"{prefix}ggml{suffix}"
    if path is None or not path.exists():
        raise ResourceError(f"no ggml library at {path}", hint="install with `pip install .[peers]`")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.ggml_init.restype, loaded.ggml_init.argtypes = c_void_p, [_InitParams]
    loaded.ggml_log_set(_SILENT, None)
    loaded.ggml_backend_load_all_from_path(str(place).encode())
    return loaded


def silent_log() -> Any:
    """A log callback that says nothing."""
    return _SILENT


def context(tensors: int, graphs: int = 0, nodes: int = 8) -> int:
    """A context that holds descriptions only; the data lies in buffers."""
    lib = library()
    size = (tensors + 1) * lib.ggml_tensor_overhead() + graphs * (lib.ggml_graph_overhead_custom(nodes, False) + 512)
    return int(lib.ggml_init(_InitParams(size + 4096, None, True)))


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [N, K] -> the bytes of `kind`, uint8 [N, bytes a row].

    importance: float32 [K], how much the error of a column counts; None: what the type takes by itself.
    """
    lib = library()
    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.empty((rows, lib.ggml_row_size(TYPES[kind], columns)), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        assert importance.shape == (columns,), f"importance of {importance.shape} for {columns} columns"
    pointer = None if importance is None else importance.ctypes.data
    written = lib.ggml_quantize_chunk(TYPES[kind], weight.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
    assert written == out.nbytes, f"{kind}: {written} bytes written, {out.nbytes} expected"
    return out


class Cpu:
    """The CPU backend with `threads` threads."""

    def __init__(self, threads: int) -> None:
        lib = library()
        self.device = lib.ggml_backend_dev_by_type(CPU_DEVICE)
        if not self.device:
            raise ResourceError("llama-cpp-python's ggml has no CPU backend for this processor")
        self._registry = lib.ggml_backend_dev_backend_reg(self.device)
        self.backend = lib.ggml_backend_dev_init(self.device, None)
        self._function("ggml_backend_set_n_threads", None, c_void_p, c_int)(self.backend, threads)
        if threads > 1:  # without a pool, builds without OpenMP start and end threads at each call
            params = ctypes.create_string_buffer(1 << 14)  # more than its structure needs
            lib.ggml_threadpool_params_init(params, threads)
            pool = self._function("ggml_threadpool_new", c_void_p, c_void_p)(params)
            self._function("ggml_backend_cpu_set_threadpool", None, c_void_p, c_void_p)(self.backend, pool)

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        address = library().ggml_backend_reg_get_proc_address(self._registry, name.encode())
        if not address:
            raise ResourceError(f"llama-cpp-python's ggml has no {name}", hint="these benchmarks know version 0.3.36")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def plain_buffers(self) -> int:
        return int(library().ggml_backend_dev_buffer_type(self.device))

    def repacked_buffers(self) -> int | None:
        """The buffer type of repacked weights, None where the build has none. Others (AMX) are not asked for."""
        lib = library()
        extra = self._function("ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)(self.device)
        index = 0
        while extra and extra[index]:
            if lib.ggml_backend_buft_name(extra[index]) == REPACKED:
                return int(extra[index])
            index += 1
        return None

    def features(self) -> dict[str, str]:
        """The instruction sets that the loaded library was built for."""
        listed = self._function("ggml_backend_get_features", POINTER(_Feature), c_void_p)(self._registry)
        found: dict[str, str] = {}
        while listed[len(found)].name:
            feature = listed[len(found)]
            found[feature.name.decode()] = feature.value.decode()
        return found
