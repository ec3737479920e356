"""Types of the native extension, native/module.cpp and step_module.cpp.

Addresses are `Tensor.data_ptr()`; types are 0 fp32, 1 fp16, 2 bf16.
"""

from typing import Any

class Weight:
    def __init__(self, rows: int, columns: int, group_size: int, codebook: bool, bytes: bool) -> None: ...
    @property
    def plane_bytes(self) -> int: ...
    def scales_bytes(self, bits: int) -> int: ...
    def set_plane(self, index: int, address: int) -> None: ...
    def set_scales(self, bits: int, address: int) -> None: ...
    def pack_plane(self, words: int, plane: int, threads: int) -> None: ...
    def unpack_plane(self, plane: int, words: int, threads: int) -> None: ...
    def pack_scales(self, bits: int, scale: int, offset: int, unit: int, out: int) -> None: ...
    def unpack_scales(self, bits: int, scale: int, offset: int, unit: int) -> None: ...
    def decode_rows(self, isa: str, bits: int, index: int, count: int, out: int, type: int, threads: int) -> None: ...
    def decode(self, isa: str, bits: int, first: int, last: int, out: int, type: int, threads: int) -> None: ...

class Step:
    """A step of a whole model; the dictionaries have the names of native/step.h's members."""

    def __init__(
        self,
        isa: str,
        hidden: int,
        blocks: list[dict[str, Any]],
        last: dict[str, Any],
        head: dict[str, Any],
        logit_softcap: float,
    ) -> None: ...
    def set_caches(
        self,
        keys: list[int],
        values: list[int],
        key_meanings: list[int],
        value_meanings: list[int],
        type: int,
        bits: int,
        tokens: int,
    ) -> None: ...
    def run(
        self,
        x: int,
        start: list[int],
        position: list[int],
        bits: int,
        cosine: list[int],
        sine: list[int],
        first_block: int,
        last_block: int,
        wanted: list[int],
        logits: int,
        threads: int,
        exact: bool,
    ) -> None: ...

def instruction_sets() -> tuple[tuple[str, bool, str], ...]: ...
def read_all(address: int, bytes: int, threads: int) -> int: ...
def linear(
    isa: str,
    weights: list[Weight],
    x: int,
    type: int,
    stride: int,
    rows: int,
    bits: int,
    row_bits: int,
    y: list[int],
    threads: int,
    exact: bool,
) -> None: ...
def choose_codes(
    rows: int, columns: int, tracks: list[tuple[int, int, int, int, int]], codes: int, given: bool, threads: int
) -> None: ...
def fit_codes(
    rows: int,
    columns: int,
    bits: int,
    codes: int,
    metric: int,
    residual: int,
    ridge: float,
    step: int,
    threads: int,
) -> None: ...
def gram_runs() -> bool: ...
def add_gram(
    x: int, y: int, total: int, rows: int, x_columns: int, y_columns: int, upper: bool, threads: int
) -> None: ...
def meet(threads: int, fail: bool) -> int: ...  # for tests of the pool of threads
