"""Results as a table in markdown, and as a picture: KL divergence against bytes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from bitstrata.errors import UsageError

Result = dict[str, Any]
SAME = ("model", "model_sha256", "calibration", "num_samples", "seq_len", "texts")
PEAK = "peak_memory_bytes"
MARKS = "osD^vP*X<>"


def check_alike(result: Result, wanted: dict[str, Any], file: Path) -> None:
    """Raise UsageError if a result was measured on another model, or on other texts."""
    for key in SAME:
        if result[key] != json.loads(json.dumps(wanted[key])):
            raise UsageError(f"{file}: {key} was {result[key]}, is now {wanted[key]}", hint="give another folder")


def read(folder: Path) -> list[Result]:
    """All results of a folder, which must be of one comparison; more bits last."""
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if results:
            check_alike(result, results[0], file)
            if result["windows_sha256"] != results[0]["windows_sha256"]:
                raise UsageError(f"{file} was measured on other windows than the others here")
        results.append(result)
    if not results:
        raise UsageError(f"{folder} holds no results")
    return results


def over_seeds(results: list[Result]) -> list[Result]:
    """Those of one entry with several seeds as one: medians, and the highest peak. Raises UsageError for other bits."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["entry"], []).append(result)
    return [_median(group) if len(group) > 1 else group[0] for group in groups.values()]


def _median(group: list[Result]) -> Result:
    first = group[0]
    places = [[(point["bits"], point["head_bits"], point["bytes"]) for point in result["points"]] for result in group]
    if any(place != places[0] for place in places):
        raise UsageError(f"the results of {first['entry']} have not the same bits and bytes at all seeds")
    points = []
    for index, point in enumerate(first["points"]):
        texts = {
            name: {
                key: None if value is None else median(result["points"][index]["texts"][name][key] for result in group)
                for key, value in found.items()
            }
            for name, found in point["texts"].items()
        }
        points.append({**point, "texts": texts})
    known = {key: [result[key] for result in group if result[key] is not None] for key in ("cpu_seconds", PEAK)}
    times = median(known["cpu_seconds"]) if known["cpu_seconds"] else None
    return {**first, "points": points, "cpu_seconds": times, PEAK: max(known[PEAK], default=None)}


def label(result: Result) -> str:
    """The entry without its bits; of a checkpoint the name that it was given."""
    name, *parts = result["entry"].split(":")
    options = dict(part.partition("=")[::2] for part in parts)
    options.pop("bits", None)
    name = options.pop("name", name)
    return " ".join((name, *(f"{key} {value}" for key, value in options.items())))


def show(folder: Path, table: bool, picture: str | None) -> None:
    results = over_seeds(read(folder))
    if table:
        print("\n".join(markdown(results)))
    if picture:
        draw(results, picture)


def markdown(results: list[Result]) -> list[str]:
    """A row for each point, by bits and then by divergence on the first text."""
    texts = list(results[0]["texts"])
    first = texts[0]
    head = ["", "bits", "read", "with head", f"kld {first}", "99%", "99.9%", "top-1", "nll"]
    head += [f"kld {name}" for name in texts[1:]] + ["processor time", "peak"]
    rows = [(point, result) for result in results for point in result["points"]]
    rows.sort(key=lambda row: (row[0]["bits"], row[0]["texts"][first]["kld"]))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point, result in rows:
        found = point["texts"][first]
        suffix = "" if point["head_bits"] is None else f", head {point['head_bits']} bits"
        cells = [label(result) + suffix, f"{point['bits']:g}", f"{point['bytes'] / 1e6:.1f} MB"]
        cells += [f"{(point['bytes'] + point['head_bytes']) / 1e6:.1f} MB", _divergence(found["kld"])]
        cells += [f"{found['kld_p99']:.3g}", f"{found['kld_p999']:.3g}", f"{100 * found['top1_agreement']:.1f} %"]
        cells += [f"{found['nll'] - found['reference_nll']:+.3f}"]
        cells += [_divergence(point["texts"][name]["kld"]) for name in texts[1:]]
        cells += [_time(result["cpu_seconds"]), _memory(result[PEAK])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _divergence(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f} GB"


def draw(results: list[Result], path: str) -> None:
    """KL divergence on the first text against the bytes of the linears: a line a tool, solid where one file has all."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bitstrata", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    first = next(iter(results[0]["texts"]))
    lines: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for result in results:
        one_file = len({point["bits"] for point in result["points"]}) > 1
        for point in result["points"]:
            if point["head_bits"] is None and point["texts"][first]["kld"] > 0:
                name = label(result).partition(" type ")[0]  # a line for all types
                lines.setdefault((name, one_file), []).append((point["bytes"] / 1e6, point["texts"][first]["kld"]))
    for mark, ((name, one_file), points) in zip(MARKS * 3, sorted(lines.items()), strict=False):
        points.sort()
        axes.plot(
            *zip(*points, strict=True),
            marker=mark,
            linestyle="-" if one_file else "--",
            markerfacecolor=None if one_file else "white",
            linewidth=2 if one_file else 1.2,
            label=f"{name}, {'one file' if one_file else 'a file each'}",
        )
    axes.set(xlabel="MB of weights read for a token, without the head", yscale="log")
    axes.set_ylabel("KL divergence to the original (nats a token)")
    axes.set_title(f"{results[0]['model']} on {results[0]['texts'][first][0]}", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.endswith(".svg") else None)
