"""A block's weights seen in another way, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor


class Widened(Mapping[str, Tensor]):
    """Weights in fp32, each made when it is asked for; `stored`: as they are in memory."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class Some(Mapping[str, Tensor]):
    """Those of `weights` that are in `names`."""

    def __init__(self, weights: Mapping[str, Tensor], names: Collection[str]) -> None:
        self._weights, self._names = weights, [name for name in weights if name in names]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
