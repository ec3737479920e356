"""`bitstrata bench`: what it prints, and that nothing is printed when a kernel is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from control_groups import cgroups, group  # noqa: F401  (a fixture)

from bitstrata import memory
from bitstrata.kernels import Weight, registry

QUICK = ("--rounds", "1", "--device", "cpu")


def test_layers_of_given_shapes(cli):
    before = torch.get_num_threads()
    arguments = ("--shapes", "96x160,5x70", "--bits", "2,3", "--rows", "1,17", "--threads", "2", "--regime", "cache")
    outcome = cli("bench", *arguments, *QUICK, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert torch.get_num_threads() == before
    assert result["machine"]["threads"] == 2
    assert result["bandwidth"] > 1e8
    assert result["models"] == []
    found = {(r["out_features"], r["in_features"], r["rows"], r["name"]) for r in result["linear"]}
    names = ("2 bits", "3 bits", "bf16", "fp32")
    assert found == {(*shape, rows, name) for shape in ((96, 160), (5, 70)) for rows in (1, 17) for name in names}
    for row in result["linear"]:
        assert row["time"] > 0
        assert row["floor"] == pytest.approx(row["bytes"] / result["bandwidth"])
        assert row["share"] is None  # from cache, memory is no bound
        if row["bits"] is None:
            assert row[f"ratio_{row['name']}"] == 1
            assert row["bytes"] == row["out_features"] * row["in_features"] * (2 if row["name"] == "bf16" else 4)
        else:
            words, groups = -(-row["in_features"] // 32), -(-row["in_features"] // 128)
            numbers = row["out_features"] * groups * (row["bits"] + 1)
            assert row["bytes"] == 4 * row["bits"] * row["out_features"] * words + 2 * numbers
            assert 0 < row["error"] < 0.03


def test_the_tables_of_a_checkpoint(cli, quantized):
    outcome = cli("bench", quantized, "--rows", "1", *QUICK)
    assert outcome.code == 0, outcome.err
    kernel = registry.select("cpu", torch.bfloat16).name
    for part in (
        f"kernel {kernel}",
        "memory streams",
        "floor ms",
        "x bf16",
        "tok/s",
        "switch us",
        "4 bits",
        "random weights",
    ):
        assert part in outcome.out, part
    assert "too small to be read from memory" in outcome.out
    only = cli("bench", f"{quantized}:3", "--rows", "1", "--regime", "cache", *QUICK, "--json")
    result = json.loads(only.out)
    assert {row["bits"] for row in result["linear"]} == {3, None}
    assert [row["bits"] for row in result["models"]] == [3, None]
    assert all(row["tokens_per_second"] > 0 and row["share"] > 0 for row in result["models"])
    assert 0 < result["models"][0]["bytes"] < result["models"][1]["bytes"]


def test_nothing_is_timed_when_a_kernel_is_wrong(cli, monkeypatch):
    """A scale that is off by three percent is enough."""
    real = Weight.linear
    monkeypatch.setattr(Weight, "linear", lambda self, x, bits: real(self, x, bits) * (1.03 if bits == 3 else 1))
    outcome = cli("bench", "--shapes", "96x160", "--bits", "2,3", *QUICK)
    outcome.refused(5, "is wrong at 3 bits, 1 rows, [96, 160]", "nothing is reported")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_result_that_is_no_number_is_wrong(cli, monkeypatch, bad):
    real = Weight.linear
    monkeypatch.setattr(Weight, "linear", lambda self, x, bits: real(self, x, bits) * bad)
    cli("bench", "--shapes", "40x64", "--rows", "17", *QUICK).refused(5, "is wrong at 2 bits, 17 rows")


REFUSED = {
    "model and shapes": (("out", "--shapes", "4x4"), ["either a model or --shapes"]),
    "no such model": (("no-such-folder",), ["no-such-folder"]),
    "shape without x": (("--shapes", "4096"), ["shapes '4096' cannot be used", "llama-3.2-1b"]),
    "shape of zero": (("--shapes", "0x64"), ["shapes '0x64' cannot be used"]),
    "three dimensions": (("--shapes", "4x4x4"), ["cannot be used"]),
    "unknown name": (("--shapes", "llama-9-900b"), ["shapes 'llama-9-900b'", "llama-3.1-8b"]),
    "whole of bare shapes": (("--shapes", "64x64", "--whole"), ["--whole needs a known model's name"]),
    "whole of nothing": (("--whole",), ["--whole needs a known model's name"]),
    "head without whole": (("--head-bits", "6"), ["describe a whole model", "--whole"]),
    "blocks without whole": (("--shapes", "llama-3.2-1b", "--blocks", "1"), ["describe a whole model"]),
    "head of nine bits": (("--shapes", "llama-3.2-1b", "--whole", "--head-bits", "9"), ["head bits must be in 1..8"]),
    "no blocks": (("--shapes", "llama-3.2-1b", "--whole", "--blocks", "0"), ["blocks must be at least 1"]),
    "no rows": (("--shapes", "64x64", "--rows", "0"), ["rows '0' cannot be used"]),
    "rows of words": (("--shapes", "64x64", "--rows", "many"), ["rows 'many' cannot be used"]),
    "no threads": (("--threads", "0"), ["threads must be at least 1, got 0"]),
    "no rounds": (("--rounds", "0"), ["rounds must be at least 1, got 0"]),
    "unknown regime": (("--regime", "disk"), ["unknown regime disk"]),
    "nine bits": (("--shapes", "64x64", "--bits", "9"), ["9"]),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(cli, arguments, said):
    outcome = cli("bench", *arguments)
    outcome.refused(outcome.code, *said)
    assert outcome.code in (2, 3)


def test_bits_that_the_checkpoint_lacks(cli, quantized):
    outcome = cli("bench", quantized, "--bits", "7")
    outcome.refused(outcome.code, "7")


def test_a_model_larger_than_memory_says_how_deep_it_may_be(cli, monkeypatch):
    class Little:
        available = 5e9

    monkeypatch.setattr("psutil.virtual_memory", Little)
    outcome = cli("bench", "--shapes", "llama-3.1-8b", "--whole", "--device", "cpu")
    outcome.refused(outcome.code, "5.0 GB are free", "--blocks")


def test_a_containers_limit_is_what_is_free(cli, cgroups):  # noqa: F811
    group(cgroups("0::/box") / "box", memory._V2, limit=9 * 10**9, used=7 * 10**9)
    outcome = cli("bench", "--shapes", "llama-3.1-8b", "--whole", "--device", "cpu")
    outcome.refused(4, "2.0 GB are free", "--blocks")
