"""Which kernel is chosen, why, and how a person forces one."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from bitstrata.errors import KernelError
from bitstrata.kernels import KernelReport, Problem, describe, plane_linear, registry, select
from bitstrata.kernels.registry import register

FLOAT = "cpu", torch.float32
HALF = "cpu", torch.float16


class Constant:
    """A kernel that answers with its priority, for float32 only."""

    def __init__(self, name, priority):
        self.name, self.priority = name, priority

    def can_run(self, problem):
        return None if problem.dtype == torch.float32 else f"{problem.dtype} is too small"

    def linear(self, x, weight, bits):
        return x.new_full((x.shape[0], weight.out_features), self.priority)

    def linear_rows(self, x, weight, row_bits):
        return self.linear(x, weight, 0)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The real reference kernel and two more, in a table of the test's own."""
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_KERNELS", {"reference": registry._KERNELS["reference"]})
    register(Constant("slow", 5))
    register(Constant("fast", 9))


def test_the_highest_priority_that_can_run_is_chosen():
    assert select(FLOAT).name == "fast"
    assert select(HALF).name == "reference"


def test_the_op_runs_what_select_chooses():
    weight = random_weight(3, 33)
    assert pack(weight).linear(torch.randn(2, 33), 2).unique().tolist() == [9.0]


def test_describe_lists_every_kernel_best_first_with_its_reason():
    assert describe(HALF) == [
        KernelReport("fast", 9, "torch.float16 is too small"),
        KernelReport("slow", 5, "torch.float16 is too small"),
        KernelReport("reference", 0, None),
    ]
    assert [report.reason for report in describe(FLOAT)] == [None, None, None]


def test_no_kernel_at_all_is_an_error_that_shows_the_problem():
    with pytest.raises(KernelError, match=r"no kernel can run Problem\(.*torch\.int8"):
        select("cpu", torch.int8)


def test_a_forced_kernel_is_taken_whatever_its_priority(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "slow")
    assert select(FLOAT).name == "slow"
    weight = random_weight(3, 33)
    assert pack(weight).linear(torch.randn(2, 33), 2).unique().tolist() == [5.0]


def test_a_forced_kernel_that_cannot_run_is_never_replaced(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "fast")
    with pytest.raises(KernelError, match=r"BITSTRATA_KERNEL=fast cannot run here: torch\.float16 is too") as caught:
        select(HALF)
    assert "unset BITSTRATA_KERNEL" in caught.value.hint


def test_forcing_a_kernel_that_does_not_exist_lists_those_that_do(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "warp")
    with pytest.raises(KernelError, match="BITSTRATA_KERNEL=warp is not a kernel") as caught:
        select(FLOAT)
    assert caught.value.hint == "kernels: fast, reference, slow"


def test_an_empty_variable_forces_nothing(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "")
    assert select(FLOAT).name == "fast"


def test_two_kernels_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'fast' is registered twice"):
        register(Constant("fast", 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_the_reference_runs_every_floating_dtype(dtype, scales):
    assert registry._KERNELS["reference"].can_run("cpu", dtype) is None


def test_the_reference_says_why_it_cannot_run_integers():
    reason = registry._KERNELS["reference"].can_run("cpu", torch.int32)
    assert reason == "activations are torch.int32, not floating point"
