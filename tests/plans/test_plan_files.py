"""Plans, budgets and page orders: files, exact bytes, and refusals that name what is wrong."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import random_weight, save_checkpoint

from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.errors import PlanError, UsageError
from bitstrata.plans import ModelSizes, Page, PageOrder, Plan, bytes_text, parse_budget
from bitstrata.progress import notes, own_notes

LAYERS = {
    "a": random_weight(5, 70, seed=1),
    "b": random_weight(3, 33, kind="codebook", seed=2),
    "c": random_weight(4, 64, bits=(2, 3, 4, 6), kind="affine8", seed=3),
}
COMMON = {"norm.weight": torch.arange(4.0), "embed.weight": torch.ones(7, 3).half(), "count": torch.arange(3)}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, LAYERS, common=COMMON)
    return CheckpointReader(folder)


@pytest.fixture(scope="module")
def sizes(reader):
    return ModelSizes.of(reader)


@pytest.fixture
def plan(reader):
    return Plan({"a": 2, "b": 4, "c": 6}, Fingerprint.of(reader), "small", {"budget": "3bpw"})


def test_bytes_are_those_of_the_tensors(reader, plan):
    expected = sum(LAYERS[name].bytes_read(bits) for name, bits in plan.items())
    size = ModelSizes.of(reader).of_plan(plan)
    assert size.weights == expected
    assert size.fixed == 4 * 4 + 21 * 4 + 3 * 8  # the config names no dtype: floats are loaded as fp32
    assert ModelSizes.of(reader, torch.float16).of_plan(plan).fixed == 4 * 2 + 21 * 2 + 3 * 8
    assert size.total == size.weights + size.fixed
    weights = sum(weight.out_features * weight.in_features for weight in LAYERS.values())
    assert size.bpw == pytest.approx(8 * expected / weights)


def test_uniform_plans_read_what_the_checkpoint_says(reader, sizes):
    for bits in reader.spec.bits:
        assert sizes.of_plan(Plan.uniform(reader.spec, bits)).weights == reader.spec.bytes_read(bits)


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("3.2bpw", "bpw", 3.2),
        (" 600 MB", "bytes", 600e6),
        ("1.8GiB", "bytes", 1.8 * 2**30),
        ("12kb", "bytes", 12e3),
        ("7B", "bytes", 7),
        ("2MiB", "bytes", 2**21),
    ],
)
def test_budgets(text, unit, amount):
    budget = parse_budget(text)
    assert (budget.unit, budget.amount) == (unit, amount)


@pytest.mark.parametrize("text", ["", "big", "600", "3 bits", "-3bpw", "0MB", "3.2.1bpw", "infMB", "nanbpw", "1e999MB"])
def test_budgets_that_are_none(text):
    with pytest.raises(UsageError, match=r"budget") as caught:
        parse_budget(text)
    assert "bpw" in caught.value.hint


def test_a_uniform_budget_is_met_exactly(reader, sizes):
    for bits in reader.spec.bits:
        size = sizes.of_plan(Plan.uniform(reader.spec, bits))
        if bits > min(reader.spec.bits):
            assert sizes.limit(f"{size.bpw!r}bpw") == size.weights
        assert sizes.limit(f"{size.total}B") == size.weights


def test_a_budget_below_the_smallest_says_the_least(sizes):
    least = sizes.of_plan(sizes.smallest)
    assert sizes.limit(f"{least.total}B") == least.weights
    for budget in (f"{least.total - 1}B", f"{least.bpw - 0.01}bpw", "1B"):
        with pytest.raises(UsageError, match=f"{least.total} bytes") as caught:
            sizes.limit(budget)
        assert f"{least.bpw:.3f}bpw" in caught.value.message
        unit = "bpw" if budget.endswith("bpw") else "MB"
        enough = re.search(rf"at least ([0-9.]+{unit})$", caught.value.hint)[1]
        assert sizes.limit(enough) >= least.weights
        assert parse_budget(enough).amount < (least.bpw + 0.001 if unit == "bpw" else least.total + 1000)


@pytest.mark.parametrize("text", ["3.25bpw", "21170000123B", "600MB", "1.8GiB"])
def test_the_exact_form_of_a_budget_is_that_budget(text):
    budget = parse_budget(text)
    again = parse_budget(budget.exact)
    assert (again.unit, again.amount) == (budget.unit, pytest.approx(budget.amount, rel=1e-12))


def test_only_what_is_above_the_largest_plan_is_noted(sizes):
    largest = sizes.of_plan(sizes.largest)
    for budget, said in ((f"{largest.total}B", 0), (f"{largest.total + 1}B", 1), (f"{largest.bpw + 0.1}bpw", 1)):
        with own_notes():
            sizes.note_excess(budget)
            assert len(notes()) == said


def test_a_plan_survives_its_file(reader, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    found.check(reader)
    assert found == plan == {"a": 2, "b": 4, "c": 6}
    assert (found.model, found.name) == (plan.model, "plan")
    assert found.provenance == {"budget": "3bpw", "name": "small"}
    assert hash(found) == hash(plan)


@pytest.mark.parametrize("named", [{}, {"name": "3.2bpw"}])
def test_a_plan_from_a_file_is_called_like_the_file(reader, tmp_path, named):
    (tmp_path / "tiny.json").write_text(json.dumps({"version": 1, "bits": {"a": 2, "b": 2, "c": 2}, **named}))
    found = Plan.load(tmp_path / "tiny.json")
    found.check(reader)
    assert str(found) == "tiny"
    assert found.provenance == named


@pytest.mark.parametrize(
    ("bits", "named"),
    [
        ({"a": 2, "b": 2}, "lacks layer c"),
        ({"a": 2, "b": 2, "c": 2, "d": 2}, "layer d"),
        ({"a": 2, "b": 6, "c": 2}, "6 bits of layer b"),
        ({"a": 0, "b": 2, "c": 2}, "0 bits of layer a"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layer(reader, bits, named):
    with pytest.raises(PlanError, match=named):
        Plan(bits, Fingerprint.of(reader), "odd").check(reader)


def test_a_plan_for_another_model_is_refused(plan, tmp_path):
    save_checkpoint(tmp_path / "shape", {**LAYERS, "a": random_weight(6, 70)}, common=COMMON)
    with pytest.raises(PlanError, match="small was made for another model"):
        plan.check(CheckpointReader(tmp_path / "shape"))
    save_checkpoint(tmp_path / "weights", {**LAYERS, "a": random_weight(5, 70, seed=9)}, common=COMMON)
    with pytest.raises(PlanError, match="small was made for other weights"):
        plan.check(CheckpointReader(tmp_path / "weights"))
    plan.check(CheckpointReader(tmp_path / "weights").spec)  # a spec alone knows no digests


GOOD = {"kind": "bitstrata plan", "version": 1, "bits": {"a": 2}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "plan.json"),
        (json.dumps({**GOOD, "bits": {"a": "2"}}), "bits.a"),
        (json.dumps({**GOOD, "bits": {"a": 2.5}}), "bits.a"),
        (json.dumps({**GOOD, "bits": {"a": True}}), "bits.a"),
        (json.dumps({**GOOD, "bits": [2]}), "bits"),
        (json.dumps({"version": 1}), "bits"),
        (json.dumps({**GOOD, "version": 99}), "version 99"),
        (json.dumps({**GOOD, "kind": "bitstrata pages"}), "kind"),
        (json.dumps({**GOOD, "layers": {}}), "layers"),
        (json.dumps({**GOOD, "model": {"weights": "x"}}), "model.layout"),
    ],
)
def test_a_malformed_plan_names_the_field(tmp_path, content, named):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=named) as caught:
        Plan.load(path)
    assert str(path) in caught.value.message


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(PlanError, match="there is no plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


def order(reader, sizes):
    """A little order by hand: c first, in one leap, then a, b, a, b."""
    steps = [("c", 2, 6), ("a", 2, 3), ("b", 2, 3), ("a", 3, 4), ("b", 3, 4)]
    pages = [
        Page(layers=[n], from_bits=f, to_bits=t, bytes=sizes.layers[n][t] - sizes.layers[n][f], saving=0.1)
        for n, f, t in steps
    ]
    return PageOrder(pages, Fingerprint.of(reader))


def test_every_budget_is_the_longest_prefix_that_fits(reader, sizes, tmp_path):
    pages = order(reader, sizes)
    pages.save(tmp_path / "pages.json")
    pages = PageOrder.load(tmp_path / "pages.json")
    pages.check(reader, sizes)
    low, high = sizes.of_plan(sizes.smallest).total, sizes.of_plan(sizes.largest).total
    seen, before = set(), sizes.smallest
    for total in range(low, high + 8, 4):
        plan = pages.plan_for(sizes, f"{total}B")
        plan.check(reader)
        size = sizes.of_plan(plan).total
        assert size <= total
        count = plan.provenance["pages"]
        seen.add(count)
        if count < len(pages.pages):
            assert size + pages.pages[count].bytes > total
        assert all(plan[name] >= before[name] for name in plan)
        before = plan
    assert seen == set(range(6))
    assert before == sizes.largest
    with pytest.raises(UsageError, match="smallest"):
        pages.plan_for(sizes, f"{low - 1}B")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda pages: pages.pop(), "largest plan"),
        (lambda pages: pages[1].update(from_bits=3), "page 1 raises a from 3"),
        (lambda pages: pages[1].update(to_bits=5), "page 1 raises a"),
        (lambda pages: pages[1].update(layers=["z"]), "layer z"),
        (lambda pages: pages[2].update(bytes=1), "page 2 says 1 bytes"),
    ],
)
def test_an_order_that_does_not_lead_up_is_refused(reader, sizes, tmp_path, change, named):
    path = tmp_path / "pages.json"
    order(reader, sizes).save(path)
    raw = json.loads(path.read_text())
    change(raw["pages"])
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=named):
        PageOrder.load(path).check(reader, sizes)


def test_bytes_for_people():
    assert [bytes_text(n) for n in (12, 1500, 2_340_000, 1_800_000_000)] == ["12.00 B", "1.50 kB", "2.34 MB", "1.80 GB"]
