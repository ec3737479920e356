"""A model that holds one plan's pages computes what a whole model computes at that plan, after any resize."""

from __future__ import annotations

import copy
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from page_orders import write_order

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import PlanError, UnsupportedBitsError, UsageError
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import missing
from bitstrata.nn import PlaneLinear, bits_state
from bitstrata.plans import PAGES_FILE, ModelSizes, PageOrder, Plan
from bitstrata.progress import notes, own_notes

KERNELS = [
    pytest.param("", marks=pytest.mark.skipif(bool(missing), reason="the native kernels are not built"), id="native"),
    pytest.param("reference", id="reference"),
]
IDS = torch.tensor([[1, 5, 9, 13, 17, 21, 25]])


def quantize(source, out, **options):
    settings = {"bits": "2-5", "method": "rtn", "group_size": 32} | options
    bitstrata.quantize(source, out, **settings)
    write_order(out)
    return out


@pytest.fixture(scope="module")
def folders(quantized, tmp_path_factory):
    """name -> a checkpoint with a page order; made on demand."""
    recipes = {
        "affine": ("llama", {}),
        "codebook": ("llama", {"method": "anyprecision", "preset": "fast"}),
        "affine8": ("llama", {"method": "nested", "preset": "fast", "bits": "2-6"}),
        "head": ("llama", {"head_bits": 4}),
        "tied": ("llama-tied", {"head_bits": 4}),
        "gpt2": ("gpt2", {}),
    }
    made = {}

    def get(name):
        if name not in made:
            architecture, options = recipes[name]
            made[name] = quantize(quantized(architecture)[1], tmp_path_factory.mktemp(name) / "out", **options)
        return made[name]

    return get


@pytest.fixture
def folder(folders):
    return folders("affine")


@pytest.fixture
def kernel(request, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT, request.param)
    return request.param


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def random_plan(folder, seed):
    draw = random.Random(seed)
    return {name: draw.choice(list(held)) for name, held in ModelSizes.of(CheckpointReader(folder)).layers.items()}


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("name", ["affine", "codebook", "affine8", "head", "tied", "gpt2"])
def test_after_any_resize_outputs_are_those_of_a_fresh_load_and_of_the_whole_model(name, kernel, folders, seed):
    folder = folders(name)
    whole = bitstrata.load(folder)
    plans = [random_plan(folder, seed + index) for index in range(4)]
    plans += [dict(plans[0], **dict.fromkeys(list(plans[0])[:2], 5)), plans[0]]
    model = bitstrata.load(folder, plan=plans[0])
    for plan in plans:
        model.resize(plan)
        expected = logits(whole, bits=plan)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(bitstrata.load(folder, plan=plan)), expected)
    assert len({str(logits(whole, bits=plan).sum().item()) for plan in plans}) > 1, "the plans differ in what they say"


def test_layers_that_share_calls_share_them_still(folder, seed):
    model = bitstrata.load(folder, plan=3)
    assert any(module.fused is not None for module in model.modules() if isinstance(module, PlaneLinear))
    whole = bitstrata.load(folder)
    for plan in (3, random_plan(folder, seed), 4):
        model.resize(plan)
        assert torch.equal(logits(model), logits(whole, bits=plan))


def test_only_the_pages_of_the_plan_are_held(folder, seed):
    plan = random_plan(folder, seed)
    model = bitstrata.load(folder, plan=5)
    for target in (plan, 2, plan):
        model.resize(target)
        for name, bits in bits_state(model).plan.items():
            layer = model.get_submodule(name)
            assert layer.bits == (bits,)
            assert layer.plane_weight().bits == (bits,)
            assert len(layer.plane_weight().planes) == bits
    held = {name.rpartition(".")[2] for name in model.state_dict() if ".plane_" in name}
    assert held == {f"plane_{index}" for index in range(max(plan.values()))}


def test_the_planes_that_stay_are_shared_not_copied(folder):
    model = bitstrata.load(folder, plan=3)
    name = next(iter(bits_state(model).plan))
    layer = model.get_submodule(name)
    before = [tensor.data_ptr() for tensor in layer.buffers() if tensor.numel()][:3]
    model.resize(5)
    assert [tensor.data_ptr() for tensor in layer.buffers() if tensor.numel()][:3] == before
    model.resize(3)
    assert [tensor.data_ptr() for tensor in layer.buffers() if tensor.numel()][:3] == before


def test_the_report_counts_what_was_read_added_and_dropped(folder):
    model = bitstrata.load(folder, plan=3)
    sizes = ModelSizes.of(CheckpointReader(folder))
    plan = dict.fromkeys(sizes.layers, 3)
    name = next(iter(plan))
    done = model.resize({**plan, name: 4})
    spec = CheckpointReader(folder).spec
    layer = spec.layers[name]
    plane = 4 * layer.out_features * -(-layer.in_features // 32)
    scales = spec.prefix_bytes(name, 4) - 4 * plane
    assert (done.layers, done.read, done.added) == (1, plane + scales, plane + scales)
    assert done.dropped == spec.prefix_bytes(name, 3) - 3 * plane
    assert done.after - done.before == done.added - done.dropped
    assert done.after == sizes.of_plan({**plan, name: 4}).total
    again = model.resize({**plan, name: 4})
    assert (again.layers, again.read, again.added, again.dropped) == (0, 0, 0, 0)
    assert set(done.to_json()) == {"before", "after", "added", "dropped", "read", "layers", "seconds"}


def test_a_budget_is_a_prefix_of_the_stored_order(folder):
    reader = CheckpointReader(folder)
    sizes, order = ModelSizes.of(reader), PageOrder.load(folder / PAGES_FILE)
    low, high = (sizes.of_plan(plan).total for plan in (sizes.smallest, sizes.largest))
    model = bitstrata.load(folder, budget=f"{low}B")
    assert dict(bits_state(model).plan) == sizes.smallest
    for share in (0.3, 0.9, 0.5):
        budget = f"{int(low + share * (high - low))}B"
        model.resize(budget)
        assert dict(bits_state(model).plan) == dict(order.plan_for(sizes, budget))
    model.resize("6bpw")
    assert sizes.of_plan(bits_state(model).plan).bpw <= 6


def test_a_budget_below_the_smallest_names_the_minimum(folder):
    sizes = ModelSizes.of(CheckpointReader(folder))
    least = sizes.of_plan(sizes.smallest).total
    with pytest.raises(UsageError, match=str(least)):
        bitstrata.load(folder, budget=f"{least - 1}B")
    model = bitstrata.load(folder, budget=f"{least}B")
    before = logits(model)
    with pytest.raises(UsageError, match=str(least)):
        model.resize("1kB")
    assert torch.equal(logits(model), before)


def test_a_budget_above_everything_says_so_and_loads_all(folder):
    with own_notes():
        model = bitstrata.load(folder, budget="5GB")
        assert any("above the whole model" in note for note in notes())
    sizes = ModelSizes.of(CheckpointReader(folder))
    assert dict(bits_state(model).plan) == sizes.largest
    with own_notes():
        model.resize(f"{sizes.of_plan(sizes.largest).total}B")
        assert not notes()


def test_plans_come_from_files_as_well(folder, tmp_path, seed):
    plan = random_plan(folder, seed)
    Plan(plan).save(tmp_path / "small.json")
    model = bitstrata.load(folder, plan=tmp_path / "small.json")
    assert dict(bits_state(model).plan) == plan
    model.resize(4)
    model.resize(str(tmp_path / "small.json"))
    assert dict(bits_state(model).plan) == plan


@pytest.mark.parametrize(
    ("size", "error", "says"),
    [
        ({"model.layers.0.self_attn.q_proj": 3}, PlanError, "lacks layer"),
        (7, PlanError, "7 bits"),
        ("no-such.json", PlanError, "no-such.json"),
        ("600", UsageError, "no unit"),
        (None, UsageError, "is not a size"),
        (True, UsageError, "is not a size"),
        (2.5, UsageError, "is not a size"),
    ],
)
def test_sizes_that_cannot_be_used_leave_the_model_alone(size, error, says, folder):
    model = bitstrata.load(folder, plan=3)
    before = logits(model)
    with pytest.raises(error, match=says):
        model.resize(size)
    assert torch.equal(logits(model), before)


def test_a_plan_for_another_model_is_refused(folder, folders):
    other = CheckpointReader(folders("gpt2"))
    with pytest.raises(PlanError, match="another model"):
        bitstrata.load(folder, plan=Plan.uniform(other.spec, 3))


def test_a_missing_page_order_names_the_command(folder, tmp_path):
    copied = copy_of(folder, tmp_path)
    (copied / PAGES_FILE).unlink()
    sizes = ModelSizes.of(CheckpointReader(folder))
    low, high = (sizes.of_plan(plan).total for plan in (sizes.smallest, sizes.largest))
    for budget in (low + 1, high - 1):
        with pytest.raises(PlanError, match=PAGES_FILE) as caught:
            bitstrata.load(copied, budget=f"{budget}B")
        assert f"bitstrata plan {copied} --budget {budget / 1e6:.12g}MB" in caught.value.hint
    assert bitstrata.load(copied, plan=3) is not None, "a plan needs no order"
    for budget, plan in ((low, sizes.smallest), (high, sizes.largest), (2 * high, sizes.largest)):
        model = bitstrata.load(copied, budget=f"{budget}B")
        assert dict(bits_state(model).plan) == plan, "nor does the smallest or the largest"
        assert str(bits_state(model).plan) == f"{budget}B"


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', "[1]"])
def test_a_malformed_page_order_is_refused(folder, tmp_path, text):
    copied = copy_of(folder, tmp_path)
    (copied / PAGES_FILE).write_text(text)
    with pytest.raises(PlanError, match=PAGES_FILE):
        bitstrata.load(copied, budget="6bpw")


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_ways_of_saying_how_much_exclude_each_other(folder):
    for given in (
        {"plan": 3, "budget": "5GB"},
        {"plan": 3, "max_bits": 3},
        {"plan": 3, "bits": 3},
        {"budget": "5GB", "fit": True},
    ):
        with pytest.raises(UsageError, match="how much to load"):
            bitstrata.load(folder, **given)
    with pytest.raises(UsageError, match="context"):
        bitstrata.load(folder, plan=3, context=10)


@pytest.mark.parametrize("bits", ["plan.json", Path("plan.json"), 2.5, "3"])
def test_bits_that_are_none_are_refused_before_anything_is_read(bits, tmp_path):
    with pytest.raises(UsageError, match="neither a number of bits nor a plan") as caught:
        bitstrata.load(tmp_path / "nowhere", bits=bits)
    assert isinstance(bits, float) or f"plan={bits!r}" in caught.value.hint


def test_drafts_need_all_planes(folder):
    model = bitstrata.load(folder, plan=3)
    with pytest.raises(UsageError, match="only the pages of its plan"):
        model.generate(IDS, draft_bits=2, max_new_tokens=2)
    with pytest.raises(UsageError, match="only the pages of its plan"):
        model.generate(IDS, bits=3, draft_bits=2, max_new_tokens=2)


def test_bits_that_are_not_in_memory_are_refused(folder, seed):
    model = bitstrata.load(folder, plan=3)
    assert torch.equal(logits(model, bits=3), logits(model))
    assert torch.equal(logits(model, bits=torch.tensor([3])), logits(model))
    for bits in (4, torch.tensor([4])):
        with pytest.raises(UnsupportedBitsError, match="in memory is 3 bits a layer and nothing else") as caught:
            logits(model, bits=bits)
        assert "resize" in caught.value.hint
    plan = {**dict.fromkeys(bits_state(model).plan, 2), next(iter(bits_state(model).plan)): 5}
    model.resize(plan)
    assert torch.equal(logits(model, bits=plan), logits(model))
    with pytest.raises(UnsupportedBitsError, match="a plan of 2 to 5 bits"):
        logits(model, bits=2)
    with pytest.raises(UsageError, match="not the one in memory"):
        logits(model, bits=dict.fromkeys(plan, 2))


def test_generation_that_named_the_bits_goes_on_after_a_resize(folder):
    """`bits` may name what is in memory; what is restored at the end is what is in memory then."""
    model = bitstrata.load(folder, plan=3)
    with bitstrata.use_bits(model, 3):
        model.resize(4)
        inside = logits(model)
    assert torch.equal(logits(model), inside)
    assert torch.equal(inside, logits(bitstrata.load(folder), bits=4))


def test_a_whole_model_cannot_be_resized(folder):
    with pytest.raises(UsageError, match="holds all of its planes"):
        bitstrata.load(folder).resize(3)


def test_a_model_of_pages_is_not_saved_as_a_checkpoint(folder, tmp_path):
    model = bitstrata.load(folder, plan=3)
    with pytest.raises(UsageError, match="only the pages of its plan"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_resized_on_their_own(copied, kernel, folder, seed):
    model = bitstrata.load(folder, plan=random_plan(folder, seed))
    before, whole = logits(model), bitstrata.load(folder)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    for size in (4, random_plan(folder, seed + 1)):
        twin.resize(size)
        assert torch.equal(logits(twin), logits(whole, bits=size))
        assert torch.equal(logits(model), before)


def test_a_model_that_changed_its_dtype_is_resized(folder, seed):
    model, whole = bitstrata.load(folder, plan=3), bitstrata.load(folder)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype), whole.to(dtype)
        for size in (random_plan(folder, seed), 3):
            model.resize(size)
            assert torch.equal(logits(model), logits(whole, bits=size))


def test_torch_compile_sees_the_new_plan(folder):
    torch._dynamo.reset()
    model, whole = bitstrata.load(folder, plan=3), bitstrata.load(folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (3, 4):
            model.resize(size)
            torch.testing.assert_close(compiled(IDS).logits, whole(IDS, bits=size).logits)
    torch._dynamo.reset()
