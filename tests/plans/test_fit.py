"""The largest budget for the free memory: control groups, the cache of keys and values, the reserve."""

from __future__ import annotations

import shutil

import pytest
import torch
from control_groups import cgroups, group  # noqa: F401  (a fixture)
from page_orders import write_order
from tiny_models import tiny_gpt2, tiny_llama
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, OPTConfig

import bitstrata
from bitstrata import memory
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import PlanError, ResourceError, UsageError
from bitstrata.nn import bits_state
from bitstrata.plans import PAGES_FILE, ModelSizes, fit
from bitstrata.plans.fit import RESERVE, cache_bytes, fit_budget


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fit")
    bitstrata.quantize(tiny_llama(root / "source"), root / "out", bits="2-4", method="rtn", group_size=32)
    write_order(root / "out")
    return root / "out"


@pytest.fixture
def sizes(folder):
    return ModelSizes.of(CheckpointReader(folder))


def total(sizes, plan):
    return sizes.of_plan(plan).total


CACHES = [
    (LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2), 3 * 2 * 2 * 16),
    (LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, head_dim=24), 2 * 2 * 4 * 24),
    (OPTConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4), 2 * 2 * 64),
    (Gemma3TextConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=32), 2 * 2 * 32),
]


@pytest.mark.parametrize(("config", "numbers"), CACHES, ids=lambda value: type(value).__name__)
def test_the_cache_is_two_numbers_a_layer_head_and_channel(config, numbers):
    assert cache_bytes(config, 10, torch.bfloat16) == 10 * 2 * numbers
    assert cache_bytes(config, 10, torch.float32) == 10 * 4 * numbers


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_cache_is_as_large_as_the_one_that_transformers_makes(make, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "model"))
    cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    made = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert made == cache_bytes(model.config, 7, torch.float32)


def test_the_budget_is_what_is_left_of_the_free_memory(folder, sizes, monkeypatch):
    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(fit, "free_memory", lambda device: RESERVE + 10_000_000)
    cache = cache_bytes(config, 64, torch.float32)
    assert fit_budget(sizes, config).amount == 10_000_000 - cache
    assert fit_budget(sizes, config, context=10).amount == 10_000_000 - cache * 10 // 64
    assert fit_budget(sizes, config, context=10, dtype=torch.bfloat16).amount == 10_000_000 - cache * 5 // 64
    assert fit_budget(sizes, config, reserve=0).amount == 10_000_000 - cache + RESERVE
    heads = 64 * 2 * config.num_hidden_layers * config.num_key_value_heads
    for kind, taken in (("int8", config.head_dim + 4), ("int4", -(-config.head_dim // 32) * 16 + 4)):
        assert fit_budget(sizes, config, kv_cache_dtype=kind).amount == 10_000_000 - heads * taken


def test_load_takes_the_largest_plan_that_fits(folder, sizes, monkeypatch):
    config = AutoConfig.from_pretrained(folder)
    wanted = (total(sizes, sizes.smallest) + total(sizes, sizes.largest)) // 2
    others = RESERVE + cache_bytes(config, 20, torch.float32)
    monkeypatch.setattr(fit, "free_memory", lambda device: wanted + others)
    model = bitstrata.load(folder, fit=True, context=20)
    plan = dict(bits_state(model).plan)
    assert sizes.smallest != plan != sizes.largest
    assert plan == dict(model.pages.plan(f"{wanted}B"))
    assert str(bits_state(model).plan) == "fit", "the same at every start, however much was free"
    model.resize(2)
    assert dict(bits_state(model).plan) == sizes.smallest
    less = RESERVE + cache_bytes(config, 20, torch.float32, "int4")
    assert less < others
    monkeypatch.setattr(fit, "free_memory", lambda device: wanted + less)
    model = bitstrata.load(folder, fit=True, context=20, kv_cache_dtype="int4")
    assert dict(bits_state(model).plan) == plan


def test_not_even_the_smallest_fits(folder, sizes, monkeypatch):
    least = total(sizes, sizes.smallest)
    config = AutoConfig.from_pretrained(folder)
    needed = least + RESERVE + cache_bytes(config, 64, torch.float32)
    monkeypatch.setattr(fit, "free_memory", lambda device: needed - 1)
    with pytest.raises(ResourceError, match="cache of 64 tokens") as caught:
        bitstrata.load(folder, fit=True)
    assert caught.value.exit_code == 4
    monkeypatch.setattr(fit, "free_memory", lambda device: needed)
    assert dict(bits_state(bitstrata.load(folder, fit=True)).plan) == sizes.smallest


def test_a_missing_page_order_names_a_budget_that_can_be_given(folder, sizes, monkeypatch, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / PAGES_FILE).unlink()
    config = AutoConfig.from_pretrained(copied)
    wanted = total(sizes, sizes.largest) - 1
    others = RESERVE + cache_bytes(config, 20, torch.float32)
    monkeypatch.setattr(fit, "free_memory", lambda device: wanted + others)
    with pytest.raises(PlanError, match=PAGES_FILE) as caught:
        bitstrata.load(copied, fit=True, context=20)
    assert f"--budget {wanted / 1e6:.12g}MB" in caught.value.hint
    monkeypatch.setattr(fit, "free_memory", lambda device: wanted + others + 1)
    model = bitstrata.load(copied, fit=True, context=20)
    assert dict(bits_state(model).plan) == sizes.largest, "everything fits: no order is needed"


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_that_cannot_be_used(context, folder):
    with pytest.raises(UsageError, match="at least 1"):
        bitstrata.load(folder, fit=True, context=context)


def test_version_2_counts_every_group_above_and_gives_the_file_cache_back(cgroups):  # noqa: F811
    root = cgroups("0::/a/b")
    group(root / "a" / "b", memory._V2, limit=5000, used=1000, cache=300)
    group(root / "a", memory._V2, limit=4000, used=2500, cache=500)
    assert memory.free_memory() == 2000
    group(root / "a", memory._V2, limit="max", used=2500)
    assert memory.free_memory() == 4300


def test_version_1(cgroups):  # noqa: F811
    root = cgroups("9:name=systemd:/", "4:cpu,memory:/a/b", "0::/")
    group(root / "memory" / "a" / "b", memory._V1, limit=9000, used=1000, cache=100)
    group(root / "memory", memory._V1, limit=2**63 - 4096, used=1000)
    assert memory.free_memory() == 8100


def test_in_a_container_the_groups_files_may_lie_at_the_root(cgroups):  # noqa: F811
    root = cgroups("0::/of/the/host")
    group(root, memory._V2, limit=5000, used=1000)
    assert memory.free_memory() == 4000


def test_a_group_that_is_over_its_limit_leaves_nothing(cgroups):  # noqa: F811
    group(cgroups("0::/"), memory._V2, limit=500, used=1000)
    assert memory.free_memory() == 0


@pytest.mark.parametrize("broken", ["limit", "used"])
def test_groups_that_cannot_be_read_do_not_count(cgroups, broken):  # noqa: F811
    values = {"limit": 5000, "used": 1000} | {broken: "nonsense"}
    group(cgroups("0::/a", "nonsense:") / "a", memory._V2, **values)
    assert memory.free_memory() > 10**6
