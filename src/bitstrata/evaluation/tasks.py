"""Scores of EleutherAI's lm-evaluation-harness (the extra `eval`), at each bits of one loaded model.

A task is a name that the harness knows (a pattern, a group or a tag as well), a YAML file, or a folder of them. What is
in a folder or a file is read from there alone, so that it runs offline as far as its data does.

The harness sees a transformers model, `HFLM(pretrained=model)`, and asks it for one precision at a time. Its random
numbers are as it sets them itself; those of the caller are left as they were.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import BitstrataError, InputError, UsageError, first_line
from ..memory import is_out_of_memory
from ..options import EvaluateOptions
from ..plans import bits_name
from ..progress import Steps
from .subject import Subject

INSTALL = "pip install 'bitstrata[eval]', or pip install 'lm-eval[hf]'"
YAML = (".yaml", ".yml")

Scores = dict[str, dict[str, float | None]]  # task -> metric, by the harness's own names -> value


@dataclass(frozen=True)
class OnTasks:
    """What the tasks gave: scores for each of the subject's `chosen` and of the original, and how they were asked.

    asked: by task: `samples`, `num_fewshot`, `version`.
    """

    rows: tuple[Scores, ...]
    original: Scores | None
    asked: dict[str, dict[str, Any]]


def check_tasks(options: EvaluateOptions) -> None:
    """Raise UsageError if there is no harness, or for numbers that it cannot use."""
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(f"tasks need lm-evaluation-harness: {first_line(error)}", hint=INSTALL) from error
    if options.limit is not None and not options.limit > 0:
        raise UsageError(f"limit must be above 0, got {options.limit}", hint="examples a task, or a share below 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"num_fewshot must be at least 0, got {options.num_fewshot}")
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {options.batch_size}")


def measure_tasks(subject: Subject, options: EvaluateOptions) -> OnTasks:
    """Run the tasks at each bits, and with the original where there is one.

    Raises:
        UsageError: an unknown name, a folder without tasks, a chat template that is asked for and not there.
        InputError: a task whose files or data cannot be read, or that fails.
    """
    with _aside():
        manager, names = _found(_specs(options.tasks))
    if options.apply_chat_template and not subject.tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template", hint="leave out --apply-chat-template")
    found: list[dict[str, Any]] = []
    runs = len(subject.chosen) + (subject.original is not None)
    with Steps("running tasks", runs, "precision") as steps, _aside():
        for value in subject.chosen:
            with subject.at(value) as model:
                found.append(_run(model, subject, options, manager, names))
            steps.step(f"{bits_name(value)} bits" if isinstance(value, int) else str(bits_name(value)))
        original = None
        if subject.original is not None:
            original = _scores(_run(subject.original, subject, options, manager, names))
            steps.step("reference")
    first = found[0]
    asked = {
        name: {
            "samples": first.get("n-samples", {}).get(name, {}).get("effective"),
            "num_fewshot": first.get("n-shot", {}).get(name),
            "version": first.get("versions", {}).get(name),
        }
        for name in first["results"]
    }
    return OnTasks(tuple(map(_scores, found)), original, asked)


def _run(model: PreTrainedModel, subject: Subject, options: EvaluateOptions, manager: Any, names: list[str]) -> Any:
    """The harness's own result for the model as it is set."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=options.batch_size)
        return simple_evaluate(
            model=wrapped,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            log_samples=False,
        )
    except BitstrataError:
        raise
    except Exception as error:  # a task is a program and its data: anything may be wrong with it
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the tasks {', '.join(names)} fail in lm-evaluation-harness: {first_line(error)}",
            hint="data sets that are not on this machine are downloaded, which HF_HUB_OFFLINE=1 forbids",
        ) from error


def _scores(result: Mapping[str, Any]) -> Scores:
    """The numbers of a result by task and metric; what has no number, such as the error of one sample, is None."""
    return {
        task: {
            name: float(value) if isinstance(value, (int, float)) else None
            for name, value in metrics.items()
            if "," in name  # metric,filter; others are the task's name and its indentation in a table
        }
        for task, metrics in result["results"].items()
    }


def _specs(tasks: str | Sequence[str] | None) -> list[str]:
    """What was asked for, one by one: several may stand in one text, with commas between them."""
    given = [tasks] if isinstance(tasks, str) else list(tasks or ())
    if not all(isinstance(entry, str) for entry in given):
        raise UsageError(f"tasks must be names, files or folders, got {given!r}")
    specs = [spec.strip() for entry in given for spec in entry.split(",") if spec.strip()]
    if not specs:
        raise UsageError("no task is given", hint="a name that lm-eval knows, a YAML file, or a folder of them")
    return specs


def _found(specs: Sequence[str]) -> tuple[Any, list[str]]:
    """A manager that knows all that is asked for, and the names to run, each once."""
    from lm_eval.tasks import TaskManager

    paths = {spec: Path(spec).absolute() for spec in specs if _is_path(spec)}
    folders = list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths.values()))
    with _words("the tasks cannot be read"):
        # the harness's own thousands are looked through only if one of them may be meant
        manager = TaskManager(include_path=folders, include_defaults=len(paths) < len(specs))
    names: list[str] = []
    for spec in specs:
        names += _in_path(manager, paths[spec]) if spec in paths else _named(manager, spec)
    return manager, list(dict.fromkeys(names))


def _is_path(spec: str) -> bool:
    path = Path(spec)
    if path.suffix in YAML or path.is_absolute() or spec.endswith("/"):
        if not path.exists():
            raise UsageError(f"there is no file or folder {spec}", hint="give a YAML file or a folder of them")
        return True
    return path.is_dir()


def _in_path(manager: Any, path: Path) -> list[str]:
    """The tasks that the file, or the files in the folder, describe."""
    names = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None
        and (path in Path(entry.yaml_path).absolute().parents if path.is_dir() else Path(entry.yaml_path) == path)
        and entry.kind.name in ("TASK", "PY_TASK", *(() if path.is_dir() else ("GROUP",)))
    ]
    if not names:
        raise UsageError(
            f"{path} describes no task that lm-evaluation-harness reads",
            hint="a task is a YAML file with the keys task, output_type, doc_to_text, ...; see lm-eval's documentation",
        )
    return names


def _named(manager: Any, spec: str) -> list[str]:
    found = fnmatch.filter(manager.all_tasks, spec)
    if not found:
        near = difflib.get_close_matches(spec, manager.all_tasks, 3)
        raise UsageError(
            f"lm-evaluation-harness knows no task {spec}",
            hint=f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them; or give a YAML file",
        )
    return found


@contextlib.contextmanager
def _words(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Around runs of the harness, which seeds the random generators of the process and warns of models in memory."""
    python, numpy = random.getstate(), np.random.get_state()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            logger.setLevel(level)
