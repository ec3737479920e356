"""Replies over HTTP that fill a JSON schema, in mixed batches: python benchmarks/schema_http.py OUT [--json FILE]

Starts `bitstrata serve OUT` and asks for --requests people as JSON at --bits, half of them streamed, half sampled, at
once with as many free requests at all bits. Counted are replies that are whole, in the schema, and end by themselves;
how many requests ran beside each other is the server's own figure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from constraints import PERSON
from serving import server


def post(url: str, body: dict[str, Any]) -> tuple[str, str]:
    """The text of a reply and its finish_reason."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        if not body.get("stream"):
            choice = json.load(reply)["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]
        text, finish = "", ""
        for line in reply:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish = choice["finish_reason"] or finish
        return text, finish


def fits(text: str) -> bool:
    """Whether `text` is a person of the schema."""
    try:
        read = json.loads(text)
    except ValueError:
        return False
    if not isinstance(read, dict) or list(read) != list(PERSON["properties"]):
        return False
    name, age, likes = read.values()
    return (
        isinstance(name, str) and len(name) <= 24 and type(age) is int and 0 <= age <= 120
        and isinstance(likes, list) and len(likes) <= 3 and {*likes} <= {"music", "books", "sports"}
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    count = given.requests
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    with server(given.model, None, 4 * count) as (url, _):
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            names = [card["id"] for card in json.load(reply)["data"]]
        base, held, free = names[0], [], []
        for index in range(count):
            turns = [{"role": "user", "content": f"Describe person number {index} as JSON."}]
            sampled = {"temperature": 0.8, "seed": index} if index % 2 else {"temperature": 0}
            held.append(
                {"model": f"{base}:{given.bits}", "messages": turns, "response_format": schema, "max_tokens": 200,
                 "stream": index % 4 > 1, **sampled}
            )  # fmt: skip
            free.append(
                {"model": names[1 + index % (len(names) - 1)], "messages": turns, "max_tokens": 48, "ignore_eos": True}
            )
        most, done = 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.1):
                with urllib.request.urlopen(f"{url}/metrics") as reply:
                    lines = reply.read().decode().splitlines()
                running = [line for line in lines if line.startswith("bitstrata_requests_running")]
                most = max([most, *(round(float(line.split()[-1])) for line in running)])

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        with ThreadPoolExecutor(2 * count) as pool:
            mixed = [one for pair in zip(held, free, strict=True) for one in pair]
            replies = list(pool.map(lambda body: post(url, body), mixed))
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    people = replies[::2]
    valid = sum(fits(text) and finish == "stop" for text, finish in people)
    for text, finish in people:
        print(finish, text)
    found = {
        "model": Path(given.model).name, "bits": given.bits, "requests": count, "valid": valid,
        "streamed": sum(bool(body["stream"]) for body in held), "free_requests": len(free),
        "free_models": sorted({str(body["model"]).removeprefix(base) for body in free}),
        "most_at_once": most, "seconds": seconds,
    }  # fmt: skip
    print(f"{valid} of {count} replies fill the schema, beside {len(free)} free requests")
    text = json.dumps(found)
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
