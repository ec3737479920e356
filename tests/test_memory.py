"""Memory of its own: whole, writable, where it was asked to lie, and gone when it is dropped."""

from __future__ import annotations

import errno
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from bitstrata.memory import HUGE_PAGE, OWN_MAPPING, allocate, is_out_of_memory

SIZES = [0, 1, OWN_MAPPING - 1, OWN_MAPPING, OWN_MAPPING + 1, HUGE_PAGE - 64, HUGE_PAGE, 3 * HUGE_PAGE + 5]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 64, 2560])
def test_it_is_as_large_as_asked_and_lies_where_asked(size, start):
    memory = allocate(size, start)
    assert (memory.dtype, memory.shape, memory.is_contiguous()) == (torch.uint8, (size,), True)
    memory.fill_(7)
    assert bool((memory == 7).all())
    if size:
        assert memory.data_ptr() % 64 == 0
    if size >= OWN_MAPPING:
        assert memory.data_ptr() % 4096 == start
    if size >= HUGE_PAGE:
        assert memory.data_ptr() % HUGE_PAGE == start


def test_two_share_nothing_and_a_view_keeps_the_whole():
    first, second = allocate(OWN_MAPPING), allocate(OWN_MAPPING)
    first.fill_(1), second.fill_(2)
    view = first[-10:]
    del first
    gc.collect()
    allocate(OWN_MAPPING).fill_(3)
    assert bool((view == 1).all())
    assert bool((second == 2).all())


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_what_is_dropped_goes_back_to_the_system():
    def resident():
        gc.collect()
        return 1024 * int(re.search(r"^RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1])

    before = resident()
    held = [allocate(300_000, 320).fill_(1) for _ in range(200)]  # a size that the C library would keep
    kept = torch.ones(1000)  # above them on its heap
    assert resident() - before > 55_000_000
    del held
    assert resident() - before < 5_000_000
    assert kept.sum() == 1000


def test_torch_and_the_system_are_understood_when_they_refuse_memory():
    for refused in (
        lambda: torch.empty(1 << 50, dtype=torch.uint8),
        lambda: bytearray(1 << 60),
        lambda: torch.empty(1 << 62, dtype=torch.uint8),
    ):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            refused()
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to ..."),
        RuntimeError("unable to mmap 12 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Cannot allocate memory (os error 12)"),
    ],
)
def test_every_way_to_say_that_memory_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
        KeyError("memory"),
        SafetensorError("Error while deserializing header: HeaderTooLarge"),
    ],
)
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)
