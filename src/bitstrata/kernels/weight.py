"""Weight: planes and scales in the layout of the kernel that multiplies by them.

    stored     as planes.PlaneWeight has them; every product decodes the whole weight: the reference (reference.py)
    blocked    the native kernels of CPUs (cpu/)
    tiled      the Triton kernels (triton/)

`pack` chooses the layout, once; it alone asks the registry. After that a product is one straight line: its number of
rows and the kind of its bits, one value or one a row, decide inside the layout what runs.

`linear` and `lookup` go straight to the kernel in an ordinary eager call, which a model's decoding step makes
hundreds of times, and through the ops (ops.py) when a compiler, a tracer or a derivative wants to see them.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import UnsupportedBitsError, UsageError
from ..planes.pack import words_per_row
from ..planes.weights import (
    BYTE_BITS,
    MAX_BITS,
    PlaneWeight,
    Scales,
    map_scales,
    scales_kind,
    scales_shapes,
    scales_tensors,
)
from . import registry
from .plain import check_constant, is_plain
from .registry import Kernel

INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
LAYOUTS: dict[str, type[Weight]] = {}


class Weight(ABC):
    """A weight [N, K] = [out_features, in_features] at the bits for which it has scales.

    Args:
        planes, scales: in the layout's own form; a plane is shared by all bits that use it.
        kind: of the scales, "affine", "affine8" or "codebook".
        kernel: that multiplies by it.

    Raises ValueError if a tensor does not have the size that the layout asks for.
    """

    layout: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]]  # of activations that the layout's kernels read

    def __init__(
        self,
        planes: tuple[Tensor, ...],
        scales: Mapping[int, Any],
        out_features: int,
        in_features: int,
        group_size: int,
        kind: str,
        kernel: Kernel,
    ) -> None:
        self.planes, self.scales = planes, scales
        self.out_features, self.in_features = out_features, in_features
        self.group_size, self.kind, self.kernel = group_size, kind, kernel
        self.bits = tuple(sorted(scales))
        for bits in self.bits:
            if not 1 <= bits <= len(planes):
                raise ValueError(f"scales for {bits} bits need as many planes, got {len(planes)}")
        self.device = planes[0].device if planes else torch.device("cpu")
        self._attach()

    @abstractmethod
    def _attach(self) -> None:
        """Check the tensors, and tell native code where they lie."""

    def __init_subclass__(cls) -> None:
        LAYOUTS[cls.layout] = cls

    def linear(self, x: Tensor, bits: int | Tensor, arithmetic: str | None = None) -> Tensor:
        """y = x @ W^T at `bits`, or row r at bits[r]: x [..., K] -> [..., N] in x's dtype. Differentiable in x.

        Args:
            bits: one value, or integers [rows], one a row; int8 on x's device is what costs least.
            arithmetic: "exact" or "int8", whichever would run: for measuring, without a gradient.

        Raises:
            UnsupportedBitsError: bits without scales. On a GPU, where looking would wait for it, a row whose entry
                has none becomes NaN.
            UsageError: x is not a dense tensor K wide on the weight's device, or `bits` are not integers of this shape.
            KernelError: x is not floating point, or no kernel here computes in `arithmetic`.
        """
        return linear_many(x, [self], bits, arithmetic)[0]

    def lookup(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """Rows `index` (integers [...]) of the weight at `bits`: [..., K] in `dtype`, exactly as the reference decodes.

        Raises IndexError for an index that is not a row, UnsupportedBitsError for bits without scales, UsageError for
        an index that is not of integers and a dtype that is not floating point.
        """
        if not isinstance(index, Tensor) or index.dtype not in INTEGERS:
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise UsageError(f"index must be an integer tensor, got {kind}")
        if not dtype.is_floating_point:
            raise UsageError(f"rows of a weight are floating point, not {dtype}")
        bits = self.checked(bits)
        if is_plain(index) and index.device == self.device:
            if self.layout == "stored":  # others are made of copies, which `pack` has checked
                check_constant(self.scales_of(bits))
            return self.run_lookup(index, bits, dtype)
        y: Tensor = torch.ops.bitstrata.lookup(index, *self.arguments(bits), bits, dtype)
        return y

    @abstractmethod
    def stored(self) -> PlaneWeight:
        """The weight as the checkpoint has it, bit for bit."""

    @abstractmethod
    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> Self:
        """A weight at `bits` alone: this one's planes 0..bits-1 as far as it has them, shared, then `planes`.

        Planes and scales come in the stored order, on the weight's device. This weight stays as it is. Raises
        ValueError if the planes are not as many as are missing, or their shapes or those of the scales do not fit.
        """

    @classmethod
    @abstractmethod
    def pack(cls, weight: PlaneWeight, kernel: Kernel, *, apart: bool = False) -> Self:
        """`weight`, which is left alone, in this layout; see the function `pack`."""

    @classmethod
    @abstractmethod
    def multiply(cls, x: Tensor, weights: Sequence[Any], bits: int | Tensor, kernel: Kernel) -> list[Tensor]:
        """x [..., K] times each of `weights`, of this layout and K: [..., N_i] each. Inputs were checked."""

    @abstractmethod
    def decode(self, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first..last-1 at `bits`: [last - first, K]. `first` is a multiple of 16, `last` too unless it is N."""

    @abstractmethod
    def rows(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """Rows `index` (int64 [n], on a CPU all of them in 0..N-1) at `bits`: [n, K], as the reference decodes."""

    def scales_of(self, bits: int) -> list[Tensor]:
        """The tensors of the scales for `bits`, as an op takes them."""
        return [self.scales[bits]]

    @classmethod
    def from_op(cls, planes: tuple[Tensor, ...], scales: Sequence[Tensor], bits: Sequence[int], *rest: Any) -> Self:
        """The weight whose `arguments` these are."""
        return cls(planes, dict(zip(bits, scales, strict=True)), *rest)

    def arguments(self, bits: int | Tensor) -> tuple[Any, ...]:
        """What an op needs of this weight: no more planes than `bits` has."""
        chosen = self.bits if isinstance(bits, Tensor) else (bits,)
        scales = [tensor for value in chosen for tensor in self.scales_of(value)]
        shape = [self.out_features, self.in_features, self.group_size]
        return list(self.planes[: max(chosen)]), scales, list(chosen), shape, self.kind, self.layout, self.kernel.name

    def bytes_read(self, bits: int) -> int:
        """Bytes that a product at `bits` reads, padding included."""
        return sum(plane.nbytes for plane in self.planes[:bits]) + sum(t.nbytes for t in self.scales_of(bits))

    def checked(self, bits: Any) -> int:
        """`bits` as an int; UnsupportedBitsError if there are no scales for them."""
        if type(bits) is not int:
            if isinstance(bits, (bool, Tensor)):
                raise UsageError(f"bits must be an int, got {bits!r}")
            try:
                bits = operator.index(bits)  # NumPy's integers, for one
            except TypeError:
                raise UsageError(f"bits must be an int, got {bits!r}") from None
        if bits not in self.scales:
            raise UnsupportedBitsError(bits, self.bits, where="this layer")
        return int(bits)

    def kernel_for(self, rows: int, dtype: torch.dtype, arithmetic: str | None = None) -> Kernel:
        """The kernel that multiplies so many rows of `dtype`; raises KernelError as `linear` does."""
        kernel = self.kernel if dtype in self.dtypes else registry.reference(dtype)
        return kernel if arithmetic is None else registry.in_arithmetic(kernel, arithmetic, rows, dtype)

    def check_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> None:
        """Raise ValueError unless `with_pages` can use these: kernels trust the addresses they get."""
        missing = max(0, bits - len(self.planes))
        if len(planes) != missing:
            raise ValueError(f"{bits} bits need {missing} planes more than there are, got {len(planes)}")
        shape = self.out_features, self.in_features
        for plane in planes:
            _check_tensor("plane", plane, torch.int32, (shape[0], words_per_row(shape[1])))
        kind = self.kind_with(scales)
        if scales.kind != scales_kind(kind, bits):
            raise ValueError(f"{bits} bits of a weight with {self.kind} scales cannot have {scales.kind} scales")
        expected = scales_shapes(kind, bits, *shape, self.group_size)
        for name, tensor in scales_tensors(scales, bits).items():
            _check_tensor(name, tensor, *expected[name])

    def kind_with(self, scales: Scales) -> str:
        """The kind of this weight with `scales`: one that had fine precisions only may turn out to have bytes."""
        fine = self.kind == "affine" and min(self.bits, default=MAX_BITS) > BYTE_BITS
        return "affine8" if fine and scales.kind == "affine8" else self.kind

    def readable(self, dtype: torch.dtype) -> Weight:
        """This weight, or the stored one for activations that its layout's kernels cannot read: said once."""
        if dtype in self.dtypes or self.layout == "stored":
            return self
        warnings.warn(
            f"activations in {dtype}: kernel 'reference' runs, which cannot read weights packed in the layout "
            f"{self.layout!r}. They are unpacked at every call, which is slow. Convert them to float32, bfloat16 or "
            "float16 to avoid that.",
            stacklevel=1,  # this line: once, not once for each caller
        )
        return pack(self.stored(), kernel="reference")

    def run_lookup(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """`lookup` of real tensors."""
        flat = index.reshape(-1).long()
        if flat.numel() and flat.device.type == "cpu":
            low, high = (int(bound) for bound in flat.aminmax())
            if low < 0 or high >= self.out_features:
                wrong = low if low < 0 else high
                raise IndexError(f"token {wrong} is out of range: the embedding has {self.out_features} rows")
        return self.readable(dtype).rows(flat, bits, dtype).view(*index.shape, self.in_features)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are packed anew: addresses and tensors that share one piece of memory stay behind."""
        return pack, (self.stored(), None, torch.float32, self.kernel.name if self.kernel.forced else None)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def linear_many(
    x: Tensor, weights: Sequence[Weight], bits: int | Tensor, arithmetic: str | None = None
) -> list[Tensor]:
    """`linear` by several weights of one layout, K and groups in one call: x [..., K] -> [..., N_i] each."""
    if not isinstance(x, Tensor):
        raise UsageError(f"x must be a tensor, got {type(x).__name__}")
    columns = x.shape[-1] if x.dim() else None
    for weight in weights:
        if columns != weight.in_features:
            raise UsageError(f"expected x [..., {weight.in_features}], got {list(x.shape)}")
    if x.layout != torch.strided:
        raise UsageError(f"x must be dense, got a tensor in the layout {x.layout}", hint="x.to_dense()")
    if isinstance(bits, Tensor):
        bits = rows_of(bits, x)
        plain = is_plain(x, bits)
    else:
        for weight in weights:
            bits = weight.checked(bits)
        plain = is_plain(x)
    if arithmetic is not None:
        with torch.no_grad():
            return run_linear(x, weights, bits, arithmetic)
    first = weights[0]
    if plain and x.device == first.device and first.layout != "stored":  # whose scales an op has to look at
        return run_linear(x, weights, bits)
    one, each = (0, bits) if isinstance(bits, Tensor) else (bits, None)
    return [torch.ops.bitstrata.linear(x, *weight.arguments(bits), one, each) for weight in weights]


def run_linear(x: Tensor, weights: Sequence[Weight], bits: int | Tensor, arithmetic: str | None = None) -> list[Tensor]:
    """`linear_many` of real tensors that were checked, all on one device."""
    first = weights[0]
    kernel = first.kernel
    if arithmetic is not None or x.dtype not in first.dtypes:
        kernel = first.kernel_for(x.shape[:-1].numel(), x.dtype, arithmetic)
        weights = [weight.readable(x.dtype) for weight in weights]
    device = first.device.type
    if torch.is_autocast_enabled(device):  # entering the context costs as much as the rest of this function
        with torch.autocast(device, enabled=False):  # the result has x's dtype, as the fake says
            return weights[0].multiply(x, weights, bits, kernel)
    return weights[0].multiply(x, weights, bits, kernel)


def rows_of(bits: Tensor, x: Tensor) -> Tensor:
    """Bits of rows as kernels take them, int8 on x's device; what they are is checked where they are used."""
    if bits.dtype not in INTEGERS:
        raise UsageError(f"row_bits must be an integer tensor, got {bits.dtype}")
    rows = x.shape[:-1].numel()
    if bits.dim() != 1 or bits.shape[0] != rows:
        raise UsageError(f"row_bits must have shape {[rows]}, one entry a row, got {list(bits.shape)}")
    if bits.dtype != torch.int8:
        bits = bits.long().clamp(-1, 127).to(torch.int8)  # 258 is not 2
    return bits if bits.device == x.device else bits.to(x.device)


def check_row_bits(bits: Tensor, weight: Weight) -> None:
    """Raise UnsupportedBitsError for an entry without scales; looks at the entries, for which a GPU would wait."""
    unknown = set(bits.tolist()) - set(weight.bits)
    if unknown:
        raise UnsupportedBitsError(sorted(unknown), weight.bits, where="this layer")


def pack(
    weight: PlaneWeight,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
    *,
    apart: bool = False,
) -> Weight:
    """`weight`, which is left alone, in the layout of the kernel that will run: the one place that chooses it.

    Args:
        device: where it will run; that of its tensors by default.
        dtype: of the activations.
        kernel: the name of one that is forced; BITSTRATA_KERNEL by default, else the best that can run.
        apart: each plane and set of scales in memory of its own, so that dropping one gives its memory back.

    Raises:
        KernelError: the forced kernel cannot run here, or does not exist.
        UsageError: the scales require gradients, which their copies would not have.
        ValueError: affine and codebook scales are mixed.
    """
    for bits, scales in weight.scales.items():
        check_constant(scales_tensors(scales, bits).values())
    if device is not None and weight.planes[0].device != torch.device(device):
        weight = PlaneWeight(
            tuple(plane.to(device) for plane in weight.planes),
            {bits: map_scales(scales, lambda tensor, _: tensor.to(device)) for bits, scales in weight.scales.items()},
            weight.in_features,
            weight.group_size,
        )
    where = weight.planes[0].device.type
    if kernel is None and where in registry.LACKING:
        warnings.warn(registry.LACKING[where], stacklevel=2)
    chosen = registry.select(where, dtype, kernel)
    if chosen.layout != "stored" and len({scales.kind == "codebook" for scales in weight.scales.values()}) > 1:
        raise ValueError("a weight with affine and codebook scales cannot be packed")
    return LAYOUTS[chosen.layout].pack(weight, chosen, apart=apart)
