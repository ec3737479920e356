"""One pool of threads: shared by all callers, however many threads they ask for, and lost in a fork."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random_weight

from bitstrata.kernels import registry
from bitstrata.kernels.cpu import BlockedWeight
from bitstrata.kernels.cpu.extension import native

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")
BEST = next(name for name, runs, _ in native.instruction_sets() if runs) if native else ""
N, K = 600, 1024  # 38 blocks: more than the threads that share them
PAUSES = (0, 0, 50e-6, 1e-3)  # seconds: threads at work, about to fall asleep, asleep
FORKS = 20
PATIENCE = 10  # seconds that a child may take for what takes milliseconds


@pytest.fixture
def problem(seed):
    """A kernel, weights, activations, and the results of one thread."""
    kernel = registry._KERNELS[f"{BEST}-int8"]
    weights = [BlockedWeight.pack(random_weight(N + i, K, seed=seed + i)) for i in range(4)]
    xs = [torch.randn(i + 3, K, generator=torch.Generator().manual_seed(seed + i)) for i in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [kernel.linear(x, weight, 3) for x, weight in zip(xs, weights, strict=True)]
    yield kernel, weights, xs, expected
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("callers", [2, 4])
def test_calls_from_several_threads(problem, count, callers):
    kernel, weights, xs, expected = problem
    torch.set_num_threads(count)

    def work(caller):
        torch.set_num_threads(count)  # OpenMP keeps it for each thread
        return all(torch.equal(kernel.linear(xs[caller], weights[caller], 3), expected[caller]) for _ in range(25))

    with ThreadPoolExecutor(callers) as pool:
        assert all(pool.map(work, range(callers)))


def test_packing_and_decoding_from_several_threads(problem):
    _, weights, _, _ = problem
    expected = [weight.unpack() for weight in weights]

    def work(caller):
        torch.set_num_threads(2)
        packed = BlockedWeight.pack(expected[caller])
        return all(map(torch.equal, packed.planes, weights[caller].planes))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_computes_and_exits(problem):
    """The pool's threads are not in the child, whatever they were about; data loaders and servers fork."""
    kernel, weights, xs, expected = problem
    torch.set_num_threads(3)
    for pause in PAUSES * FORKS:
        for _ in range(10):
            assert torch.equal(kernel.linear(xs[0], weights[0], 3), expected[0])
        time.sleep(pause)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            right = all(torch.equal(kernel.linear(xs[1], weights[1], 3), expected[1]) for _ in range(20))
            os._exit(0 if right else 3)
        status = os.waitpid(child, 0)[1]
        assert not os.WIFSIGNALED(status), f"the child hung: signal {os.WTERMSIG(status)}"
        assert os.WEXITSTATUS(status) == 0, "the child's result is wrong"
    assert torch.equal(kernel.linear(xs[0], weights[0], 3), expected[0]), "the parent goes on"
