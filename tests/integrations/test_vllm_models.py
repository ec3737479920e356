"""Tiny models of several architectures in vLLM, over HTTP: the tokens of every request are those of `generate`.

Servers are started two at a time where one does not need all cores: what takes long is that they import torch and vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from vllm_models import MODELS, quantized
from vllm_reference import expected_tokens
from vllm_server import EAGER, ONE_THREAD, PER_REQUEST, SMALL_BLOCKS, TRACED, WARMED_UP, refusal, serving

pytestmark = pytest.mark.vllm
COUNT = 24
BITS = (2, 3, 4, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: quantized(name, folder / name) for name in MODELS}


@pytest.fixture(scope="module")
def cases() -> list[tuple[list[int], int | None]]:
    draw = random.Random(5)
    lengths = [3, 17, 40, 120, 7, 64] * 2
    return [([draw.randrange(3, 64) for _ in range(size)], BITS[i % 4]) for i, size in enumerate(lengths)]


@pytest.fixture(scope="module")
def expected(models, cases, tmp_path_factory) -> dict[str, list[list[int]]]:
    found = expected_tokens({name: (model, cases) for name, model in models.items()}, COUNT, tmp_path_factory)
    for name, answers in found.items():
        assert len({tuple(answer) for answer in answers}) > 6, name  # else equal tokens would say little
    return found


def together(*checks: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(checks)) as pool:
        for done in [pool.submit(check) for check in checks]:
            done.result()


@pytest.fixture
def check(models, cases, expected, tmp_path) -> Callable[..., None]:
    """Called with a model's name and flags: serves it and compares all answers."""

    def call(name: str, *flags: str, env: dict[str, str | None] | None = None) -> None:
        flags = (*PER_REQUEST, *SMALL_BLOCKS, *flags)
        with serving(models[name], tmp_path / f"{name}.log", *flags, env=ONE_THREAD | (env or {})) as server:
            assert server.many(cases, COUNT) == expected[name], name

    return call


def test_a_head_of_its_own_and_a_tied_one(check):
    together(partial(check, "llama", EAGER), partial(check, "qwen3", EAGER))


def test_windows_and_experts_beside_a_shared_one(check):
    together(partial(check, "gemma3", EAGER), partial(check, "qwen2_moe", EAGER))


def test_two_workers_that_share_each_expert(check):
    check("qwen3_moe", EAGER, "--tensor-parallel-size", "2")


def test_what_two_workers_cannot_share_is_named_before_it_is_loaded(models):
    def refused(name: str, said: str, *flags: str) -> None:
        printed = refusal(models[name], EAGER, "--tensor-parallel-size", "2", *flags, env=ONE_THREAD)
        assert said in printed, printed[-6000:]

    cut = "layers.0.mlp.shared_expert.down_proj: 96 input features cannot be cut for 2 workers"
    spread = "layers.0.mlp.experts: experts in planes cannot be spread over workers"
    together(partial(refused, "qwen2_moe", cut), partial(refused, "qwen3_moe", spread, "--enable-expert-parallel"))


def test_two_workers_with_half_of_the_layers_each_experts_in_a_compiled_graph(check):
    stages = ("--pipeline-parallel-size", "2", "--gpu-memory-utilization", "0.1")  # the latter of main memory
    check("qwen3_moe", *stages, *TRACED, env=WARMED_UP)
