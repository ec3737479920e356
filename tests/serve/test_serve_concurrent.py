"""Many requests at once: each gets the answer that it would get alone, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import random
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from http_calls import CHAT, COMPLETIONS, events, eventually, read_all


def test_every_one_of_24_requests_gets_what_it_gets_alone(server, texts, alone, tokenizer, seed):
    chance = random.Random(seed)
    work = []
    for _ in range(24):
        start = chance.randrange(len(texts) - 8)
        prompt = "\n".join(texts[start : start + chance.randint(1, 6)])[: chance.randint(1, 300)]
        work.append((prompt, chance.choice((2, 3, 4)), chance.randint(1, 30), chance.random() < 0.5))
    expected = [alone(prompt, bits, new) for prompt, bits, new, _ in work]

    def ask(item) -> tuple[list[int], str, dict[str, int]]:
        prompt, bits, new, stream = item
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "return_token_ids": True, "stream": stream}
        if stream:
            body |= {"model": f"small:{bits}", "stream_options": {"include_usage": True}}
            connection = server.connect(COMPLETIONS, body)
            *data, done = events(read_all(connection))
            connection.close()
            assert done == "[DONE]"
            chunks = [json.loads(item) for item in data]
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
            ids = [token for choice in choices for token in choice["token_ids"]]
            return ids, "".join(choice["text"] for choice in choices), chunks[-1]["usage"]["bits"]
        reply = server.post(COMPLETIONS, {**body, "bits": bits}).json
        return reply["choices"][0]["token_ids"], reply["choices"][0]["text"], reply["usage"]["bits"]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, work))
    for (_, bits, _, _), tokens, (ids, text, counts) in zip(work, expected, answers, strict=True):
        assert ids == tokens
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert counts == {str(bits): len(tokens)}
    assert server.is_idle()


def test_a_slow_start_of_one_does_not_hold_up_others(server):
    """The event loop never waits for the engine: while it is busy, health and models are answered."""
    long = {"prompt": [5] * 900, "max_tokens": 100, "ignore_eos": True, "stream": True}
    connections = [server.connect(COMPLETIONS, long) for _ in range(4)]
    eventually(lambda: server.engine.stats().running > 0, "a busy engine")
    answered = 0
    while server.engine.stats().running and answered < 20:
        assert server.get("/health").status == server.get("/v1/models").status == 200
        answered += 1
    assert answered == 20
    for connection in connections:
        connection.close()
    eventually(server.is_idle, "an idle engine")


def test_bits_that_change_on_the_way_are_counted(server):
    """As a policy would, from the engine's side: half of the tokens at 4 bits, then 2."""
    started = []
    submit = server.engine.submit

    def watched(request, listener):
        def change(event):
            listener(event)
            if started and len(started[0].tokens) == 3:
                started[0].set_bits(2)

        handle = submit(request, change)
        started.append(handle)
        return handle

    body = {"messages": [{"role": "user", "content": "import"}], "max_tokens": 8, "ignore_eos": True}
    server.engine.submit = watched
    try:
        whole = server.post(CHAT, body).json
        started.clear()
        connection = server.connect(CHAT, {**body, "stream": True})
        chunks = [json.loads(data) for data in events(read_all(connection))[:-1]]
        connection.close()
    finally:
        del server.engine.submit
    assert whole["bits"] is None
    assert whole["usage"]["bits"] == {"2": 5, "4": 3}
    assert {chunk["bits"] for chunk in chunks} == {None, 4, 2}


@pytest.mark.slow
def test_memory_stays_flat_over_2000_requests(with_engine, seed):
    """In bf16, with prompts of many lengths. The first 500 warm up; the next 1,500 may add next to nothing."""
    process = psutil.Process()
    chance = random.Random(seed)
    lengths = [chance.randint(1, 40) for _ in range(2000)]

    def ask(number: int) -> int:
        prompt = [5 + number % 1000] * lengths[number]
        body = {"prompt": prompt, "max_tokens": 2, "bits": 2 + number % 3, "logprobs": 2, "temperature": 0.5}
        if number % 4 == 0:
            connection = server.connect(COMPLETIONS, {**body, "stream": True})
            if number % 8 == 0:
                connection.recv(10)  # and away
            else:
                read_all(connection)
            connection.close()
            return 200
        return server.post(COMPLETIONS if number % 4 > 1 else "/v1/nothing", body).status

    def ask_all(numbers) -> int:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, numbers)) == {200, 404}
        eventually(server.is_idle, "an idle engine")
        gc.collect()
        return process.memory_info().rss

    with with_engine(torch.bfloat16) as server:
        before = ask_all(range(500))
        after = ask_all(range(500, 2000))
    assert after - before < 8e6, f"{(after - before) / 1e6:.1f} MB more after 1,500 requests"
