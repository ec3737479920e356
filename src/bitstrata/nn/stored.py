"""PlaneModule: a module that holds one weight as planes and scales, in the stored order or a kernel's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..kernels import (
    PreparedWeight,
    linear_in,
    plane_linear,
    plane_linear_rows,
    prepare,
    prepared_linear,
    without_pages,
)
from ..planes.pack import words_per_row
from ..planes.weights import PlaneWeight, Scales, make_scales, map_scales, scales_bytes, scales_shapes

_PREPARED = "prepared_"


class PlaneModule(nn.Module):
    """Buffers carry the names of the checkpoint: `plane_<i>` int32 [N, ceil(K/32)] and for each
    supported bits p the tensors of `planes.weights.scales_shapes`: for affine scales `scale_<p>`
    fp16 [p, N, J] and `offset_<p>` fp16 [N, J]. `weight` is an empty placeholder: it tells code that
    asks a layer's dtype, and makes loaders that do not know the format fail on its shape.

    `prepare` puts the weight into the layout of the kernel that will run here; the tensors then
    live in buffers `prepared_<i>` that no checkpoint sees. `state_dict` gives the stored ones all
    the same, and loading, moving or `plane_weight` bring them back.

    A `paged` module starts without planes and scales. `with_pages` makes a weight for one bits value from what it
    holds and the pages that are missing, `hold` puts it in place; `bits` is then that value, and the module is in every
    respect one that was quantized for it alone.

    Args:
        bits: the supported ones; of a paged module, those that it may get pages for.
        kind: of the scales, "affine", "affine8" or "codebook".
        dtype: of the placeholder.
    """

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
        self.prepared: PreparedWeight | None = None
        self._wants_layout = False  # somebody called `prepare`, and nobody `restore` since
        words = words_per_row(in_features)
        for index in range(max(self.bits, default=0)):
            self.register_buffer(f"plane_{index}", torch.zeros(out_features, words, dtype=torch.int32, device=device))
        for value in self.bits:
            for key, (stored_as, shape) in self._scales_shapes(value).items():
                self.register_buffer(key, torch.zeros(shape, dtype=stored_as, device=device))
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device))

    def _scales_shapes(self, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return scales_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size)

    def plane_weight(self, bits: tuple[int, ...] | None = None) -> PlaneWeight:
        """The weight as stored, with the scales for `bits` (all of them by default).

        The tensors are the module's own, or copies if the weight is prepared for a kernel.
        """
        chosen = bits if bits is not None else self.bits
        if self.prepared is not None:
            stored = self.prepared.unpack()
            return PlaneWeight(
                stored.planes[: max(chosen)],
                {value: stored.scales[value] for value in chosen},
                self.in_features,
                self.group_size,
            )
        scales: dict[int, Scales] = {}
        for value in chosen:
            tensors = {key: getattr(self, key) for key in self._scales_shapes(value)}
            scales[value] = make_scales(self.kind, value, tensors)
        planes = tuple(getattr(self, f"plane_{index}") for index in range(max(chosen)))
        return PlaneWeight(planes, scales, self.in_features, self.group_size)

    def _times(self, x: Tensor, bits: int | Tensor, arithmetic: str | None) -> Tensor:
        """x [..., K] @ W^T at `bits`, one value or one a row [rows].

        arithmetic: that to compute in, see `linear_in`; None for that of the kernel that runs.
        """
        if arithmetic is not None:
            return linear_in(arithmetic, x, self.prepared or self.plane_weight(), bits)
        if self.prepared is not None:
            (y,) = prepared_linear(x, [self.prepared], bits)
            return y
        if isinstance(bits, Tensor):
            return plane_linear_rows(x, self.plane_weight(), bits)
        return plane_linear(x, self.plane_weight((bits,)), bits)

    def bytes_read(self, bits: int) -> int:
        """Bytes of the stored tensors that a product at `bits` needs: planes 0..bits-1 and those scales."""
        scales = scales_bytes(self.kind, bits, self.out_features, self.in_features, self.group_size)
        return 4 * bits * self.out_features * words_per_row(self.in_features) + scales

    def prepare(self) -> None:
        """Re-lay the weight for the kernel that runs here, if it wants a layout of its own."""
        self._wants_layout = True
        placeholder = self._buffers["weight"]
        if self.prepared is not None or not self.bits or placeholder is None or placeholder.is_meta:
            return
        stored = self.plane_weight()
        if self.paged:
            prepared = self._without_pages()
            if prepared is not None:
                prepared = prepared.with_pages(self.bits[0], stored.planes, stored.scales[self.bits[0]])
        else:
            prepared = prepare(stored, placeholder.dtype)
        if prepared is not None:
            self.hold(prepared)

    def restore(self) -> None:
        """Bring the stored tensors back into the module; the opposite of `prepare`."""
        self._wants_layout = False
        if self.prepared is not None:
            self.hold(self.plane_weight())

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Inside, the module holds the stored tensors; afterwards the kernel's again, if it is to have them."""
        wants = self._wants_layout
        self.restore()
        try:
            yield
        finally:
            if wants:
                self.prepare()

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> PlaneWeight | PreparedWeight:
        """The weight at `bits` alone: the planes that the module holds as far as they go, shared, then `planes`.

        The module stays as it is. `planes` and `scales` in the stored order, on any device.
        """
        device = self.get_buffer("weight").device
        planes = [plane.to(device) for plane in planes]
        scales = map_scales(scales, lambda tensor, _: tensor.to(device))
        held = self.prepared if self.bits else self._without_pages()
        if held is not None:
            return held.with_pages(bits, planes, scales)
        kept = [getattr(self, f"plane_{index}") for index in range(min(bits, max(self.bits, default=0)))]
        return PlaneWeight((*kept, *planes), {bits: scales}, self.in_features, self.group_size)

    def hold(self, weight: PlaneWeight | PreparedWeight) -> None:
        """Hold `weight`, of this module's shape, and nothing else. What is computing with the former one keeps it."""
        buffers = {"weight": self._buffers["weight"]}
        if isinstance(weight, PlaneWeight):
            buffers |= weight.tensors()
            prepared = None
        else:
            prepared = weight
            held = [*weight.planes, *weight.scales.values()]
            buffers |= {f"{_PREPARED}{index}": tensor for index, tensor in enumerate(held)}
        self._non_persistent_buffers_set = {key for key in buffers if key.startswith(_PREPARED)}
        self._buffers, self.bits, self.prepared = buffers, weight.bits, prepared

    def _without_pages(self) -> PreparedWeight | None:
        placeholder = self.get_buffer("weight")
        return without_pages(
            self.kind,
            self.out_features,
            self.in_features,
            self.group_size,
            placeholder.device.type,
            placeholder.dtype,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared is not None:
            for key, tensor in self.plane_weight().tensors().items():
                destination[prefix + key] = tensor

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        with self._as_stored():
            super()._load_from_state_dict(*arguments, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never convert: `model.half()` or `.to(bfloat16)` must not round stored scales."""
        with self._as_stored():
            kept = {key: buffer for key, buffer in self._buffers.items() if buffer is not None and key != "weight"}
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for key, before in kept.items():
                after = self._buffers[key]
                if after is not None and after.dtype != before.dtype:
                    self._buffers[key] = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the stored tensors: the prepared ones belong to this machine's kernel."""
        state = self.__dict__.copy()
        if self.prepared is not None:
            kept = {key: buffer for key, buffer in self._buffers.items() if not key.startswith(_PREPARED)}
            state["_buffers"] = kept | self.plane_weight().tensors()
            state["_non_persistent_buffers_set"] = set()
            state["prepared"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._wants_layout:
            self.prepare()

    def extra_repr(self) -> str:
        bits = ",".join(map(str, self.bits))
        return f"{self.in_features}, {self.out_features}, bits={bits}, group_size={self.group_size}, {self.kind}"
