"""vLLM with the plugin, over HTTP: the tokens of every request are those of transformers' `generate` at its bits."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from vllm_reference import expected_tokens
from vllm_server import EAGER, ONE_THREAD, PER_REQUEST, SMALL_BLOCKS, TRACED, WARMED_UP, Server, refusal, serving

from bitstrata.checkpoint import CheckpointReader

pytestmark = pytest.mark.vllm
COUNT = 24
BITS = (2, 3, 4, None)


@pytest.fixture(scope="session")
def cases() -> list[tuple[list[int], int | None]]:
    """24 prompts of 3 to 120 tokens, and their bits."""
    draw = random.Random(5)
    lengths = [3, 17, 40, 120, 7, 64] * 4
    return [([draw.randrange(2, 4096) for _ in range(size)], BITS[i % 4]) for i, size in enumerate(lengths)]


@pytest.fixture(scope="session")
def expected(checkpoint, cases, tmp_path_factory) -> list[list[int]]:
    answers = expected_tokens({"demo": (checkpoint, cases)}, COUNT, tmp_path_factory)["demo"]
    assert len({tuple(answer) for answer in answers}) > 12  # else equal tokens would say little
    return answers


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(checkpoint, log, *PER_REQUEST, *SMALL_BLOCKS) as one:  # its graph is compiled
        yield one


def test_24_requests_at_mixed_bits_are_each_what_generate_makes(server: Server, cases, expected):
    assert server.many(cases, COUNT) == expected


@pytest.mark.parametrize("bits", [1, 5, 9, -1, 2.5, "3", [2]], ids=repr)
def test_bits_that_are_not_there_are_refused_and_the_server_goes_on(server: Server, cases, expected, bits):
    body = {"prompt": cases[0][0], "max_tokens": 2, "vllm_xargs": {"bits": bits}}
    status, answer = server.post("/v1/completions", body)
    assert status == 400
    assert "supported bits: 2, 3, 4" in answer["error"]["message"]
    assert server.tokens(cases[0][0], COUNT, cases[0][1]) == expected[0]


def test_a_prefix_is_shared_at_the_same_bits_only(server: Server):
    prompt = [7, 11, 13, 17] * 40

    def hits(bits: int | None) -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        server.tokens(prompt, 2, bits)
        return server.metric("vllm:prefix_cache_hits_total") - before

    assert [hits(2), hits(3)] == [0, 0]
    assert hits(2) > 100
    assert hits(None) == 0  # the default is 4
    assert hits(4) > 100


def test_two_workers_that_share_each_layer(checkpoint, cases, expected, tmp_path):
    flags = (*PER_REQUEST, *SMALL_BLOCKS, EAGER, "--tensor-parallel-size", "2")
    with serving(checkpoint, tmp_path / "log", *flags, env=ONE_THREAD) as server:
        assert server.many(cases, COUNT) == expected


def test_two_workers_with_half_of_the_layers_each(checkpoint, cases, expected, tmp_path):
    """Through our load format, at the operator's default, and with the files above its limit not there."""
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    for gone in ("model-plane-3.safetensors", "model-bits-4.safetensors"):
        (small / gone).unlink()
    options = json.dumps({"bitstrata": {"bits": 2, "max_bits": 3}})
    flags = (*PER_REQUEST, *SMALL_BLOCKS, "--load-format", "bitstrata", "--hf-overrides", options)
    stages = ("--pipeline-parallel-size", "2", "--gpu-memory-utilization", "0.1")  # the latter of main memory
    kept = [(i, bits) for i, (_, bits) in enumerate(cases) if bits in (2, 3)]
    with serving(small, tmp_path / "log", *flags, *stages, *TRACED, env=ONE_THREAD | WARMED_UP) as server:
        asked = [(cases[i][0], None if bits == 2 else bits) for i, bits in kept]
        assert server.many(asked, COUNT) == [expected[i] for i, _ in kept]
        status, answer = server.post("/v1/completions", {"prompt": [5], "max_tokens": 1, "vllm_xargs": {"bits": 4}})
        assert status == 400
        assert "supported bits: 2, 3" in answer["error"]["message"]


def test_a_missing_file_is_named_before_the_server_starts(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model-plane-1.safetensors").unlink()
    assert "shard model-plane-1.safetensors is missing" in refusal(broken)


def test_a_later_format_is_refused_by_its_number(checkpoint, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    later = tmp_path / "later"
    shutil.copytree(checkpoint, later)
    config = json.loads((later / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (later / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="format_version 99; this bitstrata reads up to"):
        EngineArgs(model=str(later), dtype="float32").create_engine_config()
    assert CheckpointReader(checkpoint).bits == (2, 3, 4)
