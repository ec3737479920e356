"""Native CPU kernels: AVX-512 VNNI, AVX-VNNI, AVX2, NEON and a scalar one, chosen at run time."""

from ..registry import register
from .blocked import BlockedWeight
from .extension import choose_codes, missing, read_all
from .kernel import FEW_ROWS, CpuKernel, cpu_kernels

for _kernel in cpu_kernels():
    register(_kernel)

__all__ = ["FEW_ROWS", "BlockedWeight", "CpuKernel", "choose_codes", "missing", "read_all"]
