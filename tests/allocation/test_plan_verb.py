"""`bitstrata.plan` from a checkpoint to a plan's file, and plans wherever bits are."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from job_helpers import BCQ
from job_helpers import run as quantize
from tiny_models import tiny_llama

import bitstrata
from bitstrata.allocation import SENSITIVITY_FILE, SOLVERS
from bitstrata.allocation.report import pattern
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import PlanError, UsageError
from bitstrata.nn import use_bits
from bitstrata.plans import PAGES_FILE, ModelSizes, PageOrder, Plan

SMALL = {"windows": 4, "seq_len": 32, "device": "cpu"}


def test_a_plan_is_measured_compared_and_written(known, original, text, tmp_path):
    report = bitstrata.plan(known, "4.6bpw", "paired", text, original, output=tmp_path / "p.json", pages=True, **SMALL)
    reader = CheckpointReader(known)
    sizes = ModelSizes.of(reader)
    assert report.size == sizes.of_plan(report.plan)
    assert report.size.bpw <= 4.6
    assert [row.name for row in report.rows] == ["this plan", "uniform 2", "uniform 3", "random"]
    assert all(row.measured is not None and row.predicted is not None for row in report.rows)
    # the measured loss is the divergence on windows that the layers were not measured on
    saved = Plan.load(tmp_path / "p.json")
    saved.check(reader)
    assert saved == report.plan
    assert saved.provenance["measured"] == report.rows[0].measured
    assert saved.provenance["bytes"] == report.size.total
    order = PageOrder.load(known / PAGES_FILE)
    order.check(reader, sizes)
    assert order.plan_for(sizes, f"{report.size.total}B").keys() == saved.keys()
    shown = str(report)
    assert "held-out tokens" in shown
    assert "self_attn.q_proj" in shown
    assert json.loads(json.dumps(report.to_json()))["bits"] == dict(saved)


@pytest.mark.parametrize("solver", SOLVERS)
def test_once_measured_no_text_is_needed(known, solver):
    report = bitstrata.plan(known, "4.5bpw", solver)
    assert report.size.bpw <= 4.5
    assert report.rows[0].measured is None
    assert report.heldout_tokens == 0
    uniform, random = report.rows[1], report.rows[-1]
    assert report.rows[0].predicted < random.predicted
    assert report.rows[0].predicted < uniform.predicted


def test_a_budget_in_bytes_is_kept(known):
    sizes = ModelSizes.of(CheckpointReader(known))
    low, high = (sizes.of_plan(plan).total for plan in (sizes.smallest, sizes.largest))
    before = None
    for total in (low, (low + high) // 2, high):
        report = bitstrata.plan(known, f"{total}B")
        assert report.size.total <= total
        assert before is None or report.rows[0].predicted <= before
        before = report.rows[0].predicted
    assert report.plan == sizes.largest


def test_above_everything_says_so_and_gives_everything(known):
    report = bitstrata.plan(known, "1GB")
    assert report.plan == ModelSizes.of(CheckpointReader(known)).largest
    assert any("above the whole model" in note for note in report.notes)
    exactly = f"{report.size.total}B"
    assert not bitstrata.plan(known, exactly).notes


def test_below_the_smallest_is_refused_before_anything_is_measured(checkpoint, text):
    with pytest.raises(UsageError, match="below the smallest"):
        bitstrata.plan(checkpoint, "3.2bpw", text=text)
    assert not (checkpoint / SENSITIVITY_FILE).exists()


def test_without_measurements_a_text_is_asked_for(checkpoint):
    with pytest.raises(UsageError, match="not been measured") as caught:
        bitstrata.plan(checkpoint, "4bpw")
    assert "--text" in caught.value.hint


def test_measurements_of_another_model_or_text_are_refused(known, text, original, tmp_path):
    other = tmp_path / "other"
    quantize(tiny_llama(tmp_path / "llama", seed=1), other, None, **BCQ)
    with pytest.raises(PlanError, match="other weights"):
        bitstrata.plan(other, "4bpw", sensitivity=known / SENSITIVITY_FILE)
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text() + "\nmore of it")
    with pytest.raises(PlanError, match="another text"):
        bitstrata.plan(known, "4bpw", text=changed, reference=original, **SMALL)
    with pytest.raises(PlanError, match="another reference: llama"):
        bitstrata.plan(known, "4bpw", text=text, **SMALL)


def test_measurements_on_windows_that_begin_otherwise_are_refused(known, text, original, tmp_path):
    """The tokenizer still defines BOS, and no longer adds it."""
    bitstrata.plan(known, "4bpw", text=text, reference=original, **SMALL)
    content = json.loads((known / "tokenizer.json").read_text())
    content["post_processor"] = None
    (known / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="another way to cut the text into windows: their tokens differ"):
        bitstrata.plan(known, "4bpw", text=text, reference=original, **SMALL)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the extra `plots` is not installed")
def test_a_picture_is_drawn(known, tmp_path):
    bitstrata.plan(known, "4bpw", plot=tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    bounded = bitstrata.plan(known, "4.5bpw", plot=tmp_path / "bounded.svg", max_bits={"*": 3})
    assert max(bounded.plan.values()) == 3
    with pytest.raises(UsageError, match="cannot draw"):
        bitstrata.plan(known, "4bpw", plot=tmp_path / "p.nothing")


@pytest.mark.parametrize("bounds", [{"min_bits": {"*.down_proj": 3}}, {"max_bits": {"*": 3}}])
@pytest.mark.parametrize("together", [False, True])
def test_the_order_of_pages_knows_no_bounds(known, bounds, together):
    free, bounded = (
        bitstrata.plan(known, "4.5bpw", "milp", pages=True, together=together, **given) and (known / PAGES_FILE)
        for given in ({}, bounds)
    )
    before = free.read_bytes()
    reader = CheckpointReader(known)
    PageOrder.load(bounded).check(reader, ModelSizes.of(reader))
    assert bounded.read_bytes() == before
    assert bitstrata.load(known, budget="4.5bpw", device="cpu") is not None


def test_an_order_that_leads_nowhere_is_not_written(known, monkeypatch):
    bitstrata.plan(known, "4.5bpw", "milp", pages=True)
    before = (known / PAGES_FILE).read_bytes()
    monkeypatch.setattr("bitstrata.allocation.order._stones", lambda problem: [problem.lowest])
    with pytest.raises(PlanError, match="largest plan"):
        bitstrata.plan(known, "1GB", "milp", pages=True)
    assert (known / PAGES_FILE).read_bytes() == before


@pytest.mark.parametrize("which", ["output", "plot", "sensitivity"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_measured(checkpoint, text, tmp_path, which):
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        bitstrata.plan(checkpoint, "4bpw", text=text, **SMALL, **{which: tmp_path / "folder.svg"})
    assert not (checkpoint / SENSITIVITY_FILE).exists()


@pytest.mark.parametrize(
    "given", [{"reference": "model"}, {"windows": 4}, {"windows": 16}, {"seq_len": 32}, {"measure": "kld"}]
)
def test_ways_of_measuring_need_a_text(known, given):
    with pytest.raises(UsageError, match=f"{next(iter(given))} would change nothing"):
        bitstrata.plan(known, "4bpw", **given)


def test_the_seed_draws_the_random_plan_even_without_a_text(known):
    random = {bitstrata.plan(known, "4.5bpw", "milp", seed=seed).rows[-1].predicted for seed in range(4)}
    assert len(random) > 1


def test_plans_go_where_bits_go(known, original, text, tmp_path):
    made = bitstrata.plan(known, "4.5bpw", output=tmp_path / "p.json").plan
    model = bitstrata.load(known, bits=made, device="cpu")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model(ids, bits=dict(made)).logits
        assert torch.equal(model(ids).logits, expected)  # what it was loaded at
        assert torch.equal(model(ids, bits=made).logits, expected)
        with use_bits(model, made):
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids, bits=3).logits, expected)
    result = bitstrata.evaluate(known, text, bits=f"3,{tmp_path / 'p.json'}", reference=original, device="cpu")
    assert [row.bits for row in result.results] == [3, "p"]
    sizes = ModelSizes.of(CheckpointReader(known))
    assert result.results[1].bytes == sizes.of_plan(made).weights
    assert result.results[1].bpw_read == pytest.approx(sizes.of_plan(made).bpw)
    uniform = bitstrata.evaluate(known, text, bits=[3, Plan.uniform(CheckpointReader(known).spec, 3)], device="cpu")
    assert uniform.results[0].nll == uniform.results[1].nll
    generated = bitstrata.generate(str(known), "a", bits=made, max_new_tokens=4, device="cpu")
    assert generated.bits == "4.5bpw"  # what was made a moment ago is called like its budget


def test_the_pattern_has_a_line_a_kind_and_a_digit_a_block():
    plan = {"m.layers.0.a": 2, "m.layers.0.b": 3, "m.layers.1.a": 4, "m.layers.1.b": 5, "odd": 6, "m.layers.2.b": 2}
    lines = pattern(plan).splitlines()[1:]
    assert [line.split() for line in lines] == [["a", "24"], ["b", "352"], ["odd", "6"]]


@pytest.mark.parametrize(("tied", "head_bits"), [(False, None), (True, None), (True, 6), (False, 6)])
def test_fixed_bytes_are_what_a_loaded_model_holds_besides_planned_layers(tmp_path, tied, head_bits):
    model = tiny_llama(tmp_path / "llama", tie_word_embeddings=tied)
    quantize(model, tmp_path / "out", None, **BCQ, head_bits=head_bits)
    reader = CheckpointReader(tmp_path / "out")
    planned = reader.spec.planned_layers
    loaded = bitstrata.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    held = {
        tensor.data_ptr(): tensor.nbytes
        for name, tensor in loaded.state_dict().items()
        if name.rpartition(".")[0] not in planned and tensor.numel()
    }
    sizes = ModelSizes.of(reader, torch.bfloat16)
    assert sizes.fixed == sum(held.values())
    for bits in reader.spec.bits:
        uniform = sizes.of_plan(Plan.uniform(reader.spec, bits))
        assert 8 * reader.spec.bytes_read(bits) / reader.spec.weight_count == uniform.bpw
        if bits > min(reader.spec.bits):
            assert sizes.limit(f"{uniform.bpw!r}bpw") == uniform.weights
