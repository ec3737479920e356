"""PlaneModule: a module that holds one Weight, stored or packed for a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..kernels import Weight, pack
from ..kernels.reference import StoredWeight
from ..planes.pack import words_per_row
from ..planes.weights import PlaneWeight, Scales, make_scales, map_scales, scales_bytes, scales_shapes
from .fused import FusedGroup


class PlaneModule(nn.Module):
    """`packed` is the weight, in whichever layout it is now; setting it exchanges it.

    A stored one lies in buffers with the names of the checkpoint: `plane_<i>` int32 [N, ceil(K/32)] and for each
    supported bits p the tensors of `planes.weights.scales_shapes`: for affine scales `scale_<p>`
    fp16 [p, N, J] and `offset_<p>` fp16 [N, J]. That is how loaders find the module. `weight` is an empty placeholder:
    it tells code that asks a layer's dtype, and makes loaders that do not know the format fail on its shape.

    `pack` puts the weight into the layout of the kernel that will run here; its tensors then live in buffers
    `packed_<i>` that no checkpoint sees. `state_dict`, copies and pickles have the stored ones all the same, and
    loading or moving packs anew.

    Args:
        bits: the supported ones, for which there will be planes and scales of zeros; none for a module that is given
            its weight.
        kind: of the scales, "affine", "affine8" or "codebook".
        paged: the module starts without planes and scales and gets pages by `with_pages`, for one bits value at a time.
        dtype: of the placeholder.
    """

    fused: FusedGroup | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: tuple[int, ...],
        group_size: int,
        kind: str = "affine",
        paged: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.kind, self.paged = group_size, kind, paged
        self.bits: tuple[int, ...] = () if paged else bits
        self._packed: Weight | None = None  # None while the weight lies in the buffers as stored
        self._pack_again = False  # `pack` was called, and not `unpack` since
        words = words_per_row(in_features)
        for index in range(max(self.bits, default=0)):
            self.register_buffer(f"plane_{index}", torch.zeros(out_features, words, dtype=torch.int32, device=device))
        for value in self.bits:
            for key, (stored_as, shape) in self._scales_shapes(value).items():
                self.register_buffer(key, torch.zeros(shape, dtype=stored_as, device=device))
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device))

    def _scales_shapes(self, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return scales_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size)

    @property
    def packed(self) -> Weight:
        """The weight that the module holds."""
        return self._packed or StoredWeight(self._stored())

    @packed.setter
    def packed(self, weight: Weight) -> None:
        """Hold `weight`, of this module's shape, and nothing else. What is computing with the former one keeps it."""
        if weight.layout == "stored":
            held, unsaved = weight.stored().tensors(), set()
        else:
            tensors = [*weight.planes, *weight.scales.values()]
            held = {f"packed_{index}": tensor for index, tensor in enumerate(tensors)}
            unsaved = set(held)
        self._buffers = {"weight": self._buffers["weight"], **held}
        self._non_persistent_buffers_set = unsaved
        self.bits, self._packed = weight.bits, None if weight.layout == "stored" else weight
        if self.fused is not None:
            self.fused.clear()

    def _stored(self) -> PlaneWeight:
        scales = {
            value: make_scales(self.kind, value, {key: getattr(self, key) for key in self._scales_shapes(value)})
            for value in self.bits
        }
        planes = tuple(getattr(self, f"plane_{index}") for index in range(max(self.bits)))
        return PlaneWeight(planes, scales, self.in_features, self.group_size)

    def plane_weight(self) -> PlaneWeight:
        """The weight as stored: the module's own tensors, or copies if it is packed for a kernel."""
        return self.packed.stored()

    def bytes_read(self, bits: int) -> int:
        """Bytes of the stored tensors that a product at `bits` needs: planes 0..bits-1 and those scales."""
        scales = scales_bytes(self.kind, bits, self.out_features, self.in_features, self.group_size)
        return 4 * bits * self.out_features * words_per_row(self.in_features) + scales

    def pack(self, kernel: str | None = None) -> None:
        """Re-lay the weight for the kernel that runs here, or the one that is named; see `kernels.pack`."""
        self._pack_again = True
        weight = self.get_buffer("weight")
        if self._packed is None and self.bits and not weight.is_meta:
            self.packed = pack(self._stored(), dtype=weight.dtype, kernel=kernel, apart=self.paged)

    def unpack(self) -> None:
        """Bring the stored tensors back into the module; the opposite of `pack`."""
        self._pack_again = False
        if self._packed is not None:
            self.packed = StoredWeight(self._packed.stored())

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Inside, the module holds the stored tensors; afterwards the kernel's again, if it is to have them."""
        again = self._pack_again
        self.unpack()
        try:
            yield
        finally:
            if again:
                self.pack()

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> Weight:
        """The weight at `bits` alone: the planes that the module holds as far as they go, shared, then `planes`.

        The module stays as it is. `planes` and `scales` in the stored order, on any device.
        """
        weight = self.get_buffer("weight")
        if not self.bits:
            first = PlaneWeight(tuple(planes), {bits: scales}, self.in_features, self.group_size)
            return pack(first, weight.device, weight.dtype, apart=True)
        planes = [plane.to(weight.device) for plane in planes]
        return self.packed.with_pages(bits, planes, map_scales(scales, lambda tensor, _: tensor.to(weight.device)))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            for key, tensor in self.plane_weight().tensors().items():
                destination[prefix + key] = tensor

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        with self._unpacked():
            super()._load_from_state_dict(*arguments, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never convert: `model.half()` or `.to(bfloat16)` must not round stored scales."""
        with self._unpacked():
            kept = {key: buffer for key, buffer in self._buffers.items() if buffer is not None and key != "weight"}
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for key, before in kept.items():
                after = self._buffers[key]
                if after is not None and after.dtype != before.dtype:
                    self._buffers[key] = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the stored tensors: the packed ones belong to this machine's kernel."""
        state = self.__dict__.copy()
        if self._packed is not None:
            weight = {"weight": self._buffers["weight"]}
            state["_buffers"], state["_packed"] = weight | self.plane_weight().tensors(), None
            state["_non_persistent_buffers_set"] = set()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._pack_again:
            self.pack()

    def extra_repr(self) -> str:
        bits = ",".join(map(str, self.bits))
        return f"{self.in_features}, {self.out_features}, bits={bits}, group_size={self.group_size}, {self.kind}"
