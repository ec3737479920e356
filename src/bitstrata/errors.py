"""Every error bitstrata raises on purpose.

    BitstrataError                    exit code 1
    ├── UsageError (ValueError)       2   an argument or flag is wrong
    │   ├── UnsupportedBitsError          bits the model does not have
    │   ├── ClosedError                   an engine that takes no more requests
    │   ├── BatchError                    a model whose architecture cannot run in batches
    │   └── KernelError                   the kernel asked for cannot run here
    ├── InputError                    3   a file, a model or a text is wrong
    │   ├── CheckpointError               a bitstrata checkpoint is malformed
    │   ├── ModelError                    a source model cannot be quantized
    │   ├── TextError                     a calibration or evaluation text is unusable
    │   ├── PlanError                     a plan, page order or sensitivity file is malformed or of another model
    │   └── JobError                      an unfinished job does not fit the command
    ├── PreflightError                    everything found wrong before a job starts
    ├── ResourceError                 4   memory or disk ran out
    │   └── ProcessError                  one of several processes of a job has ended
    └── CheckError                    5   a result failed its own check

A message says what is wrong, where, and what was expected; ``hint`` says what to do.
The command line prints both and exits with ``exit_code``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class BitstrataError(Exception):
    """Base of all errors raised on purpose; `hint` tells the reader what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def sentence(self) -> str:
        """Message and hint on one line."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(BitstrataError, ValueError):
    """An argument or a flag is wrong."""

    exit_code = 2


class UnsupportedBitsError(UsageError):
    """The requested bits are not among those the model was quantized for."""

    def __init__(self, requested: object, supported: Iterable[int], *, where: str = "this model") -> None:
        names = ", ".join(str(bits) for bits in supported)
        super().__init__(
            f"bits={requested} is not available in {where}",
            hint=f"supported bits: {names}",
        )
        self.requested = requested


class ClosedError(UsageError):
    """The engine was closed, or has failed: it takes no more requests."""


class BatchError(UsageError):
    """The model's architecture does something that batches here do not know: only its own forward runs it."""


class KernelError(UsageError):
    """No kernel can run the operation, or the forced one cannot."""


class InputError(BitstrataError):
    """A file, a model or a text cannot be used."""

    exit_code = 3


class CheckpointError(InputError):
    """A bitstrata checkpoint is missing something, malformed, or from another version."""


class ModelError(InputError):
    """A source model cannot be read or quantized."""


class TextError(InputError):
    """A text is empty, too short or not text."""


class PlanError(InputError):
    """A plan, a page order or a sensitivity file is malformed, or was made for another model."""


class JobError(InputError):
    """A quantization job in the output folder cannot be continued by this command."""


class ResourceError(BitstrataError):
    """Memory or disk is not enough."""

    exit_code = 4


class ProcessError(ResourceError):
    """One of the processes that work on a job has ended; if it said why, `exit_code` is that of its own error."""


class CheckError(BitstrataError):
    """A result failed its own check."""

    exit_code = 5


class PreflightError(BitstrataError):
    """All problems found before the first expensive step, in one error.

    `exit_code` is that of the gravest problem in the order resource, input, usage.
    """

    def __init__(self, problems: Sequence[BitstrataError]) -> None:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{len(problems)} {noun} found before starting; nothing was written"]
        for number, problem in enumerate(problems, 1):
            lines.append(f"  {number}. {problem.message}")
            if problem.hint:
                lines.append(f"     hint: {problem.hint}")
        super().__init__("\n".join(lines))
        self.problems = tuple(problems)
        self.exit_code = max(problem.exit_code for problem in problems)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the next if it ends in a colon; or the error's type."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOMEM):  # not about a file
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: could not write {path}",
                hint="free some space and run the same command again; finished blocks are kept",
            ) from error
        if error.errno == errno.EFBIG:
            raise ResourceError(
                f"{path} would be larger than a file may be here",
                hint="the limit is the process's (ulimit -f) or the file system's; raise it, or choose another folder, "
                "and run the same command again",
            ) from error
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}", hint="choose another output folder"
        ) from error
