"""One pool of threads: shared by all callers, however many threads they ask for, and lost in a fork."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random_weight

from bitstrata.kernels import pack
from bitstrata.kernels.cpu.extension import native

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")
BEST = next(name for name, runs, _ in native.instruction_sets() if runs) if native else ""
N, K = 600, 1024  # 38 blocks: more than the threads that share them
FORKS = 200
PATIENCE = 20  # seconds that a child may take for what takes milliseconds


@pytest.fixture
def problem(seed):
    """Weights, activations, and the results of one thread."""
    weights = [pack(random_weight(N + i, K, seed=seed + i), kernel=f"{BEST}-int8") for i in range(4)]
    xs = [torch.randn(i + 3, K, generator=torch.Generator().manual_seed(seed + i)) for i in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [weight.linear(x, 3) for x, weight in zip(xs, weights, strict=True)]
    yield weights, xs, expected
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("callers", [2, 4])
def test_calls_from_several_threads(problem, count, callers):
    weights, xs, expected = problem
    torch.set_num_threads(count)

    def work(caller):
        torch.set_num_threads(count)  # OpenMP keeps it for each thread
        return all(torch.equal(weights[caller].linear(xs[caller], 3), expected[caller]) for _ in range(25))

    with ThreadPoolExecutor(callers) as pool:
        assert all(pool.map(work, range(callers)))


def test_packing_and_decoding_from_several_threads(problem):
    weights, _, _ = problem
    expected = [weight.stored() for weight in weights]

    def work(caller):
        torch.set_num_threads(2)
        packed = pack(expected[caller], kernel=f"{BEST}-int8")
        return all(map(torch.equal, packed.planes, weights[caller].planes))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 5))


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def fork(work):
    """The process id of a child that does `work` and exits; what goes wrong there is in its status."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return child


def ended(child):
    """How `child` ended, once it has: "well", "wrong", or by which signal."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"hung, or ended by signal {os.WTERMSIG(status)}"
    return "well" if os.WEXITSTATUS(status) == 0 else "wrong"


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_out_of_memory_in_a_thread_of_the_pool_reaches_the_caller(problem):
    """In a process of its own: an exception that leaves a thread ends the process."""
    weights, xs, expected = problem

    def out_of_memory():
        for _ in range(20):
            with pytest.raises(MemoryError):
                native.meet(3, True)
            assert native.meet(3, False) == 3, "the pool goes on with all its threads"
        torch.set_num_threads(3)
        assert torch.equal(weights[0].linear(xs[0], 3), expected[0])

    assert ended(fork(out_of_memory)) == "well"


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_children_forked_while_the_threads_fall_asleep(problem, seed):
    """The pool's threads are not in the child, whatever they were about; data loaders and servers fork.

    Eight threads fall asleep some 50 us after a call; a child that inherited their pool hung in 2 of 100 forks then.
    """
    weights, xs, expected = problem
    torch.set_num_threads(8)
    moment = random.Random(seed)

    def child():
        assert all(torch.equal(weights[1].linear(xs[1], 3), expected[1]) for _ in range(3))

    children = []
    for _ in range(FORKS):
        for _ in range(3):
            assert torch.equal(weights[0].linear(xs[0], 3), expected[0])
        until = time.perf_counter() + moment.uniform(0, 150e-6)
        while time.perf_counter() < until:
            pass
        children.append(fork(child))
        if len(children) == 10:  # those that hang do so side by side
            assert {ended(child) for child in children} == {"well"}
            children = []
    assert torch.equal(weights[0].linear(xs[0], 3), expected[0]), "the parent goes on"


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_children_forked_while_another_thread_computes(problem):
    weights, xs, expected = problem
    torch.set_num_threads(3)
    stop = threading.Event()

    def compute():
        torch.set_num_threads(3)
        while not stop.is_set():
            weights[0].linear(xs[0], 3)

    def child():
        assert all(torch.equal(weights[1].linear(xs[1], 3), expected[1]) for _ in range(3))

    with ThreadPoolExecutor(1) as other:
        computing = other.submit(compute)
        try:
            ends = {ended(fork(child)) for _ in range(40)}
        finally:
            stop.set()
        computing.result()
    assert ends == {"well"}


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_has_threads_of_its_own_and_so_has_its_child(problem):
    weights, xs, expected = problem
    torch.set_num_threads(3)
    assert native.meet(3, False) == 3

    def grandchild():
        assert native.meet(4, False) == 4
        assert torch.equal(weights[2].linear(xs[2], 3), expected[2])

    def child():
        assert native.meet(3, False) == 3
        assert torch.equal(weights[1].linear(xs[1], 3), expected[1])
        assert ended(fork(grandchild)) == "well"

    assert ended(fork(child)) == "well"
    assert native.meet(3, False) == 3
