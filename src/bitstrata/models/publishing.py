"""A checkpoint on the hub: its files, and a card that says what it is, how it was measured and how it was made.

The card is made of what the checkpoint itself says (config.json, bitstrata_report.json). A README.md of one's own in
the folder is published in its place.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointReader
from ..checkpoint.reader import read_json
from ..checkpoint.schema import REPORT_FILE
from ..errors import InputError, UsageError, first_line
from ..options import PushOptions
from ..progress import log
from ..verbs import verb

CARD, PICTURE = "README.md", "bitstrata_quality.png"
LEFT_OUT = (".job", ".cache", ".git")  # folders that are no part of a checkpoint
TOKEN = "set HF_TOKEN, or `hf auth login`; the token must be allowed to write"


@dataclass(frozen=True)
class Pushed:
    """Where a checkpoint is now. url: of the commit; files: how many, the card included; bytes: of all."""

    repo: str
    url: str
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.files} files, {self.bytes / 1e6:.1f} MB, at {self.url}"


@verb(PushOptions)
def push(options: PushOptions) -> Pushed:
    """Put a checkpoint on the hub, with a card.

    Raises:
        CheckpointError: the folder holds no checkpoint, or an incomplete one.
        UsageError: a name that no repository can have, or the hub knows no token.
        InputError: the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, repo = Path(options.model), str(options.repo)
    reader = CheckpointReader(folder)
    check_repo(repo, options.token)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in LEFT_OUT
    }
    contents: dict[str, Path | bytes] = dict(files)
    if CARD not in files:
        drawn = picture(folder)
        contents[CARD] = card(folder, repo, has_picture=drawn is not None).encode()
        if drawn is not None:
            contents[PICTURE] = drawn
    api = HfApi(token=options.token)
    log.info(f"publishing {len(contents)} files at {repo}")
    try:
        api.create_repo(repo, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        commit = api.create_commit(
            repo,
            [
                CommitOperationAdd(name, value if isinstance(value, bytes) else str(value))
                for name, value in contents.items()
            ],
            commit_message=f"bitstrata planes for {', '.join(map(str, reader.bits))} bits",
            revision=options.revision,
        )
    except Exception as error:  # whatever the hub's client raises for what the hub says
        raise InputError(f"the hub does not take {repo}: {first_line(error)}", hint=TOKEN) from error
    size = sum(len(value) if isinstance(value, bytes) else value.stat().st_size for value in contents.values())
    return Pushed(repo, str(commit.commit_url), len(contents), size)


def check_repo(repo: str, token: str | None = None) -> None:
    """Raise UsageError for what is no repository's name, or where the hub knows no token: before the long part."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository: {first_line(error)}", hint="USER/NAME") from error
    try:
        HfApi(token=token).whoami()
    except Exception as error:
        raise UsageError(f"the hub does not know who you are: {first_line(error)}", hint=TOKEN) from error


def card(folder: Path, repo: str, *, has_picture: bool = False) -> str:
    """The text of a model card for the checkpoint in `folder`."""
    reader = CheckpointReader(folder)
    spec, report = reader.spec, _report(folder)
    made: Mapping[str, Any] = spec.provenance or {}
    source, bits = str(made.get("model", "")), ", ".join(map(str, reader.bits))
    head: dict[str, Any] = {"library_name": "bitstrata", "pipeline_tag": "text-generation"}
    if source.count("/") == 1:
        head |= {"base_model": source, "base_model_relation": "quantized"}
    head["tags"] = ["bitstrata", "quantized", *(f"{number}-bit" for number in reader.bits)]
    name, lowest = repo.rpartition("/")[2], reader.bits[0]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name}", ""]
    lines += [
        f"{source or 'A model'} in nested bit-planes: one set of weights that runs at {bits} bits, chosen per request.",
        "",
        "```",
        "pip install bitstrata",
        f'bitstrata generate {repo}:{lowest} "Once upon a time"',
        f"bitstrata serve {repo}",
        "```",
        "",
        "```python",
        "import bitstrata",
        "",
        f'model = bitstrata.load("{repo}", bits={lowest})',
        f"model.generate(**inputs, bits={reader.bits[-1]})",
        "```",
        "",
    ]
    if report.get("results"):
        lines += _measured(report, has_picture)
    lines += ["## How it was made", ""]
    lines += [f"* {what}: {value}" for what, value in _recipe(spec, made).items() if value not in (None, "", {})]
    sums = made.get("model_sha256")
    if isinstance(sums, Mapping):
        lines += ["", "Digests (sha256) of the source:", ""]
        lines += [f"* `{file}`: `{digest}`" for file, digest in sums.items()]
    return "\n".join([*lines, ""])


def _measured(report: Mapping[str, Any], has_picture: bool) -> list[str]:
    """The table of what the job measured on held-out text, beside round-to-nearest at the same bits."""
    tokens, reference = report.get("heldout_tokens"), report.get("reference") or {}
    where = f" on {tokens} held-out tokens of the calibration text" if tokens else ""
    lines = ["## What it costs", "", f"Measured{where}. KLD is to the original's distribution of the next token.", ""]
    lines += ["| bits | bits a weight read | MB read a token | nll | KLD | same top token | KLD of round-to-nearest |"]
    lines += ["|---|---|---|---|---|---|---|"]
    if reference:
        lines.append(f"| original | | | {_number(reference.get('nll'))} | | | |")
    for row in report["results"]:
        plain = row.get("rtn") or {}
        share = row.get("top1_agreement")
        cells = [
            row["bits"], f"{row['bpw_read']:.3f}", f"{row['bytes'] / 1e6:.1f}", _number(row.get("nll")),
            _number(row.get("kld")), "" if share is None else f"{share:.1%}", _number(plain.get("kld")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if has_picture:
        lines += ["", f"![KLD against bytes read]({PICTURE})"]
    return [*lines, ""]


def _recipe(spec: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    windows = ""
    if made.get("calibration"):
        size = f"{made.get('num_samples')} windows of {made.get('seq_len')} tokens"
        windows = f"{made['calibration']}, {size}, seed {made.get('seed')}"
    versions = made.get("versions")
    return {
        "method": f"{spec.method}, preset {made.get('preset', 'default')}",
        "options": ", ".join(f"{key}={value}" for key, value in spec.method_options.items()),
        "group size": spec.group_size,
        "calibration": windows,
        "left as they were": ", ".join(made.get("skip") or ()),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items())
        if isinstance(versions, Mapping)
        else "",
    }


def picture(folder: Path) -> bytes | None:
    """A PNG of the measured KLD against bytes read; None where nothing was measured, or matplotlib is missing."""
    rows = [row for row in _report(folder).get("results", []) if row.get("kld") is not None]
    if len(rows) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, key in (("this model", None), ("round-to-nearest, a file for each", "rtn")):
        points = [(row["bytes"] / 1e6, (row if key is None else row.get(key) or {}).get("kld")) for row in rows]
        known = [(size, value) for size, value in points if value]
        axes.plot(*zip(*known, strict=True), marker="o", label=label) if known else None
    axes.set(xlabel="MB read a token", ylabel="KLD to the original", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)  # type: ignore[no-untyped-call]
    return written.getvalue()


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_FILE
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
