"""vLLM with the plugin, over HTTP: the tokens of every request are those of transformers' `generate` at its bits."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_reference import expected_tokens
from vllm_server import (
    EAGER,
    NAMES,
    ONE_THREAD,
    PER_REQUEST,
    SMALL_BLOCKS,
    TRACED,
    WARMED_UP,
    Server,
    refusal,
    serving,
)

from bitstrata.checkpoint import CheckpointReader

pytestmark = pytest.mark.vllm
COUNT = 24
PLACES = 24  # of requests that run at a time
COUNTS = "PROMETHEUS_MULTIPROC_DIR"
PLAN = "mixed"
BITS = (2, 3, 4, None, PLAN)
NAME = "OUT"  # and OUT:2, OUT:mixed


@pytest.fixture(scope="session")
def cases() -> list[tuple[list[int], int | str | None]]:
    """24 prompts of 3 to 120 tokens, and their bits or plan."""
    draw = random.Random(5)
    lengths = [3, 17, 40, 120, 7, 64] * 4
    return [([draw.randrange(2, 4096) for _ in range(size)], BITS[i % 5]) for i, size in enumerate(lengths)]


@pytest.fixture(scope="session")
def expected(checkpoint, plan, cases, tmp_path_factory) -> list[list[int]]:
    answers = expected_tokens({"demo": (checkpoint, cases)}, COUNT, tmp_path_factory, {PLAN: plan})["demo"]
    assert len({tuple(answer) for answer in answers}) > 12  # else equal tokens would say little
    return answers


def options(**given) -> tuple[str, str]:
    return "--hf-overrides", json.dumps({"bitstrata": given})


@pytest.fixture(scope="module")
def server(checkpoint, plan, tmp_path_factory):
    """A server with all that the plugin has for requests; its graph is compiled."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "counts").mkdir()
    (folder / "template").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    lowers = "load:target_ms=60000,queue=4,dwell_ms=0"  # by the queue alone
    flags = (
        *PER_REQUEST,
        *SMALL_BLOCKS,
        *options(plans={PLAN: str(plan)}, policy=lowers),
        *("--middleware", NAMES, "--served-model-name", NAME, *(f"{NAME}:{one}" for one in (2, 3, 4, PLAN))),
        *("--max-num-seqs", str(PLACES), "--chat-template", str(folder / "template")),
    )
    with serving(checkpoint, folder / "log", *flags, env={COUNTS: str(folder / "counts")}, name=NAME) as one:
        yield one


def test_24_requests_at_mixed_bits_are_each_what_generate_makes(server: Server, cases, expected):
    assert server.many(cases, COUNT) == expected


BODIES = {
    "/v1/completions": {"prompt": "def f(", "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "def f("}], "max_tokens": 8, "temperature": 0},
    "/v1/responses": {"input": "def f(", "max_output_tokens": 8, "temperature": 0},
}


def text_of(answer: dict) -> str:
    """Of an answer at any of these paths."""
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", BODIES)
def test_bits_and_plans_that_are_not_there_are_refused_and_the_server_goes_on(server: Server, cases, expected, path):
    for wrong in (
        *({"bits": bits} for bits in (1, 5, 9, -1, 2.5, "3", [2])),
        *({"plan": plan} for plan in ("none", 3)),
        {"bits": 2, "plan": PLAN},
        {"bits": 2, "min_bits": 3},
    ):
        status, answer = server.post(path, BODIES[path] | {"vllm_xargs": wrong})
        assert status == 400, wrong
        message = answer["error"]["message"]
        assert "supported bits: 2, 3, 4; plans: mixed" in message or "give one of them" in message
    assert server.tokens(cases[0][0], COUNT, cases[0][1]) == expected[0]


@pytest.mark.parametrize("path", BODIES)
def test_the_name_of_the_model_and_fields_of_the_body_say_the_bits_too(server: Server, path):
    def text(**fields) -> str:
        status, answer = server.post(path, BODIES[path] | fields)
        assert status == 200, answer
        return text_of(answer)

    asked = {bits: text(vllm_xargs={"plan" if bits == PLAN else "bits": bits}) for bits in (2, 3, 4, PLAN)}
    assert len(set(asked.values())) > 2
    assert {bits: text(model=f"{NAME}:{bits}") for bits in asked} == asked
    assert {bits: text(bits=bits) for bits in asked} == asked
    status, answer = server.post(path, BODIES[path] | {"model": f"{NAME}:2", "bits": 3})
    assert (status, "bits is given as 3 and as 2" in answer["error"]["message"]) == (400, True)
    assert server.post(path, BODIES[path] | {"model": f"{NAME}:7"})[0] == 404


def test_an_answer_in_pieces_is_the_same(server: Server):
    path = "/v1/chat/completions"
    asked = BODIES[path] | {"model": f"{NAME}:2"}
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in server.stream(path, asked)]
    assert len(pieces) > 4
    assert "".join(pieces) == text_of(server.post(path, asked)[1])


def test_a_burst_starts_at_fewer_bits_where_requests_allow_it(server: Server):
    draw = random.Random(9)
    prompt = [draw.randrange(2, 4096) for _ in range(96)]  # whose beginning they share, each at its own bits
    alone = {bits: server.tokens(prompt, COUNT, bits) for bits in (2, 3, 4)}
    assert len({tuple(tokens) for tokens in alone.values()}) == 3

    def counted() -> dict[int, float]:
        return {bits: server.metric("bitstrata_requests_total", f'bits="{bits}"') for bits in alone}

    before, made = counted(), server.metric("bitstrata_tokens_by_bits_total")
    with ThreadPoolExecutor(4 * PLACES) as pool:
        limits = [2, None] * (2 * PLACES)
        answers = list(pool.map(lambda least: server.tokens(prompt, COUNT, 4, min_bits=least), limits))
    assert all(answer == alone[4] for answer, least in zip(answers, limits, strict=True) if least is None)
    served = [next(bits for bits, tokens in alone.items() if tokens == answer) for answer in answers]
    assert {2, 4} <= set(served)
    assert {bits: count - before[bits] for bits, count in counted().items()} == {
        bits: served.count(bits) for bits in alone
    }
    assert server.metric("bitstrata_tokens_by_bits_total") - made == COUNT * len(answers)
    assert server.metric("bitstrata_policy_steps") == 0
    assert server.tokens(prompt, COUNT, 4, min_bits=2) == alone[4]  # there is room again


def test_a_prefix_is_shared_at_the_same_bits_only(server: Server):
    prompt = [7, 11, 13, 17] * 40

    def hits(bits: int | str | None) -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        server.tokens(prompt, 2, bits)
        return server.metric("vllm:prefix_cache_hits_total") - before

    assert [hits(2), hits(3), hits(PLAN)] == [0, 0, 0]
    assert hits(2) > 100
    assert hits(None) == 0  # the default is 4
    assert hits(4) > 100
    assert hits(PLAN) > 100


def test_two_workers_that_share_each_layer(checkpoint, plan, cases, expected, tmp_path):
    flags = (*PER_REQUEST, *SMALL_BLOCKS, EAGER, "--tensor-parallel-size", "2", *options(plans={PLAN: str(plan)}))
    with serving(checkpoint, tmp_path / "log", *flags, env=ONE_THREAD) as server:
        assert server.many(cases, COUNT) == expected


def test_two_workers_with_half_of_the_layers_each(checkpoint, cases, expected, tmp_path):
    """Through our load format, at the operator's default, and with the files above its limit not there."""
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    for gone in ("model-plane-3.safetensors", "model-bits-4.safetensors"):
        (small / gone).unlink()
    flags = (*PER_REQUEST, *SMALL_BLOCKS, "--load-format", "bitstrata", *options(bits=2, max_bits=3))
    stages = ("--pipeline-parallel-size", "2", "--gpu-memory-utilization", "0.1")  # the latter of main memory
    kept = [(i, bits) for i, (_, bits) in enumerate(cases) if bits in (2, 3)]
    with serving(small, tmp_path / "log", *flags, *stages, *TRACED, env=ONE_THREAD | WARMED_UP) as server:
        asked = [(cases[i][0], None if bits == 2 else bits) for i, bits in kept]
        assert server.many(asked, COUNT) == [expected[i] for i, _ in kept]
        status, answer = server.post("/v1/completions", {"prompt": [5], "max_tokens": 1, "vllm_xargs": {"bits": 4}})
        assert status == 400
        assert "supported bits: 2, 3" in answer["error"]["message"]


def test_drafts_of_the_same_planes_change_no_token(checkpoint, cases, expected, tmp_path):
    drafts = {"method": "draft_model", "model": str(checkpoint), "num_speculative_tokens": 4}
    flags = (*SMALL_BLOCKS, EAGER, "--load-format", "bitstrata", "--speculative-config", json.dumps(drafts))
    kept = [i for i, (_, bits) in enumerate(cases) if bits in (4, None)]
    with serving(checkpoint, tmp_path / "log", *flags) as server:
        assert server.many([(cases[i][0], None) for i in kept], COUNT) == [expected[i] for i in kept]
        made, taken = (server.metric(f"vllm:spec_decode_num_{one}_tokens_total") for one in ("draft", "accepted"))
    assert 0 < taken < made  # drafts are at 2 bits, so some are wrong


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
