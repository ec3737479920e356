"""How fast products with bit-planes are on this GPU: bytes, floor, time, and the same product in other formats.

    python benchmarks/gpu.py                                   every shape, bits and number of rows; then whole models
    python benchmarks/gpu.py --shapes 4096x14336 --bits 2,4 --rows 1,8 --model none
    python benchmarks/gpu.py --tune                            first search the shapes of programs, and keep the fastest

It is `bitstrata bench --device cuda` with more beside it. The floor of a product is the bytes of its planes and scales
over the bandwidth of a copy, measured between the others. Several weights take turns, together larger than the L2
cache, because a model does not find its weights there either; all calls of a round are in one CUDA graph, as in
serving, so that what is measured is the device and not Python. Each number is the median of rounds in which all take
turns: planes at each bits, rows that take the bits in turn ("mixed"), torch's dense product in bf16 and fp32, and
torch's int4 product. Then tokens a second of whole models, a step one CUDA graph: at each bits as `generate` makes
them, and in bf16 over transformers' static cache.

Before a kernel is timed its result is compared with float64; if one is wrong nothing is reported and the exit code is
5. The last line of standard output is one JSON object; --output FILE writes it there too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitstrata.benchmark.clock import current
from bitstrata.benchmark.linear import Contender, LinearResult, bench_linear, beyond_cache
from bitstrata.benchmark.machine import Bandwidth, describe
from bitstrata.benchmark.model import ModelResult, bench_model
from bitstrata.benchmark.random_model import SHAPES, dense_model, random_model, shape_config
from bitstrata.benchmark.run import parse_shapes
from bitstrata.benchmark.tune import tune
from bitstrata.errors import BitstrataError, UsageError
from bitstrata.kernels import select
from bitstrata.models.load import pick_device
from bitstrata.plans import parse_bits
from bitstrata.progress import notes as said
from bitstrata.progress import own_notes

LAYERS = "4096x14336,14336x4096,8192x28672,4096x4096"  # out_features x in_features
GROUP_SIZE = 128
INT4_TILES = 8  # torch's own choice of its inner layout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default=LAYERS, help="out_features x in_features, comma-separated")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256,2048")
    parser.add_argument("--model", default="llama-3.1-8b", choices=[*SHAPES, "none"], help="of the whole models")
    parser.add_argument("--blocks", type=int, help="only as many decoder blocks of it")
    parser.add_argument("--head-bits", type=int, help="planes for its output head and embedding; bf16 otherwise")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tune", action="store_true", help="first search and keep the fastest shapes of programs")
    parser.add_argument("--output", type=Path, help="write the JSON into this file too")
    return parser.parse_args()


def int4_peer(out_features: int, in_features: int, device: torch.device) -> Callable[[Tensor], list[Contender]] | str:
    """torch's int4 product as a contender for an input, or why it cannot be had."""
    if out_features % 8 or in_features % 1024:
        return "torch's int4 product does not take this shape"
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
    groups = in_features // GROUP_SIZE
    scales = torch.rand(groups, out_features, 2, dtype=torch.bfloat16, device=device)
    copies = max(2, -(-beyond_cache(device) // (codes.nbytes + scales.nbytes)))
    try:
        weights = [torch.ops.aten._convert_weight_to_int4pack(codes, INT4_TILES) for _ in range(copies)]
    except RuntimeError as error:  # NotImplementedError is one
        return f"no int4 product of torch: {str(error).splitlines()[0]}"

    def contenders(x: Tensor) -> list[Contender]:
        def product(index: int) -> object:
            return torch.ops.aten._weight_int4pack_mm(x, weights[index], GROUP_SIZE, scales)

        return [Contender("torch int4", None, codes.nbytes + scales.nbytes, copies, product)]

    return contenders


def line(result: LinearResult, beside: Sequence[LinearResult]) -> str:
    """One result, and its ratio to torch's int4 product of the same rows."""
    int4 = next((other.time for other in beside if other.name == "torch int4" and other.rows == result.rows), None)
    return (
        f"{result.out_features:>6} x {result.in_features:<6} {result.name:>10} {result.rows:>5} rows "
        f"{result.bytes / 1e6:8.1f} MB {result.time * 1e6:9.1f} us {result.floor / result.time:6.1%} of floor "
        f"{result.ratio_bf16:6.2f} x bf16" + ("" if int4 is None else f" {int4 / result.time:6.2f} x int4")
    )


def layers(options: argparse.Namespace, bandwidth: Bandwidth, notes: list[str]) -> list[LinearResult]:
    results: list[LinearResult] = []
    for out_features, in_features in options.shapes:
        peer = int4_peer(out_features, in_features, options.device)
        if isinstance(peer, str):
            notes.append(f"{out_features}x{in_features}: {peer}")
        found = bench_linear(
            out_features,
            in_features,
            bits=options.bits,
            rows=options.rows,
            bandwidth=bandwidth,
            group_size=GROUP_SIZE,
            regimes=["memory"],
            rounds=options.rounds,
            device=options.device,
            mixed=True,
            peers=None if isinstance(peer, str) else peer,
        )
        if not found:
            notes.append(f"{out_features}x{in_features} is too small to be read from memory")
        for result in found:
            print(line(result, found), flush=True)
        results += found
    return [result.beside(bandwidth.bytes_per_second) for result in results]


def models(options: argparse.Namespace, bandwidth: Bandwidth, notes: list[str]) -> list[ModelResult]:
    """notes: why steps were no graphs, if so, is added."""
    if options.model == "none":
        return []
    config, device = shape_config(options.model), options.device
    shape: dict[str, Any] = {"blocks": options.blocks, "device": device}
    planes = random_model(config, options.bits, group_size=GROUP_SIZE, head_bits=options.head_bits, **shape)
    dense = dense_model(config, **shape)
    with own_notes():
        results = bench_model(planes, options.model, options.bits, bandwidth.bytes_per_second, dense=dense)
        notes += said()
    for result in results:
        print(f"{result.name:>40} {result.tokens_per_second:8.1f} tokens/s {result.share:6.1%} of ceiling", flush=True)
    return results


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.shapes, options.bits = parse_shapes(options.shapes), parse_bits(options.bits)
    options.rows = [int(rows) for rows in options.rows.split(",")]
    options.device = pick_device(options.device)
    kernel = select(options.device.type, torch.bfloat16).name
    if options.device.type != "cuda" or kernel == "reference":
        raise UsageError(
            f"this benchmark needs a GPU and its kernels; on {options.device} the kernel is {kernel}",
            hint="`bitstrata env` says what can run here, and why not",
        )
    with current(options.device):
        return measured(options, kernel)


def measured(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    notes: list[str] = []
    tuned: list[Any] = []
    if options.tune:
        tuned, path = tune(options.shapes, options.bits, options.rows, device=options.device)
        notes.append(f"the fastest shapes of programs are in {path}")
    bandwidth = Bandwidth(torch.get_num_threads(), options.device)
    bandwidth.sample()
    print(f"{torch.cuda.get_device_name(options.device)}: a copy moves {bandwidth.bytes_per_second / 1e12:.2f} TB/s")
    linear = layers(options, bandwidth, notes)
    return {
        "kernel": kernel,
        "machine": describe(torch.get_num_threads(), options.device),
        "copy_bytes_per_s": bandwidth.bytes_per_second,
        "group_size": GROUP_SIZE,
        "tuned": [asdict(item) for item in tuned],
        "linear": [asdict(result) for result in linear],
        "models": [asdict(result) for result in models(options, bandwidth, notes)],
        "blocks": options.blocks,
        "notes": notes,
    }


def main() -> int:
    options = parse()
    try:
        report = run(options)
    except BitstrataError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for note in report["notes"]:
        print(note, file=sys.stderr)
    text = json.dumps(report)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
