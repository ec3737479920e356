"""Which allocator gives the least loss for the bytes? All of them at the same budgets, beside uniform and random plans.

Measures what each layer costs on calibration text, solves for every budget with every allocator, and measures
the plans on held-out text: KL divergence to the original, nats a token. Budgets lie between the smallest and
the largest uniform precision, in equal ratios; uniform sizes are budgets too.

    python benchmarks/plans.py OUT MODEL --text CALIBRATION --heldout TEXT [--seeds 0,1] [--json FILE] [--plot FILE]

    line            between the neighbouring uniform plans, at the same bytes
    milp, waterfill sums of single layers' costs, no search
    greedy, paired  with layers' interactions, then refined on the true loss of calibration windows
    paired*         not refined; pages: the prefix of the one universal order
    random          the best of several

For each allocator the last table says whether its losses fall with bytes, lie below the line, are at uniform
sizes no worse than uniform, and beat every random plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.allocation import (
    SENSITIVITY_FILE,
    SOLVERS,
    MeasurementSettings,
    Objective,
    Problem,
    measure_sensitivity,
    page_order,
    random_allocation,
)
from bitstrata.benchmark.machine import describe
from bitstrata.calibration import calibration_windows, read_text, text_digest
from bitstrata.checkpoint import CheckpointReader
from bitstrata.models import load_tokenizer
from bitstrata.plans import ModelSizes, Plan
from bitstrata.tables import render

RANDOM = 5
SOLVER_ORDER = ("waterfill", "milp", "greedy", "pages", "paired*", "paired")


def measure(arguments: argparse.Namespace, seed: int) -> dict[str, object]:
    """Every allocator at every budget, layers measured on the windows of `seed`."""
    reader = CheckpointReader(arguments.checkpoint)
    sizes = ModelSizes.of(reader)
    model = bitstrata.load(arguments.checkpoint, device="cpu", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(arguments.checkpoint)

    def windows(text: str, count: int, number: int) -> torch.Tensor:
        documents = read_text(text)
        settings = {"num_samples": count, "seq_len": arguments.seq_len, "num_heldout": 1, "seed": number}
        return calibration_windows(tokenizer, documents, **settings).calibration

    calibration = windows(arguments.text, arguments.windows, seed)
    objective = Objective(model, calibration, reference)
    heldout = Objective(model, windows(arguments.heldout, arguments.heldout_windows, 0), reference)
    settings = MeasurementSettings(
        measure=arguments.measure,
        text=Path(arguments.text).name,
        text_sha256=text_digest(read_text(arguments.text)),
        reference=Path(arguments.model).name,
        windows=arguments.windows,
        seq_len=arguments.seq_len,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = Path(folder) / SENSITIVITY_FILE
        found = measure_sensitivity(objective, reader, settings, path, calibration)
        seconds = {"measuring": time.perf_counter() - started}

    uniform = {bits: Plan.uniform(reader.spec, bits) for bits in reader.spec.bits}
    uniform_bytes = {bits: sizes.of_plan(plan).weights for bits, plan in uniform.items()}
    uniform_loss = {bits: heldout.loss(plan) for bits, plan in uniform.items()}
    ends = uniform_bytes[min(uniform)], uniform_bytes[max(uniform)]
    between = [int(limit) for limit in np.geomspace(*ends, arguments.budgets + 2)[1:-1]]
    evaluations = dict.fromkeys(SOLVER_ORDER, 0)
    order = page_order(Problem.build(found, sizes, ends[1]), found, reader)
    rows = []
    for limit in sorted({*between, *list(uniform_bytes.values())[1:-1]}):
        tried: list[float] = []

        def true_loss(plan: dict[str, int], tried: list[float] = tried) -> float:
            tried.append(objective.loss(plan))
            return tried[-1]

        problem = Problem.build(found, sizes, limit, true_loss=true_loss)
        unrefined = Problem.build(found, sizes, limit)
        losses, predicted = {}, {}
        for name in SOLVER_ORDER:
            tried.clear()
            started = time.perf_counter()
            if name == "pages":
                plan = dict(order.plan_for(sizes, f"{limit + sizes.fixed}B"))
            else:
                solver = SOLVERS[name.rstrip("*")]
                plan = problem.plan(solver(unrefined if name.endswith("*") else problem))
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            evaluations[name] += len(tried)
            losses[name], predicted[name] = heldout.loss(plan), found.predict(plan)
            assert sizes.of_plan(plan).weights <= limit, name
        random = [heldout.loss(problem.plan(random_allocation(problem, number))) for number in range(RANDOM)]
        line = float(np.interp(limit, list(uniform_bytes.values()), list(uniform_loss.values())))
        row = {
            "bytes": limit,
            "bpw": 8 * (limit + sizes.fixed_read) / sizes.weight_count,
            "uniform": next((bits for bits, size in uniform_bytes.items() if size == limit), None),
            "line": line,
            "losses": losses,
            "predicted": predicted,
            "random": random,
        }
        rows.append(row)
        shown = "  ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
        print(f"seed {seed}  {row['bpw']:.3f}bpw  line {line:.5f}  {shown}  random {min(random):.5f}", flush=True)
    return {
        "seed": seed,
        "uniform": [
            {"bits": bits, "bytes": uniform_bytes[bits], "loss": uniform_loss[bits]} for bits in uniform
        ],
        "rows": rows,
        "seconds": seconds,
        "evaluations": evaluations,
    }  # fmt: skip


def checks(run: dict, name: str) -> dict[str, object]:
    """The budgets at which an allocator does not do what it must, each with the loss and what it should be below."""
    first, last = run["uniform"][0], run["uniform"][-1]
    rows = run["rows"]
    losses = [first["loss"], *(row["losses"][name] for row in rows), last["loss"]]
    steps = zip([first["loss"], *losses[1:-1]], losses[1:], strict=True)
    exact = {row["bits"]: row["loss"] for row in run["uniform"]}
    return {
        "rises": [[before, after] for before, after in steps if after > before],
        "above the line": [[r["bytes"], r["losses"][name], r["line"]] for r in rows if r["losses"][name] > r["line"]],
        "worse than uniform": [
            [r["bytes"], r["losses"][name], exact[r["uniform"]]]
            for r in rows
            if r["uniform"] is not None and r["losses"][name] > exact[r["uniform"]]
        ],
        "worse than random": [
            [r["bytes"], r["losses"][name], min(r["random"])] for r in rows if r["losses"][name] >= min(r["random"])
        ],
        "mean ratio to the line": statistics.geometric_mean([r["losses"][name] / r["line"] for r in rows]),
    }


def draw(runs: list[dict], path: Path) -> None:
    """Loss against bytes, one line an allocator, the first seed's run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5))
    axes, run = figure.subplots(), runs[0]
    x, y = [u["bytes"] / 1e6 for u in run["uniform"]], [u["loss"] for u in run["uniform"]]
    axes.step(x, y, where="post", color="0.7", linewidth=1)
    axes.plot(x, y, "s", color="0.3", label="uniform")
    at = [row["bytes"] / 1e6 for row in run["rows"]]
    for name in ("paired", "pages", "milp", "waterfill"):
        axes.plot(at, [row["losses"][name] for row in run["rows"]], ".-", linewidth=1, label=name)
    axes.plot(at, [statistics.median(row["random"]) for row in run["rows"]], "x", color="0.6", label="random (median)")
    axes.set_yscale("log")
    axes.set_xlabel("MB, planned layers")
    axes.set_ylabel("KL divergence to the original, held-out text, nats a token")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--heldout-windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--measure", choices=("kld", "hessian"), default="kld")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    runs = [measure(arguments, int(seed)) for seed in arguments.seeds.split(",")]
    for run in runs:
        rows = [
            [f"{row['bpw']:.3f}", str(row["bytes"]), str(row["uniform"] or ""), f"{row['line']:.5f}",
             *(f"{row['losses'][name]:.5f}" for name in SOLVER_ORDER), f"{min(row['random']):.5f}"]
            for row in run["rows"]
        ]  # fmt: skip
        title = f"{arguments.checkpoint.name}, seed {run['seed']}: held-out KL divergence, nats a token"
        print("\n" + render(title, ["bpw", "bytes", "uniform", "line", *SOLVER_ORDER, "random"], rows))
        run["checks"] = {name: checks(run, name) for name in SOLVER_ORDER}
        summary = [
            [name, *(str(len(found[key])) for key in list(found)[:4]), f"{found['mean ratio to the line']:.3f}",
             f"{run['seconds'][name]:.1f}", str(run["evaluations"][name])]
            for name, found in run["checks"].items()
        ]  # fmt: skip
        columns = [
            "allocator",
            "rises",
            "above line",
            "worse than uniform",
            "than random",
            "of line",
            "s",
            "evaluations",
        ]
        print("\n" + render(f"of {len(run['rows'])} budgets", columns, summary))
    spec = CheckpointReader(arguments.checkpoint).spec
    result = {
        "machine": describe(torch.get_num_threads()),
        "quantization": {"method": spec.method, "bits": spec.bits, "group_size": spec.group_size},
        "model": arguments.model.name,
        "settings": {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "plot", "model")}
        | {"checkpoint": arguments.checkpoint.name, "text": Path(arguments.text).name}
        | {"heldout": Path(arguments.heldout).name},
        "runs": runs,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot is not None:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
