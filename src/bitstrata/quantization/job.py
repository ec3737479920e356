"""`bitstrata.quantize`: a source model in, a checkpoint out, one block in memory at a time.

    preflight    everything that can be checked is checked; all problems at once (preflight.py)
    stages       each leaves a durable result, and is skipped where an earlier run left it (`stages_of`)
    finish       assemble the checkpoint, remove `.job`

Chains of hidden states, one a precision and one for the original, are carried from block to block: a method sees the
inputs that each precision really produces, and after the last block they give the logits for the final check. Gradients
of the loss and end-to-end tuning go block by block too.

`Prepared.memory` estimates the peak memory; the measured peak is in the report.
"""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointReader, QuantizationSpec, TensorEntry, is_checkpoint, merge_experts, write_checkpoint
from ..checkpoint.schema import REPORT_FILE, guard_name
from ..errors import BitstrataError, CheckpointError, PreflightError, UsageError
from ..memory import memory_errors, peak_memory
from ..models import check_repo, push
from ..options import PushOptions, QuantizeOptions
from ..progress import log, note, notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from .budget import within_budget
from .companions import checkpoint_config, copy_companions
from .context import Job, Prepared
from .duration import corrected, told
from .given_model import on_disk
from .launch import joined, opened, own_threads, placed, started
from .mtp import write_mtp
from .preflight import prepare
from .report import Report, make_report
from .settings import Settings
from .stages import stages_of
from .state import differences
from .team import Team

MORE_MEMORY = (
    "end other programs and run the same command again: finished blocks are kept; or start over with a lower "
    "--num-samples or --seq-len"
)


LESS_TEXT = "end other programs, or lower --num-samples or --seq-len"
INPUT = ("model_sha256", "text_sha256", "windows_sha256")  # of the fingerprint: what must be the same everywhere


@verb(QuantizeOptions)
@ordinary_torch()
@own_notes()
def quantize(options: QuantizeOptions) -> Report:
    """Quantize a causal language model into nested bit-planes.

    If `output` holds an unfinished job of the same arguments, that is resumed. What of the report is saved is
    `bitstrata_report.json` in it.

    Raises:
        PreflightError: everything wrong with the input, at once, before anything is written.
        JobError: the output holds an unfinished job that does not match.
        ResourceError: the disk or memory filled up; finished blocks are kept.
        CheckError: the result is not finite.
        UsageError, InputError: as `push`, with `push_to_hub`; the result stays in `output`.
    """
    target = None if options.dry_run else options.push_to_hub
    if target is not None:
        check_repo(target, options.token)
    with on_disk(options) as stored:
        report = _quantize(stored)
    if target is not None and report.process == 0:
        log.info(str(push(PushOptions(options.output, target, token=options.token))))
    return report


def _quantize(options: QuantizeOptions) -> Report:
    began = time.monotonic()
    problems: list[BitstrataError] = []
    settings = placed(Settings.parse(options, problems))
    with joined(settings) as team, own_threads(settings):
        with memory_errors("while the model was checked", hint=LESS_TEXT):
            chosen = team.led(lambda: within_budget(settings, problems))
            settings = replace(settings, num_samples=chosen.num_samples, seq_len=chosen.seq_len)
            prepared = prepare(settings, stages_of(settings), problems, weights=not options.dry_run)
        if options.dry_run:
            return replace(_describe(prepared), process=team.rank)
        team.agree("input", {key: prepared.fingerprint[key] for key in INPUT}, differences)
        done = team.led(lambda: _already_done(prepared))
        if done is not None:
            return replace(done, process=team.rank)
        with started(settings) if settings.devices else nullcontext(team) as all_of_them:
            report = work(prepared, all_of_them)
        return replace(_with_measures(report, settings.output, began), process=team.rank)


def work(prepared: Prepared, team: Team) -> Report:
    """What each process of a team does once everything is prepared. Raises UsageError if they do not share a folder."""
    prepared = replace(prepared, fingerprint=team.led(lambda: prepared.fingerprint))
    state = opened(prepared, team)
    try:
        job = Job(prepared, state, team)
        if team.leads:
            job.first_block = lambda seconds: log.info(said) if (said := corrected(prepared, seconds)) else None
        with memory_errors("while quantizing", hint=MORE_MEMORY):
            if team.leads:
                log.info(told(prepared))
            for stage in prepared.stages:
                if stage.divided:
                    stage.run(job)
                else:
                    team.led(lambda stage=stage: stage.run(job))  # type: ignore[misc]
                    if not team.leads:
                        stage.left(job)
            report = team.led(lambda: _result(job))
    except BaseException:
        state.close()
        raise
    job.chains.close()
    if not team.leads:
        state.close()
    team.wait()
    team.led(state.finish)
    return report


def _result(job: Job) -> Report:
    report = make_report(job.prepared, notes(), job.measured, job.layer_error, job.routing)
    _assemble(job, report)
    return report


def _assemble(job: Job, report: Report) -> None:
    """Write the checkpoint from the finished blocks and the source's unquantized tensors."""
    prepared, source, discovery = job.prepared, job.prepared.source, job.discovery
    entries: list[TensorEntry] = []
    for name, stored in prepared.common.items():
        dtype, shape = source.kept_as(stored)
        entries.append(
            TensorEntry(name, dtype, shape, lambda stored=stored, dtype=dtype: source.map(stored).to(dtype))  # type: ignore[misc]
        )
    parts = [(index, [linear.name for linear in discovery.of_block(index)]) for index in range(len(discovery.blocks))]
    for part, names in [*parts, *((layer.role, [layer.name]) for layer in prepared.head)]:
        entries.extend(job.state.entries(part, names))
        entries.extend(TensorEntry.of(guard_name(name), torch.empty(0, dtype=source.dtype)) for name in names)
    output = prepared.settings.output
    copy_companions(source, output)
    write_mtp(source, prepared.mtp, prepared.settings)
    config = checkpoint_config(source)
    spec = prepared.spec()
    config["quantization_config"] = spec.model_dump(exclude_none=True)
    source.check_unchanged()  # what is copied and written from here on is compared as it is read
    write_checkpoint(output, config, merge_experts(spec, entries), report.saved())


def _already_done(prepared: Prepared) -> Report | None:
    """The saved report if the output holds this very result already; an error if it holds another."""
    output = prepared.settings.output
    if not is_checkpoint(output):
        return None
    reader = CheckpointReader(output)
    changed = differences(_settings_of(reader.spec), _settings_of(prepared.spec()))
    if changed:
        raise PreflightError(
            [
                UsageError(
                    f"{output} already holds a finished model with other settings: " + "; ".join(changed),
                    hint="choose another folder for -o, or delete this one",
                )
            ]
        )
    log.info(f"{output} already holds the result of this command; nothing to do")
    shutil.rmtree(output / ".job", ignore_errors=True)
    report = make_report(prepared, notes())
    if (output / REPORT_FILE).exists():  # a checkpoint may lack it
        try:
            report = report.with_saved(output / REPORT_FILE)
        except CheckpointError as error:
            note(f"{error.message}; measures are left out")
            report = replace(report, notes=notes())
    return _with_measures(report, output, time.monotonic())


def _settings_of(spec: QuantizationSpec) -> dict[str, Any]:
    """What a finished result was asked for. Versions do not count: they would not make another one of it now."""
    found = spec.model_dump(exclude_none=True)
    found.get("provenance", {}).pop("versions", None)
    return found


def _with_measures(report: Report, output: Path, started: float) -> Report:
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return replace(report, total_bytes=size, seconds=time.monotonic() - started, peak_memory_bytes=peak_memory())


def _describe(prepared: Prepared) -> Report:
    """The report of a dry run: what would be done, with sizes, and nothing measured."""
    settings, discovery = prepared.settings, prepared.discovery
    for linear in discovery.linears:
        log.info(f"{linear.name}: [{linear.out_features}, {linear.in_features}] -> bits {settings.bits}")
    for layer in prepared.head:
        shared = f", shared with {layer.tied}" if layer.tied is not None else ""
        shape = [layer.out_features, layer.in_features]
        log.info(f"{layer.name}: {shape} -> {settings.head_bits} bits ({layer.role}{shared})")
    for entry in discovery.left_out:
        log.info(f"{entry.name}: {list(entry.shape)} stays as it is ({entry.reason})")
    log.info(
        f"dry run: {len(discovery.linears)} layers, {discovery.weight_count} weights; {told(prepared)}; "
        "weights were not read, so not checked; nothing was written"
    )
    return make_report(prepared, notes())
