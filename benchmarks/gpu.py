"""How fast products with bit-planes are on this GPU: bytes, floor, time, and the same product in other formats.

    python benchmarks/gpu.py                        every shape, bits and number of rows
    python benchmarks/gpu.py --shapes 4096x14336 --bits 2,4 --rows 1,8
    python benchmarks/gpu.py --tune                 first search the shapes of programs, and keep the fastest

The floor of a product is the bytes of its planes and scales over the bandwidth of a copy, measured first. Several
weights take turns, together larger than the L2 cache, because a model does not find its weights there either; all
calls of a round are in one CUDA graph, as in serving, so that what is measured is the device and not Python. Each
number is the median of rounds. Before a kernel is timed its result is compared with the reference; a kernel that is
wrong is not timed and the exit code is 5. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from bitstrata.planes import AffineDecoder, PlaneWeight, decode

SHAPES = "4096x14336,14336x4096,8192x28672,4096x4096"  # out_features x in_features
GIB = 1 << 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="out_features x in_features, comma-separated")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256,2048")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", action="store_true", help="search and save the fastest program shapes")
    options = parser.parse_args()
    try:
        options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        options.bits = [int(bits) for bits in options.bits.split(",")]
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if any(len(shape) != 2 or min(shape) < 1 for shape in options.shapes):
        parser.error("a shape is out_features x in_features, e.g. 4096x14336")
    if not all(1 <= bits <= 8 for bits in options.bits) or min(options.rows) < 1 or options.group_size < 1:
        parser.error("bits lie in 1..8; rows and the group size are positive")
    return options


def random_weight(n: int, k: int, bits: Sequence[int], group_size: int, seed: int) -> PlaneWeight:
    """Random planes, and scales like those of a quantized weight, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    words, groups = -(-k // 32), -(-k // group_size)

    def plane() -> Tensor:
        bound = 2**31
        made = torch.randint(-bound, bound, (n, words), dtype=torch.int32, device="cuda", generator=generator)
        if k % 32:
            made[:, -1] &= (1 << k % 32) - 1
        return made

    planes = tuple(plane() for _ in range(max(bits)))
    decoders = {}
    for value in bits:
        size = torch.exp2(-torch.arange(value, device="cuda").float()).view(-1, 1, 1)
        noise = torch.rand(value, n, groups, device="cuda", generator=generator)
        offset = torch.randn(n, groups, device="cuda", generator=generator)
        decoders[value] = AffineDecoder((size * (0.6 + 0.3 * noise)).half(), (0.1 * offset).half())
    return PlaneWeight(planes, decoders, k, group_size)


def milliseconds(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Median time of one of `calls`, run one after the other from a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and warms up
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, 20 // len(calls))):
            for call in calls:
                call()
    count = max(1, 20 // len(calls)) * len(calls)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / count)
    return statistics.median(times)


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds([lambda: target.copy_(source)], rounds) / 1e3)


def is_right(y: Tensor, x: Tensor, dense: Tensor, baseline: Tensor) -> bool:
    """At most twice the error of the dense product, and a unit in the last place."""
    exact = x.double() @ dense.T
    error = (y.double() - exact).abs().nan_to_num(nan=float("inf")).max()
    limit = 2 * (baseline.double() - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max()
    return bool(error <= limit)


def int4_peer(n: int, k: int, group_size: int, copies: int) -> Callable[[Tensor], list[Callable[[], object]]] | str:
    """Calls of torch's int4 product for an input, or why it cannot be had."""
    if n % 8 or k % 1024 or group_size not in (32, 64, 128, 256):
        return "shape not supported"
    try:
        weights = []
        for _ in range(copies):
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            weights.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    scales = torch.rand(k // group_size, n, 2, dtype=torch.bfloat16, device="cuda")

    def calls(x: Tensor) -> list[Callable[[], object]]:
        x = x.bfloat16()
        return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, group_size, scales) for w in weights]

    return calls


def tune(tiled: list[Any], x: Tensor, bits: int, rounds: int) -> dict[str, Any]:
    """The fastest few-row program for one weight's shape, by its key."""
    from bitstrata.kernels.triton import config, launch

    def seconds(candidate: config.FewRows) -> float:
        return milliseconds([lambda w=w: launch.few_rows(x, w, bits, candidate) for w in tiled], rounds) / 1e3

    return {config.key(tiled[0], bits): config.best(config.few_rows_candidates(), seconds)}


def measure_shape(n: int, k: int, options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    from bitstrata.kernels.triton import KERNEL, TiledWeight, config

    dtype = getattr(torch, options.dtype)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    results = []
    smallest = n * k * min(options.bits) // 8
    copies = max(2, -(-3 * l2 // smallest))
    weights = [random_weight(n, k, options.bits, options.group_size, seed) for seed in range(copies)]
    tiled = [TiledWeight.pack(weight) for weight in weights]
    if options.tune:
        one = torch.randn(1, k, dtype=dtype, device="cuda")
        chosen: dict[str, Any] = {}
        for bits in options.bits:
            chosen |= tune(tiled, one, bits, options.rounds)
        print(f"tuned {n}x{k}: {config.save(torch.device('cuda', 0), chosen)}", file=sys.stderr)
    dense = [torch.randn(n, k, dtype=dtype, device="cuda") for _ in range(max(2, -(-3 * l2 // (2 * n * k))))]
    int4 = int4_peer(n, k, options.group_size, copies)
    exact = {bits: decode(weights[0], bits, torch.float64) for bits in options.bits}
    for rows in options.rows:
        x = torch.randn(rows, k, dtype=dtype, device="cuda")
        cublas = milliseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], options.rounds)
        peer = int4 if isinstance(int4, str) else milliseconds(int4(x), options.rounds)
        mixed = torch.tensor(options.bits, device="cuda")[torch.arange(rows, device="cuda") % len(options.bits)]
        for bits in [*options.bits, "mixed"]:
            asked = mixed if bits == "mixed" else bits
            y = KERNEL.linear_many(x, [tiled[0]], asked)[0]
            for value in options.bits if bits == "mixed" else [bits]:
                mine = mixed == value if bits == "mixed" else slice(None)
                if not len(x[mine]):
                    continue
                baseline = torch.nn.functional.linear(x[mine], exact[value].to(dtype))
                if not is_right(y[mine], x[mine], exact[value], baseline):
                    raise SystemExit(f"WRONG: {n}x{k} bits={bits} rows={rows}: nothing is reported")
            ms = milliseconds([lambda w=w, x=x, b=asked: KERNEL.linear_many(x, [w], b) for w in tiled], options.rounds)
            top = max(options.bits) if bits == "mixed" else bits
            used = [tiled[0].decoders[b].nbytes for b in options.bits] if bits == "mixed" else []
            read = tiled[0].bytes_read(top) + (sum(used) - used[options.bits.index(top)] if used else 0)
            floor = read / bandwidth * 1e3
            result = {
                "out_features": n,
                "in_features": k,
                "bits": bits,
                "rows": rows,
                "bytes": read,
                "floor_ms": floor,
                "ms": ms,
                "share_of_floor": floor / ms,
                "dense_ms": cublas,
                "times_dense": cublas / ms,
                "int4_ms": peer if not isinstance(peer, str) else None,
                "times_int4": peer / ms if not isinstance(peer, str) else None,
            }
            results.append(result)
            print(
                f"{n:>6} x {k:<6} {bits!s:>5} bits {rows:>5} rows {read / 1e6:8.1f} MB {ms * 1e3:9.1f} us "
                f"{floor / ms:6.1%} of floor {cublas / ms:6.2f} x dense "
                + (f"{peer / ms:6.2f} x int4" if not isinstance(peer, str) else f"(int4: {peer})"),
                flush=True,
            )
    return results


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("error: no CUDA device; this benchmark needs one", file=sys.stderr)
        return 3
    from bitstrata.kernels import Problem
    from bitstrata.kernels.triton import KERNEL

    reason = KERNEL.can_run(Problem("cuda", getattr(torch, options.dtype), 1, "affine"))
    if reason is not None:
        print(f"error: the Triton kernels cannot run here: {reason}", file=sys.stderr)
        return 3
    bandwidth = copy_bandwidth(options.rounds)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}: copy {bandwidth / 1e12:.2f} TB/s, L2 {properties.L2_cache_size >> 20} MiB", flush=True)
    results: list[dict[str, Any]] = []
    try:
        for n, k in options.shapes:
            results += measure_shape(n, k, options, bandwidth)
    except SystemExit as wrong:
        print(wrong.code, file=sys.stderr)
        return 5
    report = {
        "device": properties.name,
        "copy_bytes_per_s": bandwidth,
        "versions": {name: metadata.version(name) for name in ("bitstrata", "torch", "triton")},
        "cuda": torch.version.cuda,
        "dtype": options.dtype,
        "group_size": options.group_size,
        "results": results,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
