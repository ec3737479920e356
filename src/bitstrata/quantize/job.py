"""`bitstrata.quantize`: a source model in, a checkpoint out, one block in memory at a time.

    preflight    everything that can be checked is checked; all problems at once (preflight.py)
    each block   read -> solve -> write durably -> move every chain of hidden states one block on
    finish       measure each bits on held-out windows, assemble the checkpoint, remove `.job`

Chains of hidden states, one a precision and one for the original, are carried along: the method
sees the inputs that each precision really produces, and after the last block they give the logits
for the final check, next to dedicated round-to-nearest at the same bits, without ever holding the
model. An interrupted job recomputes the chains from its finished blocks, so a resumed job sees
exactly the numbers the first run saw.

Peak memory is that of `preflight._memory_bytes`; the measured peak is in the report.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import BlockRunner
from ..checkpoint import CheckpointReader, TensorEntry, is_checkpoint, write_checkpoint
from ..checkpoint.reader import read_json
from ..checkpoint.schema import CONFIG_FILE, REPORT_FILE, guard_name
from ..errors import CheckError, PreflightError, UsageError, disk_errors
from ..evaluate import Measured, Tally
from ..models import LinearInfo
from ..planes import PlaneWeight, decode
from ..progress import Reporter
from .method import BlockTask
from .preflight import Prepared, megabytes, prepare
from .report import Report, verdict
from .rtn import RTN
from .settings import Settings
from .state import JobState, differences

COPIED_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
ORIGINAL = "original"


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: str | int | Iterable[int] = "2-4",
    method: str = "anybcq",
    group_size: int = 128,
    calibration: str | Path | None = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    preset: str = "default",
    skip: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Quantize a causal language model into nested bit-planes.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        output: the folder to make. If it holds an unfinished job of the same command, that is resumed.
        bits: the bits to support: "2-4", "2,4", 3, or a sequence; each 1..8.
        method: rtn, bcq or anybcq.
        group_size: input columns that share scales.
        calibration: a text file, or `stdlib`. Methods that learn from activations need it; with any
            method it is what the final check is measured on.
        num_samples: windows to calibrate on; seq_len: their length in tokens.
        preset: fast (no training), default, or best (trains longest).
        skip: patterns of layer names to leave as they are (globs, or `re:` and a regular expression).
        seed: decides windows and training order.
        device: auto, cpu, cuda.
        dry_run: check and report what would be done; write nothing.
        options: the method's own options by name, for example {"steps": 500}.

    Returns:
        A Report. Its saved part is `bitstrata_report.json` in the output.

    Raises:
        PreflightError: everything wrong with the input, at once, before anything is written.
        JobError: the output holds an unfinished job that does not match.
        ResourceError: the disk filled up; finished blocks are kept.
        CheckError: the result is not finite.
    """
    started = time.monotonic()
    reporter = reporter or Reporter()
    settings = Settings.parse(
        model,
        output,
        bits=bits,
        method=method,
        preset=preset,
        options=options or {},
        group_size=group_size,
        calibration=calibration,
        num_samples=num_samples,
        seq_len=seq_len,
        skip=skip,
        seed=seed,
        device=device,
    )
    prepared = prepare(settings, reporter)
    settings = prepared.settings
    if dry_run:
        return _describe(prepared, reporter)
    done = _already_done(prepared, reporter)
    if done is not None:
        return done

    spec = prepared.spec()
    state = JobState(settings.output, prepared.fingerprint, spec)
    try:
        job = _Job(prepared, state, reporter)
        job.run_blocks()
        report = job.check()
        _assemble(prepared, state, report)
    except BaseException:
        state.close()
        raise
    state.finish()
    return _with_measures(report, settings.output, started)


class _Job:
    """The block loop and the final check; holds the chains."""

    def __init__(self, prepared: Prepared, state: JobState, reporter: Reporter) -> None:
        self.prepared, self.state, self.reporter = prepared, state, reporter
        self.settings = prepared.settings
        self.runner = BlockRunner(
            prepared.source, prepared.model, prepared.discovery, self.settings.seq_len, self.settings.device
        )
        self.layer_error: dict[str, dict[str, float]] = {}
        bits = self.settings.bits
        # chain name -> hidden states; original, then one a precision, then round-to-nearest at each
        self.learning: dict[str, Tensor] = {}
        self.checking: dict[str, Tensor] = {}
        windows = prepared.windows
        if windows is not None:
            names = [ORIGINAL, *map(str, bits)]
            if len(windows.calibration):
                self.learning = dict.fromkeys(names, self.runner.embed(windows.calibration))
            rtn = [] if self.settings.method.name == "rtn" and len(bits) == 1 else [f"rtn {value}" for value in bits]
            self.checking = dict.fromkeys([*names, *rtn], self.runner.embed(windows.heldout))

    def run_blocks(self) -> None:
        blocks = self.prepared.discovery.blocks
        resumed = sum(self.state.has(index) for index in range(len(blocks)))
        if resumed:
            self.reporter.say(f"resuming: {resumed} of {len(blocks)} blocks are already done")
        with self.reporter.track("quantizing", len(blocks), "block") as steps:
            for index, name in enumerate(blocks):
                had = self.state.has(index)
                self._run_block(index)
                _return_free_memory()
                steps.step(name, skipped=had)

    def _run_block(self, index: int) -> None:
        linears = self.prepared.discovery.of_block(index)
        with self.runner.block(index) as block:
            prefix = self.prepared.discovery.blocks[index] + "."
            weights = {linear.name: _weight(block, linear, prefix) for linear in linears}
            targets = self._run(index, block, self.learning, ORIGINAL)
            if self.state.has(index):
                planes = self.state.load(index, list(weights))
            else:
                planes = self._solve(index, block, linears, weights, targets)
                self.state.save(index, planes)
            self._advance(index, block, linears, weights, planes, targets)

    def _solve(
        self,
        index: int,
        block: nn.Module,
        linears: Sequence[LinearInfo],
        weights: dict[str, Tensor],
        targets: Tensor | None,
    ) -> dict[str, PlaneWeight]:
        prefix = self.prepared.discovery.blocks[index] + "."
        task = BlockTask(
            block=block,
            weights={name.removeprefix(prefix): weight for name, weight in weights.items()},
            transposed=frozenset(linear.name.removeprefix(prefix) for linear in linears if linear.transposed),
            bits=self.settings.bits,
            group_size=self.settings.group_size,
            call=lambda module, hidden: self.runner.call(index, module, hidden),
            inputs=self.learning.get(ORIGINAL),
            targets=targets,
            chains={bits: self.learning[str(bits)] for bits in self.settings.bits} if self.learning else {},
            generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index),
            say=lambda message: self.reporter.say(f"  {prefix[:-1]}: {message}"),
        )
        solved = self.settings.method.quantize_block(task)
        return {prefix + name: weight for name, weight in solved.items()}

    def _run(self, index: int, block: nn.Module, chains: dict[str, Tensor], name: str) -> Tensor | None:
        return self.runner.run(index, block, chains[name]) if name in chains else None

    def _advance(
        self,
        index: int,
        block: nn.Module,
        linears: Sequence[LinearInfo],
        weights: dict[str, Tensor],
        planes: dict[str, PlaneWeight],
        targets: Tensor | None,
    ) -> None:
        """Move every chain past this block, each with its own weights."""
        if targets is not None:
            self.learning[ORIGINAL] = targets
        prefix = self.prepared.discovery.blocks[index] + "."
        moved = self._run(index, block, self.checking, ORIGINAL)
        if moved is not None:
            self.checking[ORIGINAL] = moved
        for bits in self.settings.bits:
            for linear in linears:
                weight = weights[linear.name]
                dense = decode(planes[linear.name], bits).to(weight.device)
                error = (dense - weight).square().sum(dtype=torch.float64) / weight.square().sum(
                    dtype=torch.float64
                ).clamp_min(1e-300)
                self.layer_error.setdefault(linear.name, {})[str(bits)] = float(error)
                _set_weight(block, linear, prefix, dense)
            for chains in (self.learning, self.checking):
                moved = self._run(index, block, chains, str(bits))
                if moved is not None:
                    chains[str(bits)] = moved
            if f"rtn {bits}" in self.checking:
                for linear in linears:
                    plain = RTN().quantize_layer(weights[linear.name], (bits,), self.settings.group_size)
                    _set_weight(block, linear, prefix, decode(plain, bits))
                self.checking[f"rtn {bits}"] = self.runner.run(index, block, self.checking[f"rtn {bits}"])

    def check(self) -> Report:
        """Measure every chain on the held-out windows and put the report together."""
        measured: dict[str, Measured] = {}
        if self.checking:
            assert self.prepared.windows is not None
            tallies = {name: Tally() for name in self.checking}
            for targets, logits in self.runner.logits(self.checking, self.prepared.windows.heldout):
                for name, tally in tallies.items():
                    tally.add(logits[name], targets, None if name == ORIGINAL else logits[ORIGINAL])
            measured = {name: tally.result() for name, tally in tallies.items()}
            broken = [name for name, result in measured.items() if not result.nll < float("inf")]
            if broken:
                raise CheckError(
                    f"the loss is not finite at {', '.join(broken)}",
                    hint="the model overflows in fp32, or a weight is damaged; try another method",
                )
        count = self.prepared.discovery.weight_count
        spec = self.prepared.spec()
        rows = []
        lower: Measured | None = None
        for bits in self.settings.bits:
            size = spec.bytes_read(bits)
            mine, rtn = measured.get(str(bits)), measured.get(f"rtn {bits}")
            rows.append(
                {
                    "bits": bits,
                    "bpw_read": 8 * size / count,
                    "bytes": size,
                    **_measures(mine),
                    "rtn": None if rtn is None else _measures(rtn),
                    "verdict": verdict(bits, mine, rtn, lower),
                }
            )
            lower = mine
        discovery, original = self.prepared.discovery, measured.get(ORIGINAL)
        return Report(
            output=str(self.settings.output),
            method=self.settings.method.name,
            group_size=self.settings.group_size,
            results=tuple(rows),
            reference=None if original is None else {"nll": original.nll, "perplexity": original.perplexity},
            heldout_tokens=0 if original is None else original.tokens,
            layer_error=self.layer_error,
            left_out=tuple({"name": x.name, "shape": list(x.shape), "reason": x.reason} for x in discovery.left_out),
            tied=discovery.tied,
            notes=tuple(self.reporter.notes),
        )


def _return_free_memory() -> None:
    """Ask the C library to give freed pages back; without it a long job's heap keeps its high-water mark."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def _measures(measured: Measured | None) -> dict[str, float | None]:
    if measured is None:
        return {"nll": None, "kld": None, "top1_agreement": None}
    return {"nll": measured.nll, "kld": measured.kld, "top1_agreement": measured.top1_agreement}


def _weight(block: nn.Module, linear: LinearInfo, prefix: str) -> Tensor:
    """W [N, K] of a linear in the block, fp32."""
    parameter = block.get_submodule(linear.name.removeprefix(prefix)).weight
    assert isinstance(parameter, Tensor)
    return (parameter.T if linear.transposed else parameter).detach().contiguous()


def _set_weight(block: nn.Module, linear: LinearInfo, prefix: str, weight: Tensor) -> None:
    module = block.get_submodule(linear.name.removeprefix(prefix))
    assert isinstance(module.weight, Tensor)
    value = (weight.T if linear.transposed else weight).to(module.weight.device)
    module.weight = nn.Parameter(value, requires_grad=False)


def _assemble(prepared: Prepared, state: JobState, report: Report) -> None:
    """Write the checkpoint from the finished blocks and the source's unquantized tensors."""
    source, discovery = prepared.source, prepared.discovery
    entries: list[TensorEntry] = []
    for name, stored in prepared.common.items():
        dtype, shape = source.spec(stored)
        entries.append(TensorEntry(name, dtype, shape, lambda stored=stored: source.map(stored)))  # type: ignore[misc]
    for index in range(len(discovery.blocks)):
        layers = [linear.name for linear in discovery.of_block(index)]
        entries.extend(state.entries(index, layers))
        entries.extend(TensorEntry.of(guard_name(name), torch.empty(0, dtype=source.dtype)) for name in layers)
    output = prepared.settings.output
    with disk_errors(output):
        for pattern in COPIED_FILES:
            for path in sorted(source.folder.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, output / path.name)
    config = read_json(source.folder / CONFIG_FILE)
    config["quantization_config"] = prepared.spec().model_dump(exclude_none=True)
    write_checkpoint(output, config, entries, report.saved())


def _already_done(prepared: Prepared, reporter: Reporter) -> Report | None:
    """The saved report if the output holds this very result already; an error if it holds another."""
    output = prepared.settings.output
    if not is_checkpoint(output):
        return None
    reader = CheckpointReader(output)
    wanted = prepared.spec().model_dump(exclude_none=True)
    changed = differences(reader.spec.model_dump(exclude_none=True), wanted)
    if changed:
        raise PreflightError(
            [
                UsageError(
                    f"{output} already holds a finished model with other settings: " + "; ".join(changed),
                    hint="choose another folder for -o, or delete this one",
                )
            ]
        )
    reporter.say(f"{output} already holds the result of this command; nothing to do")
    shutil.rmtree(output / ".job", ignore_errors=True)
    saved = read_json(output / REPORT_FILE)
    return _with_measures(Report(output=str(output), **saved), output, time.monotonic())


def _with_measures(report: Report, output: Path, started: float) -> Report:
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return Report(
        **{
            **report.to_json(),
            "total_bytes": size,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak,
        }
    )


def _describe(prepared: Prepared, reporter: Reporter) -> Report:
    """The report of a dry run: what would be done, with sizes, and nothing measured."""
    settings, discovery = prepared.settings, prepared.discovery
    for linear in discovery.linears:
        reporter.say(f"{linear.name}: [{linear.out_features}, {linear.in_features}] -> bits {settings.bits}")
    for entry in discovery.left_out:
        reporter.say(f"{entry.name}: {list(entry.shape)} stays as it is ({entry.reason})")
    reporter.say(
        f"dry run: {len(discovery.linears)} layers, {discovery.weight_count} weights; needs about "
        f"{megabytes(prepared.disk_bytes)} of disk and {megabytes(prepared.memory_bytes)} of memory; "
        "nothing was written"
    )
    spec = prepared.spec()
    rows = []
    for bits in settings.bits:
        size = spec.bytes_read(bits)
        row = {"bits": bits, "bpw_read": 8 * size / discovery.weight_count, "bytes": size, **_measures(None)}
        rows.append({**row, "rtn": None, "verdict": "dry run"})
    return Report(
        output=str(settings.output),
        method=settings.method.name,
        group_size=settings.group_size,
        results=tuple(rows),
        reference=None,
        heldout_tokens=0,
        layer_error={},
        left_out=tuple({"name": x.name, "shape": list(x.shape), "reason": x.reason} for x in discovery.left_out),
        tied=discovery.tied,
        notes=tuple(reporter.notes),
    )
