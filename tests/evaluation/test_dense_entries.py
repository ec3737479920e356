"""benchmarks/real.py: dense weights in the original model are measured as `evaluate` measures the checkpoint."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bitstrata
from bitstrata.errors import CheckError, PreflightError, UsageError

SCRIPTS = str(Path(__file__).parents[2] / "benchmarks")
SEQ_LEN = 24


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    sys.path.insert(0, SCRIPTS)
    try:
        import real

        yield real
    finally:
        sys.path.remove(SCRIPTS)


@pytest.fixture
def arguments(real: ModuleType, model: Path, text: Path, tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model=str(model),
        calibration=str(text),
        num_samples=4,
        seq_len=16,
        eval_len=SEQ_LEN,
        seed=0,
        text=[real.Text("words", str(text), 60)],
        results=str(tmp_path / "results"),
    )


def measured(real: ModuleType, arguments: argparse.Namespace, entry: str, work: Path) -> dict[str, Any]:
    work.mkdir()
    real.make(arguments, entry, work)
    real.measure(arguments, entry, work)
    result: dict[str, Any] = json.loads(real.file_of(Path(arguments.results), entry, arguments.seed).read_text())
    return result


@pytest.mark.parametrize("head", [None, 6])
def test_an_entry_is_measured_as_its_checkpoint(
    real: ModuleType, arguments: argparse.Namespace, tmp_path: Path, head: int | None
) -> None:
    entry = "rtn:bits=2-3:group_size=32" + ("" if head is None else f":head_bits={head}")
    found = measured(real, arguments, entry, tmp_path / "work")
    (text,) = arguments.text
    checkpoint = tmp_path / "work" / "checkpoint"
    expected = bitstrata.evaluate(
        checkpoint, text.source, reference=arguments.model, seq_len=SEQ_LEN, max_tokens=text.tokens, arithmetic="exact"
    )
    assert expected.reference is not None
    points = [point for point in found["points"] if point["head_bits"] == head]
    assert len(found["points"]) == len(points) * (1 if head is None else 2)  # with its head, and with the original's
    for point, row in zip(points, expected.results, strict=True):
        mine = point["texts"]["words"]
        assert point["bits"] == row.bits
        assert point["bytes"] + (0 if head is None else point["head_bytes"]) == row.bytes
        assert mine["tokens"] == expected.tokens
        assert mine["nll"] == pytest.approx(row.nll, abs=1e-5)
        assert mine["kld"] == pytest.approx(row.kld, rel=1e-3, abs=1e-6)
        assert mine["reference_nll"] == pytest.approx(expected.reference["nll"], abs=1e-5)
        assert row.spread is not None
        assert mine["kld_p99"] == pytest.approx(row.spread.kld_p99, rel=1e-3)


def test_what_an_entry_changes_is_gone_at_the_next(
    real: ModuleType, arguments: argparse.Namespace, tmp_path: Path
) -> None:
    from dense.made import Made
    from dense.measure import Judge

    job = real.job_of(arguments, tmp_path)
    judge = Judge(job, arguments.text, SEQ_LEN, tmp_path)
    own = {name: value.detach().clone() for name, value in judge.model.named_parameters(remove_duplicate=False)}
    linears = {name: own[name] for name in judge.names}
    head = {"lm_head.weight": torch.zeros_like(own["lm_head.weight"])}
    bad = Made(1, {name: -value for name, value in linears.items()}, 1, head, 1, 1)
    assert judge.measure(bad, with_head=False)["words"]["kld"] > 1e-3
    vocabulary = len(own["lm_head.weight"])
    assert judge.measure(bad, with_head=True)["words"]["nll"] == pytest.approx(math.log(vocabulary), rel=1e-5)
    assert judge.measure(Made(16, linears, 1), with_head=False)["words"]["kld"] == 0.0
    lacking = dict(list(linears.items())[1:])
    with pytest.raises(CheckError, match="not those of the blocks"):
        judge.measure(Made(16, lacking, 1), with_head=False)


def test_results_of_other_texts_are_refused(real: ModuleType, arguments: argparse.Namespace, tmp_path: Path) -> None:
    found = measured(real, arguments, "original", tmp_path / "work")
    assert found["points"][0]["texts"]["words"]["kld"] == 0.0
    real.show.check_alike(found, real.alike(arguments), Path("result.json"))
    arguments.text = [real.Text("words", arguments.text[0].source, 61)]
    with pytest.raises(UsageError, match="texts was"):
        real.show.check_alike(found, real.alike(arguments), Path("result.json"))


def test_a_table_has_a_row_for_each_point(real: ModuleType, arguments: argparse.Namespace, tmp_path: Path) -> None:
    for number, entry in enumerate(("original", "rtn:bits=2-3:group_size=32")):
        measured(real, arguments, entry, tmp_path / f"work{number}")
    lines = real.show.markdown(real.show.read(Path(arguments.results)))
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" rtn group_size 32 ", " 2 "],
        [" rtn group_size 32 ", " 3 "],
        [" original ", " 16 "],
    ]


def test_seeds_become_their_medians(real: ModuleType, arguments: argparse.Namespace, tmp_path: Path) -> None:
    found = measured(real, arguments, "original", tmp_path / "work")
    seeds = [copy.deepcopy(found) for _ in range(3)]
    for result, kld, seconds, peak in zip(seeds, (0.3, 0.1, 0.7), (5.0, None, 9.0), (3, 8, None), strict=True):
        result["points"][0]["texts"]["words"]["kld"] = kld
        result |= {"cpu_seconds": seconds, "peak_memory_bytes": peak}
    other = {**copy.deepcopy(found), "entry": "other"}
    one, same = real.show.over_seeds([*seeds, other])
    assert one["points"][0]["texts"]["words"]["kld"] == 0.3
    assert (one["cpu_seconds"], one["peak_memory_bytes"]) == (7.0, 8)
    assert same == other
    seeds[1]["points"][0]["bytes"] += 1
    with pytest.raises(UsageError, match="same bits and bytes"):
        real.show.over_seeds(seeds)


@pytest.mark.parametrize("entry", ["nothing:bits=2", "original:bits=2", "rtn:no_such=1"])
def test_unknown_makers_and_options_are_refused(
    real: ModuleType, arguments: argparse.Namespace, tmp_path: Path, entry: str
) -> None:
    with pytest.raises((UsageError, PreflightError), match=r"nothing|no_such|bits"):
        real.make(arguments, entry, tmp_path)


def test_importance_is_the_mean_square_of_inputs(
    real: ModuleType, arguments: argparse.Namespace, tmp_path: Path
) -> None:
    from dense.llama_types import importance_of

    job = real.job_of(arguments, tmp_path)
    found, model = importance_of(job), job.loaded()
    with torch.no_grad():
        states = model(job.windows, output_hidden_states=True).hidden_states  # all windows at once, no hooks
        inputs = [model.model.layers[index].input_layernorm(states[index]).double() for index in range(2)]
    for index, value in enumerate(inputs):
        expected = value.square().mean((0, 1))
        for name in ("q_proj", "k_proj", "v_proj"):
            mine = torch.from_numpy(found[f"model.layers.{index}.self_attn.{name}"]).double()
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)
    assert len(found) == 14
