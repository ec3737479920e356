"""How much loss does each method add, at 2, 3 and 4 bits?

Quantizes a model with every recipe, evaluates the checkpoints on held-out text through
`bitstrata.evaluate`, and prints the increase of nll over the fp32 model, KL divergence and top-1
agreement at each bits. One run measures everything it compares. Results go to a JSON file with
machine, versions and settings.

    python benchmarks/quality.py MODEL --calibration TEXT --text TEXT [--recipes rtn,bcq,anybcq] [--seeds 0,1,2]

Recipes are in NAMED: methods by name, `-dedicated` for a file of its own at each bits, `planes` for AnyBCQ's planes
without training; with options of the method, for example `anybcq:steps=500:share_chain=true`. As their papers publish
them: gptq, bpdq, anybcq, anyprecision. Each recipe runs in a process of its own, so its peak memory is its own.
Compare at equal bytes: bits a weight read are in the table, and `--plot` draws the loss against bytes (extra `plots`).
`--include` adds what earlier runs with the same settings have found; `--recipes ""` draws those alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitstrata
from bitstrata.tables import render

BITS = (2, 3, 4)
# name -> (method, preset, one file for all bits, options)
NAMED = {
    "rtn": ("rtn", "default", True, {}),
    "rtn-dedicated": ("rtn", "default", False, {}),
    "bcq": ("bcq", "default", False, {}),
    "gptq": ("gptq", "default", False, {}),
    "gptq-act-order": ("gptq", "default", False, {"act_order": "true"}),
    "bpdq": ("bpdq", "default", False, {}),
    "planes": ("anybcq", "fast", True, {}),
    "anybcq": ("anybcq", "default", True, {}),
    "anybcq-best": ("anybcq", "best", True, {}),
    "anybcq-dedicated": ("anybcq", "default", False, {}),
    "anyprecision": ("anyprecision", "default", True, {}),
    "anyprecision-fast": ("anyprecision", "fast", True, {}),
    "nested-fast": ("nested", "fast", True, {}),
    "nested": ("nested", "default", True, {}),
    "nested-dedicated": ("nested", "default", False, {}),
    "nested-best": ("nested", "best", True, {}),
    "nested-best-dedicated": ("nested", "best", False, {}),
}


def recipe(text: str) -> tuple[str, str, bool, dict[str, str]]:
    """(method, preset, one file for all bits, options)."""
    name, *options = text.split(":")
    method, preset, nested, defaults = NAMED[name]
    return method, preset, nested, {**defaults, **dict(option.split("=", 1) for option in options)}


def measure(arguments: argparse.Namespace, text: str, seed: int) -> dict[str, object]:
    """Quantize by one recipe and evaluate every precision."""
    method, preset, nested, options = recipe(text)
    rows, seconds, peak, reference = [], 0.0, 0, None
    with tempfile.TemporaryDirectory() as workspace:
        for bits in [BITS] if nested else [(value,) for value in BITS]:
            folder = Path(workspace) / "-".join(map(str, bits))
            report = bitstrata.quantize(
                arguments.model,
                folder,
                bits=bits,
                method=method,
                preset=preset,
                options=options,
                group_size=arguments.group_size,
                calibration=arguments.calibration,
                num_samples=arguments.num_samples,
                seq_len=arguments.seq_len,
                seed=seed,
            )
            seconds += report.seconds
            peak = max(peak, report.peak_memory_bytes)
            evaluation = bitstrata.evaluate(
                folder,
                arguments.text,
                reference=arguments.model,
                seq_len=arguments.seq_len,
                max_tokens=arguments.max_tokens,
            )
            reference = evaluation.reference
            rows.extend(result.__dict__ for result in evaluation.results)
    return {"recipe": text, "seed": seed, "rows": rows, "seconds": seconds, "peak": peak, "reference": reference}


def alone(arguments: argparse.Namespace, text: str, seed: int) -> dict[str, object]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, arguments, text, seed).result()


def named_files(arguments: argparse.Namespace) -> dict[str, str]:
    """The names of the model and the texts, without the folders of this machine."""
    return {key: Path(getattr(arguments, key)).name for key in ("model", "calibration", "text")}


def included(file: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The runs of an earlier result, which must have been measured alike."""
    result = json.loads(Path(file).read_text())
    wanted = {key: getattr(arguments, key) for key in ("group_size", "num_samples", "seq_len", "max_tokens")}
    for key, value in (wanted | named_files(arguments)).items():
        if result["settings"][key] != value:
            raise SystemExit(f"{file}: {key} was {result['settings'][key]}, is now {value}")
    runs: list[dict[str, object]] = result["runs"]
    return runs


def plot(runs: list[dict[str, object]], title: str, path: str) -> None:
    """Loss against bytes read, a line a recipe: solid where one file holds all precisions, else dashed."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bitstrata", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for text in dict.fromkeys(run["recipe"] for run in runs):
        mine = [run for run in runs if run["recipe"] == text]
        one_file = recipe(text)[2]
        axes.plot(
            [row["bytes"] / 1e3 for row in mine[0]["rows"]],
            [max(statistics.median(increases(mine, index)), 1e-4) for index in range(len(BITS))],
            "o-" if one_file else "s--",
            markerfacecolor=None if one_file else "white",
            linewidth=2 if one_file else 1.2,
            label=f"{text.removesuffix('-dedicated')}, {'one file' if one_file else 'three files'}",
        )
    axes.set(xlabel="kB of weights read for a token", ylabel="loss above the original (nats a token)", yscale="log")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.endswith(".svg") else None)


def increases(runs: list[dict[str, object]], index: int) -> list[float]:
    """Of each run: nll over the reference's at BITS[index]."""
    return [run["rows"][index]["nll"] - run["reference"]["nll"] for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", default="rtn,bcq,planes,anybcq")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--include", nargs="*", default=[], help="JSON files of earlier runs with these settings")
    parser.add_argument("--plot", help="SVG or PNG file for a picture; needs matplotlib")
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()

    runs = [run for file in arguments.include for run in included(file, arguments)]
    for text in filter(None, arguments.recipes.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            started = time.monotonic()
            runs.append(alone(arguments, text, seed))
            increase = [f"{row['nll'] - runs[-1]['reference']['nll']:.4f}" for row in runs[-1]["rows"]]
            print(f"{text} seed {seed}: {' '.join(increase)} ({time.monotonic() - started:.0f} s)", flush=True)

    cells = []
    for text in dict.fromkeys(run["recipe"] for run in runs):
        mine = [run for run in runs if run["recipe"] == text]
        for index, bits in enumerate(BITS):
            rows = [run["rows"][index] for run in mine]
            added = increases(mine, index)
            cells.append(
                [
                    text,
                    str(bits),
                    f"{rows[0]['bpw_read']:.3f}",
                    f"{statistics.median(added):.4f}",
                    f"{statistics.median(r['kld'] for r in rows):.4f}",
                    f"{100 * statistics.median(r['top1_agreement'] for r in rows):.1f}%",
                    f"{statistics.median(run['seconds'] for run in mine):.0f}",
                    f"{max(run['peak'] for run in mine) / 1e6:.0f}",
                ]
            )
    columns = ["recipe", "bits", "bpw read", "nll increase", "kld", "top-1", "seconds", "peak MB"]
    title = f"{Path(arguments.model).name}, group size {arguments.group_size}, medians over seeds"
    print(render(title, columns, cells))
    if arguments.plot:
        plot(runs, title, arguments.plot)
    if arguments.output:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "plot", "include")}
        settings |= named_files(arguments)
        result = {"environment": bitstrata.env().to_json(), "settings": settings, "runs": runs}
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
