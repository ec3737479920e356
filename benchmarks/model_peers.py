"""Whole models beside llama.cpp and torch: tokens a second of greedy decoding, one sequence and several, and of a
prompt's pass, in one run, taking turns.

    pip install .[peers]
    python benchmarks/model_peers.py [--shape llama-3.2-1b] [--threads 2] [--peers ours,torch,llama.cpp]
    python benchmarks/model_peers.py --quick

All have the same shape and random weights: ours from nested planes at 2, 3 and 4 bits with the output head at 6 bits,
scales in bytes as `nested` writes them (or, with --scales halves, in fp16, as the other methods do);
torch in bf16 through transformers; llama.cpp on GGUF files with every matrix in Q2_K, Q3_K or Q4_K, embeddings and
output in Q6_K. The files lie in a temporary folder until the end. Prints a table and writes it to `--json`, by default
to benchmarks/results/; --quick writes only on request.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers.batches import DenseBatch, EngineBatch, race
from peers.llama_model import LlamaBatch, LlamaDecoder, write_gguf
from peers.measure import SETTLE, OtherProcesses, Timing
from transformers import PreTrainedConfig, PreTrainedModel

from bitstrata.benchmark.machine import Bandwidth, describe
from bitstrata.benchmark.model import Decoder, SessionDecoder, decoders
from bitstrata.benchmark.random_model import SHAPES, dense_model, random_model, shape_config
from bitstrata.errors import BitstrataError, CheckError, ResourceError, UsageError
from bitstrata.models import bytes_per_token
from bitstrata.runtime import Engine
from bitstrata.tables import optional, render

PEERS = ("ours", "torch", "llama.cpp")
BITS = (2, 3, 4)
KINDS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4}  # llama.cpp's type -> which of our precisions it is compared to
SCALES = {"bytes": "affine8", "halves": "affine"}
HEAD_BITS = 6  # as llama.cpp's Q6_K
BASELINE = "torch bf16"
WEIGHT_BYTES = 4.5  # a weight, about, of all contenders together
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Contender:
    """A model continuing a sequence. bytes: that one token reads. bits: which of our precisions it is compared to.

    prompt: runs a prompt of so many tokens; afterwards `step` cannot be called any more.
    """

    name: str
    bytes: int
    bits: int | None
    step: Callable[[], object]
    prompt: Callable[[int], object]


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit removes the files, a plain end would not
    try:
        _run(arguments)
    except BitstrataError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, help="only as many decoder blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--context", type=int, default=64, help="tokens before the first that is timed")
    parser.add_argument("--tokens", type=int, default=16, help="in each turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompts that are timed")
    parser.add_argument("--batches", default="1,4,16", help="sequences at a time")
    parser.add_argument("--scales", default="bytes", choices=sorted(SCALES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two blocks, two short rounds: does everything run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.blocks, arguments.tokens, arguments.rounds = arguments.blocks or 2, 4, 2
        arguments.prompt = min(arguments.prompt, 64)
        arguments.batches = "1,2"
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    for name in ("threads", "group_size", "context", "tokens", "rounds", "prompt"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    names = [name for name in arguments.peers.split(",") if name]
    if not names or set(names) - set(PEERS):
        raise UsageError(f"--peers {arguments.peers!r} cannot be used", hint=f"give some of {','.join(PEERS)}")
    counts = [int(count) for count in arguments.batches.split(",") if count.isdigit() and int(count)]
    if not counts:
        raise UsageError(f"--batches {arguments.batches!r} cannot be used", hint="give numbers, such as 1,4,16")
    config = shape_config(arguments.shape)
    if arguments.blocks is not None:
        config.num_hidden_layers = arguments.blocks
    _check_memory(config)
    torch.set_num_threads(arguments.threads)
    machine: dict[str, Any] = dict(describe(arguments.threads))
    skipped = []
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if "llama.cpp" in names and absent:
        names.remove("llama.cpp")
        skipped.append(f"llama.cpp: {' and '.join(absent)} cannot be imported; install with `pip install .[peers]`")
        print(f"skipped {skipped[-1]}")
    elif "llama.cpp" in names:
        machine |= {package: version(package) for package in ("llama-cpp-python", "gguf")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))

    with tempfile.TemporaryDirectory(prefix="bitstrata-peers-") as folder:
        contenders, close, built = _contenders(arguments, config, names, Path(folder))
        others, bandwidth = OtherProcesses(), Bandwidth(arguments.threads)
        timings = _race(contenders, arguments.rounds, arguments.tokens, bandwidth)
        prompts = _race_prompts(contenders, min(arguments.rounds, 5), arguments.prompt)
        for function in close:
            function()
        batches = _race_batches(arguments, built, counts)
        busy = others.cores()
    rows = _compare(contenders, timings)
    prompt_rows = _compare(contenders, prompts)
    head = f"{arguments.shape}, {config.num_hidden_layers} blocks, one sequence after {arguments.context} tokens"
    print(f"\n{_table(head, rows)}\n\nx bf16: speed over torch's. ours: our speed over this one's at the same bits")
    print(f"\n{_table(f'a prompt of {arguments.prompt} tokens', prompt_rows)}\n")
    print(f"{_batch_table(batches)}\n")
    print(f"memory streams {bandwidth.bytes_per_second / 1e9:.1f} GB/s with {arguments.threads} threads")
    if warning := others.warning(busy):
        print(warning)
    keys = ("shape", "threads", "group_size", "scales", "context", "tokens", "rounds", "prompt", "seed", "quick")
    settings = {key: getattr(arguments, key) for key in keys} | {"blocks": config.num_hidden_layers}
    report = {
        "machine": machine,
        "settings": settings | {"head_bits": HEAD_BITS},
        "bandwidth_gigabytes_per_second": round(bandwidth.bytes_per_second / 1e9, 2),
        "cores_busy_with_other_processes": round(busy, 2),
        "skipped": skipped,
        "results": rows,
        "prompts": prompt_rows,
        "batches": batches,
    }
    path = arguments.json
    if path is None and not arguments.quick:
        path = RESULTS / f"model-peers-{arguments.shape}-{arguments.threads}-threads.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")


def _contenders(
    arguments: argparse.Namespace, config: PreTrainedConfig, names: list[str], folder: Path
) -> tuple[list[Contender], list[Callable[[], None]], dict[str, Any]]:
    """The models, what has to be called when they are done, and by their names the models themselves."""
    found: list[Contender] = []
    built: dict[str, Any] = {"vocabulary": config.vocab_size}
    close: list[Callable[[], None]] = []
    if "ours" in names:
        _say(f"ours at {', '.join(map(str, BITS))} bits")
        sizes: dict[str, Any] = {"group_size": arguments.group_size, "head_bits": HEAD_BITS, "seed": arguments.seed}
        model = built["ours"] = random_model(config, BITS, kind=SCALES[arguments.scales], **sizes)
        for bits in BITS:
            _check_logits(f"ours {bits} bits", model, bits)
        stack = ExitStack()
        close.append(stack.close)
        for bits, decoder in zip(BITS, decoders(model, arguments.context, BITS, stack), strict=True):
            found.append(_contender(f"ours {bits} bits", decoder, bits))
    if "torch" in names:
        _say(BASELINE)
        dense = built[BASELINE] = dense_model(config, seed=arguments.seed)
        _check_logits(BASELINE, dense, None)
        found.append(_contender(BASELINE, Decoder(dense, arguments.context, None), None))
    if "llama.cpp" in names:
        for kind, bits in KINDS.items():
            _say(f"llama.cpp {kind}")
            path = built[kind] = folder / f"{kind}.gguf"
            size = write_gguf(path, config, kind, arguments.seed)
            scales = LlamaDecoder(
                path,
                vocabulary=config.vocab_size,
                context=arguments.context,
                most_tokens=max(arguments.context + arguments.rounds * (arguments.tokens + 1), arguments.prompt) + 1,
                prompt=arguments.prompt,
                threads=arguments.threads,
            )
            if not (np.isfinite(scales.logits).all() and scales.logits.std() > 0):
                raise CheckError(f"llama.cpp gives unusable logits with {kind}", hint="nothing is reported")
            close.append(scales.close)
            found.append(Contender(f"llama.cpp {kind}", size, bits, scales.step, scales.prompt))
    return found, close, built


def _check_logits(name: str, model: PreTrainedModel, bits: int | None) -> None:
    with torch.no_grad():
        logits = model(torch.arange(4).unsqueeze(0), **({} if bits is None else {"bits": bits})).logits
    if not (logits.isfinite().all() and logits.float().std() > 0):
        raise CheckError(f"{name} gives unusable logits", hint="nothing is reported")


def _contender(name: str, decoder: Decoder | SessionDecoder, bits: int | None) -> Contender:
    return Contender(name, bytes_per_token(decoder.model, bits), bits, decoder.step, decoder.prompt)


def _race(contenders: list[Contender], rounds: int, tokens: int, bandwidth: Bandwidth) -> list[Timing]:
    """Seconds a token, a value for each round; the order is another one in each."""
    shuffle = np.random.default_rng(0).permutation
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        bandwidth.sample()
        for index in shuffle(len(contenders)):
            step = contenders[index].step
            time.sleep(SETTLE)
            step()
            started = time.perf_counter()
            for _ in range(tokens):
                step()
            times[index].append((time.perf_counter() - started) / tokens)
    return [Timing(tuple(samples)) for samples in times]


def _race_prompts(contenders: list[Contender], rounds: int, tokens: int) -> list[Timing]:
    """Seconds a token of a prompt of `tokens`."""
    shuffle = np.random.default_rng(1).permutation
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for index in shuffle(len(contenders)):
            time.sleep(SETTLE)
            started = time.perf_counter()
            contenders[index].prompt(tokens)
            times[index].append((time.perf_counter() - started) / tokens)
    return [Timing(tuple(samples)) for samples in times]


def _race_batches(arguments: argparse.Namespace, built: dict[str, Any], counts: list[int]) -> list[dict[str, Any]]:
    """Several sequences at a time, through the engine, transformers and llama.cpp."""
    context, tokens, most = arguments.context, arguments.tokens, max(counts)
    with ExitStack() as stack:
        contenders: list[Any] = []
        if "ours" in built:
            room = most * (context + tokens + 2 * 16)
            engine = stack.enter_context(Engine(built["ours"], max_requests=most, cache_tokens=max(2048, room)))
            contenders += [EngineBatch(engine, bits) for bits in BITS]
        if BASELINE in built:
            contenders.append(DenseBatch(built[BASELINE], BASELINE))
        for kind, bits in KINDS.items():
            if kind in built:
                sizes = {"most": most, "context": context, "tokens": tokens, "threads": arguments.threads}
                named: dict[str, Any] = {"name": f"llama.cpp {kind}", "bits": bits, **sizes}
                contenders.append(LlamaBatch(built[kind], vocabulary=built["vocabulary"], **named))
                stack.callback(contenders[-1].close)
        return race(contenders, counts, min(arguments.rounds, 3), context, tokens)


def _batch_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["model"], str(row["sequences"]), f"{row['tokens_per_second']:.1f}", optional(row["ours_times_faster"], 2)]
        for row in rows
    ]
    return render("several sequences, all together", ["model", "sequences", "tok/s", "ours"], lines)


def _compare(contenders: list[Contender], timings: list[Timing]) -> list[dict[str, Any]]:
    by_name = {contender.name: timing for contender, timing in zip(contenders, timings, strict=True)}
    rows = []
    for contender, timing in zip(contenders, timings, strict=True):
        slow, fast = timing.quartiles[::-1]
        mine = None if contender.name.startswith("ours") else by_name.get(f"ours {contender.bits} bits")
        dense = by_name.get(BASELINE)
        rows.append(
            {
                "model": contender.name,
                "bytes_per_token": contender.bytes,
                "tokens_per_second": round(1 / timing.median, 3),
                "quartiles_tokens_per_second": [round(1 / slow, 3), round(1 / fast, 3)],
                "gigabytes_per_second": round(contender.bytes / timing.median / 1e9, 3),
                "times_faster_than_torch_bf16": None if dense is None else round(timing.times_faster_than(dense), 4),
                "ours_times_faster": None if mine is None else round(mine.times_faster_than(timing), 4),
            }
        )
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["model"],
            f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{row['tokens_per_second']:.1f}",
            "-".join(f"{value:.1f}" for value in row["quartiles_tokens_per_second"]),
            f"{row['gigabytes_per_second']:.1f}",
            optional(row["times_faster_than_torch_bf16"], 2),
            optional(row["ours_times_faster"], 2),
        ]
        for row in rows
    ]
    return render(title, ["model", "MB/token", "tok/s", "quartiles", "GB/s", "x bf16", "ours"], lines)


def _check_memory(config: PreTrainedConfig) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * hidden * inner) + config.vocab_size * hidden
    needed, free = WEIGHT_BYTES * weights, psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"the models need about {needed / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free",
            hint="give --blocks to measure shallower models, or fewer --peers",
        )


def _say(text: str) -> None:
    print(f"building {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
