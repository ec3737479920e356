"""`bitstrata.bench`: how fast the kernels are here, beside what memory and torch can do."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ResourceError, UnsupportedBitsError, UsageError
from ..kernels import select
from ..kernels.cached import check_kv_cache_dtype
from ..memory import free_memory
from ..models.load import pick_device
from ..nn import PlaneLinear, bits_state
from ..options import BenchOptions
from ..planes.weights import MAX_BITS
from ..plans import choose_bits, load, parse_bits
from ..progress import log
from ..tables import render
from ..torch_state import ordinary_torch
from ..verbs import verb
from .clock import current
from .linear import REGIMES, LinearResult, bench_linear
from .machine import Bandwidth, describe
from .model import ModelResult, bench_model
from .random_model import SHAPES, dense_model, random_model, shape_config
from .tune import Tuned, check_tunable, tune

DEFAULT_SHAPES = "4096x4096,14336x4096,4096x14336,2048x8192"


@dataclass(frozen=True)
class Bench:
    """What `bitstrata.bench` measured. bandwidth in bytes a second, the rest as in LinearResult and ModelResult."""

    machine: dict[str, str | int]
    kernel: str
    bandwidth: float
    linear: tuple[LinearResult, ...]
    models: tuple[ModelResult, ...]
    notes: tuple[str, ...]
    tuned: tuple[Tuned, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        what = "a copy moves" if "gpu" in self.machine else "memory streams"
        parts = [f"{head}\nkernel {self.kernel}; {what} {self.bandwidth / 1e9:.1f} GB/s"]
        if self.tuned:
            parts.append(self._tuned_table())
        if self.linear:
            parts.append(self._linear_table())
        if self.models:
            parts.append(self._model_table())
        return "\n\n".join([*parts, *self.notes])

    def _tuned_table(self) -> str:
        rows = [
            [
                f"{t.out_features}x{t.in_features}",
                str(t.bits),
                str(t.rows),
                ", ".join(f"{name} {value}" for name, value in t.config.items()),
                f"{1e6 * t.before:.1f}",
                f"{1e6 * t.time:.1f}",
            ]
            for t in self.tuned
        ]
        return render("tuned: shapes of programs", ["N x K", "bits", "rows", "fastest", "before us", "us"], rows)

    def _linear_table(self) -> str:
        rows = [
            [
                f"{r.out_features}x{r.in_features}",
                str(r.rows),
                r.regime,
                r.name,
                f"{r.bytes / 1e6:.2f}",
                f"{1e3 * r.floor:.3f}",
                f"{1e3 * r.time:.3f}",
                "-" if r.share is None else f"{100 * r.share:.0f}%",
                f"{r.ratio_bf16:.2f}",
                f"{r.ratio_fp32:.2f}",
            ]
            for r in self.linear
        ]
        columns = ["N x K", "rows", "from", "weights", "MB", "floor ms", "ms", "share", "x bf16", "x fp32"]
        return render("linear layers: floor = MB / bandwidth, share = floor / time", columns, rows)

    def _model_table(self) -> str:
        rows = [
            [
                r.name,
                f"{r.bytes / 1e6:.0f}",
                f"{r.floor_tokens_per_second:.1f}",
                f"{r.tokens_per_second:.1f}",
                f"{100 * r.share:.0f}%",
                "-" if r.switch is None else f"{1e6 * r.switch:.1f}",
            ]
            for r in self.models
        ]
        columns = ["model", "MB/token", "ceiling tok/s", "tok/s", "share", "switch us"]
        return render("decoding one sequence: ceiling = bandwidth / MB", columns, rows)


@verb(BenchOptions)
@ordinary_torch()
def bench(options: BenchOptions) -> Bench:
    """Check the kernels against float64, then time them.

    Of a checkpoint its layers' shapes and the whole model are measured, else layers of the shapes NxK that `shapes`
    lists or that a known model has. On a GPU calls are timed in CUDA graphs; whole models are run as `generate` runs
    them.

    Raises:
        UsageError: arguments that cannot be used; KernelError, one of them, if there is nothing to tune.
        CheckError: a kernel is wrong; nothing is reported then.
        ResourceError: a whole model that does not fit into free memory.
    """
    _check(options)
    rows, regimes, where = _counts(options.rows), _regimes(options.regimes), pick_device(options.device)
    if where.type == "cuda" and options.threads is not None:
        raise UsageError("threads are the CPU's", hint="leave --threads out, or add --device cpu")
    if options.tune:
        check_tunable(where)
    if check_kv_cache_dtype(options.kv_cache_dtype) != "auto" and (
        where.type == "cuda" or (options.model is None and not options.whole)
    ):
        raise UsageError(
            f"kv_cache_dtype={options.kv_cache_dtype!r} is for whole models on a CPU",
            hint="leave --kv-cache-dtype out, or give a checkpoint or --whole, and --device cpu",
        )
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with current(where):
            return _bench(options, rows, regimes, where)
    finally:
        torch.set_num_threads(before)


def _check(options: BenchOptions) -> None:
    """Raise UsageError for options that exclude each other or are out of bounds."""
    threads, head_bits, blocks, rounds = options.threads, options.head_bits, options.blocks, options.rounds
    if options.model is not None and options.shapes is not None:
        raise UsageError("give either a model or --shapes", hint="`bitstrata bench OUT`, or `bench --shapes 4096x4096`")
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads must be at least 1, got {threads}", hint="leave --threads out for torch's own choice"
        )
    if options.whole and options.shapes not in SHAPES:
        raise UsageError("--whole needs a known model's name in --shapes", hint=f"known: {', '.join(SHAPES)}")
    if not options.whole and (head_bits is not None or blocks is not None):
        raise UsageError("--head-bits and --blocks describe a whole model", hint="add --whole")
    if head_bits is not None and not 1 <= head_bits <= MAX_BITS:
        raise UsageError(f"head bits must be in 1..{MAX_BITS}, got {head_bits}", hint="leave --head-bits out for bf16")
    if blocks is not None and blocks < 1:
        raise UsageError(f"blocks must be at least 1, got {blocks}", hint="leave --blocks out for the whole depth")
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}", hint="give an odd number, such as 7")


def _regimes(given: str | Sequence[str]) -> Sequence[str]:
    found = REGIMES if given == "both" else (given,) if isinstance(given, str) else given
    if unknown := set(found) - set(REGIMES):
        raise UsageError(f"unknown regime {', '.join(unknown)}", hint=f"give {', '.join(REGIMES)} or both")
    return found


def _bench(options: BenchOptions, rows: Sequence[int], regimes: Sequence[str], device: torch.device) -> Bench:
    """The measuring: one list of steps, longer than others because each needs what those before it made."""
    model, shapes, bits, whole, blocks = options.model, options.shapes, options.bits, options.whole, options.blocks
    group_size, rounds, head_bits, cache = options.group_size, options.rounds, options.head_bits, options.kv_cache_dtype
    loaded: PreTrainedModel | None = None
    notes: list[str] = []
    if model is not None:
        target, named = choose_bits(str(model), None)
        loaded = load(target, device=device)
        chosen = parse_bits(bits) if bits is not None else (named,) if named else bits_state(loaded).supported
        for value in chosen:
            if value not in bits_state(loaded).supported:
                raise UnsupportedBitsError(value, bits_state(loaded).supported)
        planned = bits_state(loaded).layers
        layers = [module for module in loaded.modules() if isinstance(module, PlaneLinear) and module.name in planned]
        sizes = sorted({(layer.out_features, layer.in_features) for layer in layers})
        group_size = layers[0].group_size
    else:
        chosen = parse_bits(bits) if bits is not None else (2, 3, 4)
        sizes = parse_shapes(shapes or DEFAULT_SHAPES)
        if whole:
            _check_memory(shape_config(str(shapes)), max(chosen), blocks, device)
    tuned: list[Tuned] = []
    if options.tune:
        tuned, path = tune(sizes, chosen, rows, device=device, group_size=group_size, rounds=rounds)
        notes.append(f"the fastest shapes of programs are in {path}")
    bandwidth = Bandwidth(torch.get_num_threads(), device)
    results: list[LinearResult] = []
    for out_features, in_features in sizes:
        log.info(f"layer {out_features}x{in_features}")
        measured = bench_linear(
            out_features,
            in_features,
            bits=chosen,
            rows=rows,
            bandwidth=bandwidth,
            group_size=group_size,
            regimes=regimes,
            rounds=rounds,
            device=device,
        )
        if "memory" in regimes and all(result.regime != "memory" for result in measured):
            notes.append(f"{out_features}x{in_features} is too small to be read from memory")
        results += measured
    if not bandwidth.samples:
        bandwidth.sample()
    models: list[ModelResult] = []
    if loaded is not None:
        log.info("the whole model")
        dense = dense_model(_plain(loaded.config), dtype=loaded.dtype, device=device)
        models = bench_model(
            loaded, Path(str(model)).name, chosen, bandwidth.bytes_per_second, dense=dense, kv_cache_dtype=cache
        )
        notes.append("the dense model has the same shape and random weights")
    elif whole:
        config = shape_config(str(shapes))
        log.info(f"a whole model of {shapes}'s shape")
        random = random_model(config, chosen, group_size=group_size, head_bits=head_bits, blocks=blocks, device=device)
        dense = dense_model(config, blocks=blocks, device=device)
        models = bench_model(random, str(shapes), chosen, bandwidth.bytes_per_second, dense=dense, kv_cache_dtype=cache)
        head = "bf16" if head_bits is None else f"{head_bits} bits"
        notes.append(f"random weights, {blocks or config.num_hidden_layers} blocks, output head in {head}")
    kernel = select(device.type, torch.bfloat16).name
    return Bench(
        describe(torch.get_num_threads(), device),
        kernel,
        bandwidth.bytes_per_second,
        tuple(result.beside(bandwidth.bytes_per_second) for result in results),
        tuple(models),
        tuple(notes),
        tuple(tuned),
    )


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Distinct (out_features, in_features) of a known model's layers, or from `NxK,NxK`. UsageError otherwise."""
    if text in SHAPES:
        size = SHAPES[text]
        hidden, inner = size["hidden_size"], size["intermediate_size"]
        heads, shared = size["num_attention_heads"] * size["head_dim"], size["num_key_value_heads"] * size["head_dim"]
        return sorted({(heads, hidden), (shared, hidden), (hidden, heads), (inner, hidden), (hidden, inner)})
    try:
        shapes = [tuple(map(int, part.lower().split("x"))) for part in text.split(",")]
        if not all(len(shape) == 2 and min(shape) > 0 for shape in shapes):
            raise ValueError(text)
    except ValueError:
        raise UsageError(
            f"shapes {text!r} cannot be used", hint=f"give NxK such as 4096x14336, or one of {', '.join(SHAPES)}"
        ) from None
    return [(shape[0], shape[1]) for shape in shapes]


def _counts(rows: str | int | Iterable[int]) -> list[int]:
    try:
        counts = [int(part) for part in (str(rows).split(",") if isinstance(rows, (str, int)) else rows)]
        if not counts or min(counts) < 1:
            raise ValueError(rows)
    except ValueError:
        raise UsageError(f"rows {rows!r} cannot be used", hint="give whole numbers from 1: 1,8") from None
    return counts


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_memory(config: PreTrainedConfig, bits: int, blocks: int | None, device: torch.device) -> None:
    """Both models are in memory at once."""
    depth = blocks or config.num_hidden_layers
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = hidden * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    weights = depth * (attention + 3 * hidden * inner)
    head = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    needed = 2 * (weights + head) + weights * (bits + 2) / 8 + 2 * head
    free = free_memory(device)
    if needed > free:
        raise ResourceError(
            f"the two models need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint=f"give --blocks {max(1, int(depth * free / needed * 0.9))} to measure a shallower model",
        )
