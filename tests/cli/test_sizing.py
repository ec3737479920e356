"""`--budget` and `--fit`, and plans, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_outcome import Command
from page_orders import write_order

from bitstrata.checkpoint import CheckpointReader
from bitstrata.plans import ModelSizes, Plan, fit, load


@pytest.fixture(scope="module")
def ordered(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint at 2, 3 and 4 bits with a page order."""
    folder = shutil.copytree(quantized, tmp_path_factory.mktemp("ordered") / "out")
    write_order(folder)
    return folder


def totals(folder: Path) -> tuple[int, int]:
    sizes = ModelSizes.of(CheckpointReader(folder))
    return sizes.of_plan(sizes.smallest).total, sizes.of_plan(sizes.largest).total


def generated(cli: Command, *arguments: object) -> dict[str, object]:
    done = cli("generate", *arguments, "the ", "--max-new-tokens", 6, "--json")
    assert done.code == 0, done.err
    result: dict[str, object] = json.loads(done.out)
    return result


def test_the_ends_of_the_budgets_are_the_lowest_and_the_highest_bits(ordered: Path, cli: Command) -> None:
    low, high = totals(ordered)
    for budget, bits in ((low, 2), (high, 4)):
        assert generated(cli, ordered, "--budget", f"{budget}B")["text"] == generated(cli, f"{ordered}:{bits}")["text"]


def test_a_budget_below_the_smallest(ordered: Path, cli: Command) -> None:
    low, _ = totals(ordered)
    cli("generate", ordered, "x", "--budget", f"{low - 1}B").refused(2, "smallest", str(low))


def test_a_budget_above_everything_is_a_note(ordered: Path, cli: Command) -> None:
    done = cli("generate", ordered, "x", "--budget", "5GB", "--max-new-tokens", 1)
    assert done.code == 0
    assert "above the whole model" in done.err


def test_a_budget_without_a_page_order(quantized: Path, cli: Command) -> None:
    low, high = totals(quantized)
    command = f"bitstrata plan {quantized} --budget {(high - 1) / 1e6:.12g}MB --text FILE --pages"
    cli("generate", quantized, "x", "--budget", f"{high - 1}B").refused(3, "bitstrata_pages.json", command)
    sizes = ModelSizes.of(CheckpointReader(quantized))
    bpw = sizes.of_plan(sizes.largest).bpw
    cli("generate", quantized, "x", "--budget", f"{bpw - 0.01}bpw").refused(3, f"--budget {bpw - 0.01:.12g}bpw")
    for budget, bits in ((low, 2), (high, 4), (10**9, 4)):  # these need none
        expected = generated(cli, f"{quantized}:{bits}")["text"]
        assert generated(cli, quantized, "--budget", f"{budget}B")["text"] == expected
    assert generated(cli, quantized, "--fit")["bits"] == "fit"


def test_fit_takes_what_there_is(ordered: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generated(cli, ordered, "--fit")["text"] == generated(cli, f"{ordered}:4")["text"]
    monkeypatch.setattr(fit, "free_memory", lambda device: 1000)
    cli("generate", ordered, "x", "--fit").refused(4, "smallest", "reserve")


@pytest.mark.parametrize(
    "flags", [("--budget", "5GB", "--fit"), ("--bits", 3, "--fit"), ("--bits", 3, "--budget", "5GB")]
)
def test_only_one_way_of_saying_how_much(flags: tuple[object, ...], ordered: Path, cli: Command) -> None:
    cli("generate", ordered, "x", *flags).refused(2, "how much of the model")
    cli("generate", f"{ordered}:3", "x", *flags[-1:] if flags[-1] == "--fit" else flags[-2:]).refused(2, "how much")


def test_drafts_need_all_planes(ordered: Path, cli: Command) -> None:
    done = cli("generate", ordered, "x", "--budget", "5GB", "--draft-bits", 2)
    done.refused(2, "only the pages of its plan", "leave draft_bits out")


def test_of_a_plan_only_its_pages_are_read(ordered: Path, tmp_path: Path, cli: Command) -> None:
    sizes = ModelSizes.of(CheckpointReader(ordered))
    first, *_ = sizes.layers
    plan = Plan({**sizes.smallest, first: 3})
    plan.save(tmp_path / "mixed.json")
    for name in ("model-plane-3", "model-bits-4"):  # nothing of these is in the plan
        assert (ordered / f"{name}.safetensors").is_file()
    partial = shutil.copytree(ordered, tmp_path / "partial")
    for name in ("model-plane-3", "model-bits-4"):
        (partial / f"{name}.safetensors").unlink()
    result = generated(cli, partial, "--bits", tmp_path / "mixed.json")
    assert result["bits"] == "mixed"
    assert load(partial, plan=plan).resize(plan).layers == 0
