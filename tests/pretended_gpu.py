"""A GPU that is not there: tensors that say they are on cuda:0, hold their data on the CPU, and are as strict.

What a real device refuses is refused here, so that a CPU-only assumption fails in the ordinary test run: operations
on tensors of two devices, addresses and numpy arrays of device memory, a generator of the wrong device. Everything
else computes on the CPU, with the same numbers. `Pretended.waits` has what would make the host wait for the device.

A graph is the list of the operations that were recorded; a replay runs them again, over the same memory, and nothing of
Python. What waits, or copies from the host, cannot be recorded.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bitstrata.kernels import attention as attention_kernels
from bitstrata.kernels import ops, registry
from bitstrata.kernels.triton import KERNEL, TiledWeight
from bitstrata.planes import PlaneWeight, decode

CUDA = torch.device("cuda", 0)
REAL = pytest.param(
    "real", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
# For tests that say nothing more about devices than the others do: a pretended one takes seconds for each.
on_a_real_one = pytest.mark.parametrize("gpu", [REAL], indirect=True)
aten = torch.ops.aten
# operations that copy, or that a device takes an index in host memory for
MIXING = (aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
WAITING = (aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select)
WAITING += (aten._unique2, aten.unique_dim, aten.unique_consecutive)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
SEQUENCES = (list, tuple)


class DeviceTensor(Tensor):
    """`host`, in host memory, as a tensor on cuda:0."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    # torch's own code sees the meta device, for which it needs no driver; Python's sees this one
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on cuda:0: {self.host!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def data_ptr(self) -> int:
        raise RuntimeError("the host cannot use an address on cuda:0")

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_placed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_placed(index), value)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None  # modules then exchange their parameters instead of the data within

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> DeviceTensor:
        return DeviceTensor(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {}, [])


def _placed(index: Any) -> Any:
    """An index with lists in it as tensors here: torch would make them on the meta device, without what is in them."""
    if isinstance(index, tuple):
        return tuple(_placed(part) for part in index)
    return DeviceTensor(torch.tensor(index)) if isinstance(index, list) else index


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], waits: list[str]) -> Any:
    """One operation, after what a device would check."""
    packet = function.overloadpacket
    leaves = [leaf for value in (*args, *kwargs.values()) for leaf in (value if type(value) in SEQUENCES else (value,))]
    ours = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    strangers = [
        leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) and leaf.dim() > 0
    ]
    if ours and strangers and (packet not in MIXING or any(tensor.is_meta for tensor in strangers)):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")
    if ours and packet in INDEXING and not isinstance(args[0], DeviceTensor):
        raise RuntimeError(f"{function}: indices on cuda:0 for a tensor on the CPU")

    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if asked is not None and asked.type == "meta":
        if packet is aten._to_copy:
            return function(*(_host(value) for value in args), **kwargs)
        if ours or packet is aten.scalar_tensor:  # torch's own, in the middle of another operation
            asked = CUDA
    there = bool(ours) if asked is None else asked.type == "cuda"
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.on_device) != there:
        raise RuntimeError(f"{function}: expected a generator for {'cuda' if there else 'cpu'}, not this one")

    crossing = packet is aten._to_copy and bool(ours) != there
    crossing |= packet is aten.copy_ and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)
    masked = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    if crossing or (ours and (masked or packet in WAITING)):
        waits.append(str(function))
        if Graph.warns:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        if Graph.recording is not None:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")

    given = {id(leaf.host): leaf for leaf in ours}  # what is changed in place is handed back as it came
    if asked is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory") is not None:
        kwargs = {**kwargs, "pin_memory": False}
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory" or packet is not aten._to_copy}
    on_host = tuple(map(_host, args)), {key: _host(value) for key, value in kwargs.items()}
    result = function(*on_host[0], **on_host[1])
    if not there:
        return result
    if Graph.recording is not None:
        Graph.recording.operations.append((function, *on_host, result))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else DeviceTensor(value)

    return _mapped(placed, result)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(change, value)) if type(value) in SEQUENCES else change(value)


def _host(value: Any) -> Any:
    return _mapped(lambda part: part.host if isinstance(part, DeviceTensor) else part, value)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    recording: ClassVar[Graph | None] = None
    warns: ClassVar[bool] = False  # torch.cuda.set_sync_debug_mode
    replays: ClassVar[int] = 0  # of all graphs

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    @contextlib.contextmanager
    def capture(cls, graph: Graph, **_: object) -> Iterator[None]:
        """torch.cuda.graph."""
        assert cls.recording is None
        cls.recording = graph
        try:
            yield
        finally:
            cls.recording = None

    def replay(self) -> None:
        Graph.replays += 1
        with _disable_current_modes():
            for function, args, kwargs, results in self.operations:
                again = function(*args, **kwargs)
                pairs = zip(results, again, strict=True) if type(results) in SEQUENCES else [(results, again)]
                for old, new in pairs:
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                        old.copy_(new)


class Pretended(TorchDispatchMode):
    """While it is on, device="cuda" makes DeviceTensors."""

    def __init__(self) -> None:
        super().__init__()
        # the place of fake tensors, for which torch does not start a CUDA driver
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.waits: list[str] = []

    def __enter__(self) -> Pretended:
        self._lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) then makes its tensor on the CPU first
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifting)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "bitstrata":  # what the package registered, on tensors of this device
            with self:
                return ops.IMPLEMENTATIONS[function._opname](*args, **(kwargs or {}))
        return run(function, args, kwargs or {}, self.waits)


class Generator(torch.Generator):
    """In the place of torch's, of any device. torch wraps generators anew on their way: what they wrap tells them."""

    on_device: ClassVar[dict[int, Generator]] = {}

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.on_device[made._cdata] = made  # kept, so that no other comes to lie there
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    device = property(lambda self: CUDA if self._cdata in self.on_device else torch.device("cpu"))

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention, whose own makes tensors on what it takes for the meta device."""
    assert dropout_p == 0.0
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        assert attn_mask is None
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


@contextlib.contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """A machine with one GPU. Its kernel is the reference, from weights in the layout of the Triton kernels."""

    # a weight, by its tensors, of which an op makes a new one at each call: these, as stored, and decoded
    kept: dict[tuple[int, ...], Any] = {}

    def kept_of(weight: TiledWeight) -> tuple[Any, PlaneWeight, dict[Any, Tensor]]:
        tensors = *weight.planes, *weight.scales.values()
        key = tuple(map(id, tensors))
        if key not in kept:
            kept[key] = tensors, weight.stored(), {}
        return kept[key]

    def stored_of(weight: TiledWeight) -> PlaneWeight:
        return kept_of(weight)[1]

    def dense_of(weight: TiledWeight, bits: int, dtype: torch.dtype) -> Tensor:
        _, stored, decoded = kept_of(weight)
        if (bits, dtype) not in decoded:
            decoded[bits, dtype] = decode(stored, bits, dtype)
        return decoded[bits, dtype]

    def product(weight: TiledWeight, x: Tensor, bits: int | Tensor) -> Tensor:
        if isinstance(bits, Tensor):  # no wait for the device, as in the real kernel
            every = [nn.functional.linear(x, dense_of(weight, value, x.dtype)) for value in weight.bits]
            chosen = torch.stack([(bits == value).unsqueeze(1) for value in weight.bits])
            return torch.where(chosen, torch.stack(every), 0).sum(0).masked_fill(~chosen.any(0), float("nan"))
        return nn.functional.linear(x, dense_of(weight, bits, x.dtype))

    def rows(weight: TiledWeight, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        return decode(stored_of(weight).take(index), bits, dtype)

    def on_gpu(device: str, dtype: torch.dtype, forced: bool) -> str | None:
        return None if device == "cuda" else "a GPU"

    stream = SimpleNamespace(wait_stream=lambda _: None, record=lambda: None, synchronize=lambda: None)
    with patch.context() as patched:
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": "Pretended GPU",
            "get_device_capability": (9, 0),
            "mem_get_info": (1 << 25, 1 << 33),
            "get_device_properties": SimpleNamespace(L2_cache_size=1 << 12, major=9),
            "set_device": None,
            "synchronize": None,
            "empty_cache": None,
            "graph_pool_handle": (0, 1),
            "current_stream": stream,
            "Stream": stream,
            "Event": stream,
        }.items():
            patched.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        patched.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patched.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        patched.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(Graph, "warns", mode == "warn"))
        patched.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patched.setattr(torch.cuda, "CUDAGraph", Graph)
        patched.setattr(torch.cuda, "graph", Graph.capture)
        patched.setattr(attention_kernels, "append", attention_kernels.append_reference)
        patched.setattr(attention_kernels, "attend", attention_kernels.attend_reference)
        patched.setattr(torch, "Generator", Generator)
        patched.setattr(nn.functional, "scaled_dot_product_attention", attention)
        patched.setattr(TiledWeight, "_product", product)
        patched.setattr(TiledWeight, "rows", rows)
        patched.setitem(registry._KERNELS, KERNEL.name, replace(KERNEL, runs=on_gpu))
        pretended, run_thread = Pretended(), threading.Thread.run

        def run_pretending(self: threading.Thread) -> None:
            with Pretended() as here:  # a mode is one thread's
                here.waits = pretended.waits
                run_thread(self)

        patched.setattr(threading.Thread, "run", run_pretending)
        with pretended:
            yield pretended
