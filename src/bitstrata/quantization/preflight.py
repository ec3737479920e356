"""Everything that can be found wrong before the first expensive step, found at once.

`prepare` reads every byte of the model, file by file (digests, finite weights), or, without `weights`, nothing
but the headers, which takes seconds whatever the size of the model. It either returns a job ready to run or raises
a PreflightError that lists all problems. Nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import shown
from ..calibration import BlockRunner, Text, Windows, calibration_windows, read_mix, text_digest
from ..checkpoint import is_checkpoint
from ..checkpoint.writer import TEMPORARY
from ..errors import BitstrataError, ModelError, PreflightError, ResourceError, UsageError
from ..memory import free_memory
from ..models import (
    Discovery,
    HeadLayer,
    SourceModel,
    check_vocabulary,
    context_limit,
    discover,
    find_head,
    load_tokenizer,
    resolve,
)
from ..models.source_files import missing_tensors
from ..planes.weights import all_finite
from ..progress import log, note
from ..solvers.grouping import check_weight
from ..version import __version__
from .companions import note_companions
from .context import Prepared, Stage, megabytes
from .duration import told
from .mtp import Unused, sort_unused, with_mtp
from .settings import Settings
from .state import JOB_FOLDER, is_job

HELDOUT_TOKENS, FEWEST_WINDOWS, MOST_WINDOWS = 4096, 8, 16  # of the final check
LONGEST_FILE = f"{JOB_FOLDER}/refined-000000.safetensors{TEMPORARY}"  # below the output
_Value = TypeVar("_Value")


class _Problems(list[BitstrataError]):
    def attempt(self, make: Callable[[], _Value]) -> _Value | None:
        """What `make` returns, or None and one more problem."""
        try:
            return make()
        except BitstrataError as error:
            self.append(error)
            return None


def prepare(
    settings: Settings, stages: Sequence[Stage], earlier: Sequence[BitstrataError] = (), *, weights: bool = True
) -> Prepared:
    """Check everything and gather what the job needs. Raises PreflightError, `earlier` problems first.

    `weights`: whether they are read. Without them there is no fingerprint, and what is wrong with them is not found.
    """
    problems = _Problems(earlier)
    problems.attempt(lambda: _check_output(settings))
    documents = None
    if settings.calibration is not None:
        calibration = settings.calibration
        documents = problems.attempt(lambda: read_mix(calibration, part="calibration"))
    folder = problems.attempt(lambda: resolve(settings.model, hub=settings.hub))
    source = None if folder is None else problems.attempt(lambda: SourceModel(folder))
    tokenizer = None
    if source is not None and settings.calibration is not None:
        tokenizer = problems.attempt(lambda: load_tokenizer(source.folder))
    if source is None:
        raise PreflightError(problems)

    settings = _within_context(settings, source)
    model = problems.attempt(source.skeleton)
    discovery = None if model is None else problems.attempt(lambda: _discover(model, settings.skip, problems))
    windows = None
    if documents is not None and tokenizer is not None:
        windows = problems.attempt(lambda: _windows(settings, source, tokenizer, documents))
    if model is None or discovery is None:
        raise PreflightError(problems)

    settings = _within_layers(settings, discovery)
    head = () if settings.head_bits is None else problems.attempt(lambda: find_head(model)) or ()
    discovery = _without(discovery, head)
    common, unused = _check_tensors(source, model, discovery, head, problems, weights)
    discovery = with_mtp(discovery, source, unused.mtp, settings)
    note_companions(source)
    prepared = Prepared(settings, tuple(stages), source, model, discovery, windows, common, {}, head, unused.mtp)
    lacking = list(_check_resources(prepared))
    if lacking and not weights and not problems:
        log.info(told(prepared))  # what was asked for, though it cannot be done here
    problems.extend(lacking)
    if not problems and windows is not None and weights:  # it takes memory, and a model that is whole
        runner = BlockRunner(source, model, discovery, settings.seq_len, settings.device)
        problems.attempt(lambda: runner.check(windows.heldout[:1]))
    if problems:
        raise PreflightError(problems)
    if not weights:
        return prepared
    fingerprint = {
        **settings.fingerprint(),
        "model_sha256": source.digests(),
        "text_sha256": None if documents is None else text_digest(documents),
        "windows_sha256": None if windows is None else windows.digest(),
        "versions": {"bitstrata": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    return replace(prepared, fingerprint=fingerprint)


def _within_context(settings: Settings, source: SourceModel) -> Settings:
    limit = context_limit(source.config)
    if settings.calibration is None or limit is None or settings.seq_len <= limit:
        return settings
    note(f"seq-len lowered from {settings.seq_len} to {limit}, the model's context")
    return replace(settings, seq_len=int(limit))


def _within_layers(settings: Settings, discovery: Discovery) -> Settings:
    widest = max(linear.in_features for linear in discovery.linears)
    if settings.group_size <= widest:
        return settings
    note(f"group-size lowered from {settings.group_size} to {widest}, the inputs of the widest layer")
    return replace(settings, group_size=widest)


def _without(discovery: Discovery, head: Sequence[HeadLayer]) -> Discovery:
    """`discovery` with the quantized head and embedding no longer among what is left out."""
    taken = {f"{name}.weight" for layer in head for name in (layer.name, layer.tied) if name is not None}
    return replace(discovery, left_out=tuple(entry for entry in discovery.left_out if entry.name not in taken))


def _discover(model: PreTrainedModel, skip: Sequence[str], problems: _Problems) -> Discovery:
    try:
        return discover(model, skip)
    except UsageError as error:
        problems.append(error)
        return discover(model)  # so that the tensors are checked too


def _check_output(settings: Settings) -> None:
    output, another = settings.output, "choose another folder for -o"
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name {str(output)!a} is not UTF-8, so its files could not be read", hint=another
        ) from error
    try:
        for name in (output / LONGEST_FILE, *(_existing(output) / part for part in output.parts)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(name)  # raises for a name that is too long, or that may not be looked at
        ours = is_job(output) or is_checkpoint(output)
        used = output.is_dir() and any(output.iterdir())
    except (OSError, ValueError) as error:  # a zero byte is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{shown(str(output), 300)} cannot be used: {reason}", hint=another) from error
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file", hint="give a folder to -o")
    if used and not ours:
        raise UsageError(f"{output} exists and was not made by bitstrata; it is left alone", hint=another)
    for path in [output, *output.absolute().parents]:
        if os.path.islink(path) and not path.exists():
            raise UsageError(f"{path} is a link to {os.readlink(path)}, which is not there", hint="make that folder")
    parent = _existing(output)
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder, so {output} cannot be made", hint=another)


def _existing(output: Path) -> Path:
    """The output, or the nearest folder above it that exists."""
    return next((path for path in [output, *output.absolute().parents] if os.path.exists(path)), Path("/"))


def heldout_windows(seq_len: int) -> int:
    """Windows of the final check: each takes as long, in fp32 and twice for each bits, as several of the others."""
    return min(MOST_WINDOWS, max(FEWEST_WINDOWS, HELDOUT_TOKENS // seq_len))


def _windows(settings: Settings, source: SourceModel, tokenizer: PreTrainedTokenizerBase, documents: Text) -> Windows:
    wanted = settings.num_samples if settings.method.needs_calibration else 0
    windows = calibration_windows(
        tokenizer,
        documents,
        num_samples=wanted,
        seq_len=settings.seq_len,
        num_heldout=heldout_windows(settings.seq_len),
        seed=settings.seed,
    )
    parts = (windows.calibration, windows.heldout)
    check_vocabulary((int(part.max()) for part in parts if part.numel()), source.config, tokenizer)
    if len(windows.calibration) < wanted:
        note(
            f"the calibration text gives {len(windows.calibration)} windows of {settings.seq_len} tokens, "
            f"{wanted} were asked for"
        )
    return windows


def _check_tensors(
    source: SourceModel,
    model: PreTrainedModel,
    discovery: Discovery,
    head: Sequence[HeadLayer],
    problems: list[BitstrataError],
    weights: bool,
) -> tuple[dict[str, str], Unused]:
    """Compare stored tensors with the model: state-dict name -> stored name of unquantized ones, and unused ones.

    weights: whether to look at what the tensors hold too.
    """
    # what is quantized -> what to do where it cannot be
    quantized = {f"{linear.name}.weight": "leave the layer out with --skip" for linear in discovery.linears}
    quantized |= {f"{layer.name}.weight": "leave --head-bits out" for layer in head}
    copies = {name for group in discovery.tied for name in group[1:]}
    common, used, missing = {}, set(), []
    for name, tensor in model.state_dict().items():
        stored = source.stored_name(name)
        if stored is not None:
            used.add(source.tensor_of(stored))
        if name in copies:
            continue
        if stored is None:
            missing.append(name)
            continue
        try:
            _check_form(source, stored, tensor)
            if weights:
                _check_numbers(source, stored, quantize=quantized.get(name))
        except ModelError as error:
            problems.append(error)
            continue
        if name not in quantized:
            common[name] = stored
    for one, other in source.untied:
        note(f"the config ties {one} to {other}, but the stored tensors differ: both are kept, tied no longer")
    left = sorted(set(source.files) - used)
    unused = sort_unused(left, discovery, type(model))
    if missing:
        problems.append(missing_tensors(source.folder, type(model).__name__, missing, left))
    elif unused.others:
        note(
            f"{len(unused.others)} stored tensors are not part of the model and are dropped: "
            f"{', '.join(unused.others[:5])}"
        )
    return common, unused


def _check_form(source: SourceModel, stored: str, expected: Tensor) -> None:
    dtype, shape = source.spec(stored)
    if shape != tuple(expected.shape):
        raise ModelError(
            f"{stored}: the config asks for shape {list(expected.shape)}, the file has {list(shape)}",
            hint="config.json and the weights are of different models",
        )
    if expected.is_floating_point() and not dtype.is_floating_point:
        raise ModelError(
            f"{stored} holds {dtype}, not floating-point weights", hint="quantize the original model, not a packed copy"
        )


def _check_numbers(source: SourceModel, stored: str, *, quantize: str | None) -> None:
    """`quantize`: for a weight to be quantized, what to do if it cannot be; None for any other tensor."""
    value = source.map(stored)
    if quantize is not None:
        check_weight(stored, value, hint=quantize)
    elif value.is_floating_point() and not all_finite(value):
        raise ModelError(f"{stored} holds NaN or infinity", hint="the source model is damaged")


def _check_resources(prepared: Prepared) -> Iterator[ResourceError]:
    output = prepared.settings.output
    free = shutil.disk_usage(_existing(output)).free
    if free < prepared.disk_bytes and not os.path.isdir(output / JOB_FOLDER):
        yield ResourceError(
            f"{output} needs about {megabytes(prepared.disk_bytes)} of disk, {megabytes(free)} are free",
            hint="free some space or choose another folder for -o",
        )
    device, need = prepared.settings.device, prepared.memory
    gradients = "gradients" in prepared.settings.method.needs
    here = prepared.settings.here  # processes, each of which takes as much
    for where, kind, needed in (("cpu", "memory", here * need.main), (str(device), "GPU memory", need.gpu)):
        available = free_memory(where) if needed else 0
        if available < needed:
            yield ResourceError(
                f"the job needs about {megabytes(needed)} of {kind}, {megabytes(available)} are free",
                hint="lower --num-samples or --seq-len"
                + (", or use --preset fast: no gradients" if gradients else "")
                + (", or --device cpu" if kind == "GPU memory" else ""),
            )
