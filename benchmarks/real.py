r"""How good is a real model at few bits, beside other quantizers? KL divergence to the original against bytes read.

    python tools/smollm2.py SmolLM2-135M-Instruct        the model (its docstring says where it comes from)
    tools/environment_on_top.sh .venv-dense .venv auto-round==0.16.1 hqq==0.2.8.post1 llama-cpp-python==0.3.36
    .venv-dense/bin/python benchmarks/real.py SmolLM2-135M-Instruct --calibration TEXT --text wikitext=FILE:12000 \
        --text python=FILE:3000 --text chat=chat:3000 --results FOLDER [--only nested,auto-round:bits=2]
    python benchmarks/real.py --results FOLDER --table [--picture FILE.svg]

An entry is a maker with its options, `auto-round:bits=2:group_size=128` (the modules of benchmarks/dense say which);
without `--only` it is those of ENTRIES whose library is here. Makers get the same windows of the same text and give
dense weights; these are put into the original model, and all are measured alike, in fp32 on the same windows.

Making is a process of its own, so its peak memory and time are its own; the measured result is one JSON in the folder.
Later runs leave entries out that are there, so a table can be completed over days; one made with another model, other
windows or other texts is refused. Of several seeds (`--seed`, a run each) the table has the medians. `--keep` leaves
the dense weights in the folder `--work`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from dense import show
from dense.made import Job, load, nothing_left, save
from dense.measure import Judge, Text
from dense.ours import CHECKPOINT, METHODS

from bitstrata.benchmark.machine import describe
from bitstrata.calibration import calibration_windows, read_mix
from bitstrata.errors import BitstrataError, UsageError
from bitstrata.memory import peak_memory
from bitstrata.models import load_tokenizer
from bitstrata.quantization.preflight import heldout_windows

MODULES = {"auto-round": "autoround", "hqq": "hqq_grid", "llama.cpp": "llama_types", "original": "original"}
MODULES |= dict.fromkeys((*METHODS, CHECKPOINT), "ours")
TIMES = ("seconds", "cpu_seconds")
ENTRIES = (
    *("original", "rtn:bits=2", "rtn:bits=3", "rtn:bits=4"),
    *(f"hqq:bits={bits}:group_size={group}" for group in (64, 128) for bits in (2, 3, 4)),
    *(f"llama.cpp:type={kind}" for kind in ("Q2_K", "Q3_K", "Q4_K", "Q4_0")),
    *(f"auto-round:bits={bits}:group_size=128" for bits in (2, 3, 4)),
    *(f"gptq:bits={bits}" for bits in (2, 3, 4)),
    *(f"bpdq:bits={bits}" for bits in (2, 3, 4)),
    *("nested", "nested:preset=best"),
    *(f"auto-round:bits={bits}:group_size=64" for bits in (2, 3, 4)),
)


def maker_of(entry: str) -> tuple[ModuleType, dict[str, str]]:
    """The module and the options of an entry. Raises UsageError for a maker that is not known."""
    name, *parts = entry.split(":")
    if name not in MODULES:
        raise UsageError(f"{entry!r} is made by nothing here", hint=f"one of {', '.join(MODULES)}")
    options = dict(part.partition("=")[::2] for part in parts)
    options.pop("name", None)
    return import_module(f"dense.{MODULES[name]}"), {"maker": name, **options}


def file_of(folder: Path, entry: str, seed: int) -> Path:
    """Where the result of an entry goes. A checkpoint's is named by `name=`, not by its place on this machine."""
    named = dict(part.partition("=")[::2] for part in entry.split(":")[1:]).get("name")
    stem = (named or entry).replace(":", "-").replace("=", "-").replace("/", "-").replace(" ", "-")
    return folder / f"{stem}{f'-seed-{seed}' if seed else ''}.json"


def alike(arguments: argparse.Namespace) -> dict[str, object]:
    """What all results of one comparison have in common."""
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(arguments.model).glob("*"))
        if path.name == "config.json" or path.suffix == ".safetensors"
    }
    texts = {text.name: [Path(text.source).name, text.tokens] for text in arguments.text}
    return {
        "model": Path(arguments.model).name,
        "model_sha256": digests,
        "calibration": Path(arguments.calibration).name,
        "num_samples": arguments.num_samples,
        "seq_len": arguments.seq_len,
        "texts": texts,
    }


def job_of(arguments: argparse.Namespace, work: Path) -> Job:
    model = Path(arguments.model)
    cut = calibration_windows(
        load_tokenizer(model),
        read_mix(arguments.calibration, part="calibration"),
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        num_heldout=heldout_windows(arguments.seq_len),
        seed=arguments.seed,
    )
    return Job(model, arguments.calibration, cut, arguments.seed, work)


def times() -> dict[str, float]:
    """TIMES so far: of the clock, and of processors in this process and those that it waited for."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processors = sum(part.ru_utime + part.ru_stime for part in parts)
    return dict(zip(TIMES, (time.monotonic(), processors), strict=True))


def make(arguments: argparse.Namespace, entry: str, work: Path) -> None:
    """Make the dense weights of an entry in the folder `work`."""
    module, options = maker_of(entry)
    is_made_here = options["maker"] != CHECKPOINT
    told_times = {name: float(options.pop(name)) for name in TIMES if name in options and not is_made_here}
    if options["maker"] not in METHODS and is_made_here:
        options.pop("maker")
    job = job_of(arguments, work)
    started = times()
    points = save(work, module.make(job, options))
    nothing_left(options)
    spent = {name: now - before for (name, now), before in zip(times().items(), started.values(), strict=True)}
    told = {
        "entry": ":".join(part for part in entry.split(":") if part.partition("=")[0] not in ("folder", *TIMES)),
        "seed": arguments.seed,
        **(spent if is_made_here else dict.fromkeys(TIMES) | told_times),
        "peak_memory_bytes": peak_memory() if is_made_here else None,
        "versions": module.versions(),
        "machine": describe(torch.get_num_threads()),
        "calibration_sha256": job.cut.digest(),
        "points": points,
    }
    (work / "made.json").write_text(json.dumps(told, indent=1) + "\n")


def measure(arguments: argparse.Namespace, entry: str, work: Path) -> None:
    """Measure what `make` has made, each precision with its own head and with the original's."""
    told, points = load(work)
    judge = Judge(job_of(arguments, work), arguments.text, arguments.eval_len, work.parent)
    windows = {name: subject.digest for name, subject in judge.subjects.items()}
    so_far = work / f"measured-{hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]}.json"
    rows: list[dict[str, object]] = json.loads(so_far.read_text()) if so_far.exists() else []
    places = ((made, with_head) for made in points for with_head in ([True, False] if made.head else [False]))
    for number, (made, with_head) in enumerate(places):
        if number >= len(rows):
            row = {"bits": made.bits, "head_bits": made.head_bits if with_head else None, "bytes": made.bytes}
            row["head_bytes"] = made.head_bytes if with_head else judge.head_bytes
            row["bpw"] = 8 * made.bytes / judge.weights
            row["texts"] = judge.measure(made, with_head=with_head)
            rows.append(row)
            losses = ", ".join(f"{name} {found['kld']:.4f}" for name, found in row["texts"].items())
            print(f"{entry}, {made.bits} bits, {row['bytes'] / 1e6:.2f} MB: kld {losses}", flush=True)
            so_far.write_text(json.dumps(rows))
    result = {**alike(arguments), "eval_len": arguments.eval_len, "windows_sha256": windows, **told, "points": rows}
    file = file_of(Path(arguments.results), entry, arguments.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> int:
    """Make and measure the entries that the folder of results lacks, each in processes of its own."""
    wanted, failed = arguments.only or list(ENTRIES), []
    for entry in wanted:
        module, _ = maker_of(entry)
        reason, file = module.missing(), file_of(Path(arguments.results), entry, arguments.seed)
        if reason is not None:
            print(f"{entry} is left out: {reason}")
            continue
        if file.exists():
            show.check_alike(json.loads(file.read_text()), alike(arguments), file)
            continue
        work = Path(arguments.work) / file.stem
        for step in ("make", "measure"):
            if step == "make" and (work / "made.json").exists():
                continue
            if step == "make":
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            command = [sys.executable, __file__, *arguments.given, "--step", step, "--only", entry]
            if subprocess.run(command, check=False).returncode:
                print(f"{entry} failed")
                failed.append(entry)
                break
        else:
            if not arguments.keep:
                shutil.rmtree(work)
    return 1 if failed else 0


def text_of(given: str) -> Text:
    """NAME=SOURCE:TOKENS"""
    name, _, rest = given.partition("=")
    source, _, tokens = rest.rpartition(":")
    if not (name and source and tokens.isdigit()):
        raise argparse.ArgumentTypeError(f"{given!r} is not NAME=SOURCE:TOKENS")
    return Text(name, source, int(tokens))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="the original's folder; not needed for --table")
    parser.add_argument("--results", required=True, help="a folder: a JSON for each entry")
    parser.add_argument("--only", type=lambda text: text.split(","), help="entries, with commas between")
    parser.add_argument("--calibration")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--text", type=text_of, action="append", default=[], help="NAME=SOURCE:TOKENS, several times")
    parser.add_argument("--eval-len", type=int, default=512, help="tokens of a measured window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    work = Path(tempfile.gettempdir()) / "bitstrata-dense"
    parser.add_argument("--work", default=work, help="for dense weights, 0.4 GB a precision")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--picture", help="SVG or PNG file; needs matplotlib")
    parser.add_argument("--step", choices=("make", "measure"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.given = sys.argv[1:]
    torch.set_num_threads(arguments.threads)
    if arguments.table or arguments.picture:
        show.show(Path(arguments.results), arguments.table, arguments.picture)
        return 0
    if not (arguments.model and arguments.calibration and arguments.text):
        parser.error("MODEL, --calibration and --text are needed to measure")
    try:
        if arguments.step is None:
            return run(arguments)
        (entry,) = arguments.only
        work = Path(arguments.work) / file_of(Path(arguments.results), entry, arguments.seed).stem
        (make if arguments.step == "make" else measure)(arguments, entry, work)
    except BitstrataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
