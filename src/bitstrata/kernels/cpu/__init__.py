"""Native CPU kernels: AVX-512 VNNI, AVX-VNNI, AVX2, NEON and a scalar one, chosen at run time."""

from ..registry import LACKING, register
from .blocked import FEW_ROWS, BlockedWeight
from .extension import add_gram, choose_codes, fit_codes, gram_runs, missing, read_all
from .kernel import cpu_kernels

for _kernel in cpu_kernels():
    register(_kernel)
if missing:
    LACKING["cpu"] = (
        f"CPU kernels cannot be used: {missing}. The reference kernel is many times slower; install "
        "bitstrata again where there is a C++17 compiler (GCC or Clang)."
    )

__all__ = ["FEW_ROWS", "BlockedWeight", "add_gram", "choose_codes", "fit_codes", "gram_runs", "missing", "read_all"]
