"""Tokens a second of a real model through each verb: generate, a chat, the engine, the server; beside transformers and,
given its GGUF file, llama.cpp. Greedy, one sequence, taking turns.

    python benchmarks/verbs.py OUT [--reference MODEL] [--gguf FILE] [--bits 2,4] [--threads 2] [--json FILE]

OUT is a quantized checkpoint; the time is that between the first and the last new token.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peers.llama_model import LlamaDecoder
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.models import load_tokenizer
from bitstrata.runtime import Conversation, Engine, Request
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings
from bitstrata.tables import render

PROMPT = "Once upon a time there was a lighthouse keeper who found a map in a bottle. One night, when the storm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", help="the original, run by transformers in bf16")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    parser.add_argument("--bits", default="2,4")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contenders = ours(arguments) | others(arguments)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            speeds[name].append(run())
    found = {name: statistics.median(samples) for name, samples in speeds.items()}
    rows = [[name, f"{speed:.1f}", f"{min(speeds[name]):.1f}-{max(speeds[name]):.1f}"] for name, speed in found.items()]
    print(render("", ["", "tok/s", "from-to"], rows))
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"machine": describe("cpu"), **settings, "samples": speeds}, indent=1))


def ours(arguments: argparse.Namespace) -> dict[str, Callable[[], float]]:
    tokenizer = load_tokenizer(arguments.model)
    held = bitstrata.load(arguments.model, dtype=torch.bfloat16)
    served = bitstrata.load(arguments.model, dtype=torch.bfloat16)
    ids, most = tokenizer(PROMPT).input_ids, arguments.tokens
    engine = Engine(served, tokenizer)
    found: dict[str, Callable[[], float]] = {}

    def generate(bits: int) -> float:
        made = bitstrata.generate(held, PROMPT, bits=bits, max_new_tokens=most, tokenizer=tokenizer)
        return made.tokens_per_second or 0.0

    def chat(bits: int) -> float:
        return Conversation(held, tokenizer, bits=bits, max_new_tokens=most).reply(PROMPT).tokens_per_second or 0.0

    def by_engine(bits: int) -> float:
        times: list[float] = []
        request = Request(ids, bits=bits, max_new_tokens=most, ignore_eos=True)
        engine.submit(request, lambda _: times.append(time.perf_counter())).result()
        return (len(times) - 2) / (times[-2] - times[0])  # the last event says that it has ended

    app = create_app(engine, tokenizer, Settings("model"))
    port = start(app)

    def by_server(bits: int) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": ids, "bits": bits, "max_tokens": most, "stream": True, "ignore_eos": True, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        times = []
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
        connection.close()
        return (most - 1) / (times[-1] - times[0])

    for bits in map(int, arguments.bits.split(",")):
        for name, verb in {"generate": generate, "chat": chat, "engine": by_engine, "serve": by_server}.items():
            found[f"{name}, {bits} bits"] = lambda verb=verb, bits=bits: verb(bits)  # type: ignore[misc]
    return found


def start(app: object) -> int:
    """Serve `app` in a thread; its port."""
    import socket
    import threading

    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))  # type: ignore[arg-type]
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return int(listener.getsockname()[1])


def others(arguments: argparse.Namespace) -> dict[str, Callable[[], float]]:
    found: dict[str, Callable[[], float]] = {}
    if arguments.reference:
        tokenizer = load_tokenizer(arguments.reference)
        dense = AutoModelForCausalLM.from_pretrained(arguments.reference, dtype=torch.bfloat16)
        ids = torch.tensor([tokenizer(PROMPT).input_ids])

        def plain() -> float:
            times: list[float] = []

            class Clock(transformers.generation.streamers.BaseStreamer):
                def put(self, value: torch.Tensor) -> None:
                    times.append(time.perf_counter())

                def end(self) -> None:
                    pass

            settings = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
            dense.generate(ids, attention_mask=torch.ones_like(ids), streamer=Clock(), pad_token_id=0, **settings)
            return (len(times) - 2) / (times[-1] - times[1])  # the first is the prompt

        found["transformers bf16"] = plain
    if arguments.gguf:
        vocabulary = load_tokenizer(arguments.model).vocab_size

        def llama() -> float:
            shape = {"vocabulary": vocabulary, "context": 16, "most_tokens": 1024, "threads": arguments.threads}
            decoder = LlamaDecoder(arguments.gguf, **shape)
            started = time.perf_counter()
            for _ in range(arguments.tokens - 1):
                decoder.step()
            seconds = time.perf_counter() - started
            decoder.close()
            return float((arguments.tokens - 1) / seconds)

        found[f"llama.cpp {arguments.gguf.name}"] = llama
    return found


if __name__ == "__main__":
    main()
