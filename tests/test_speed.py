"""A guard of speed: one shape, as a share of the bandwidth of memory. Runs alone (make speed)."""

from __future__ import annotations

import os

import pytest
from instruction_sets import BEST

import bitstrata

pytestmark = [pytest.mark.speed, pytest.mark.skipif(not BEST, reason="the native kernels are not built")]
EXPECTED = 0.9  # docs/guides/speed.md; other machines and busy ones have less, hence half of it


def test_a_product_reads_memory_at_half_of_the_expected_share_at_least(capsys):
    threads = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found = bitstrata.bench(
        shapes="4096x4096", bits="2,4", rows="1", regimes=["memory"], rounds=5, threads=threads, device="cpu"
    )
    shares = {row.name: row.share for row in found.linear if row.bits is not None}
    with capsys.disabled():
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        said = f"share of {found.bandwidth / 1e9:.1f} GB/s with {threads} threads, kernel {found.kernel}: {shown}"
        print(f"\n{said}")  # noqa: T201
    assert min(shares.values()) > EXPECTED / 2, shares
