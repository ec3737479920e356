"""The Triton kernels' layout, and when they are chosen; none of it needs triton."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_weight, random_weight

from bitstrata.errors import KernelError
from bitstrata.kernels import describe, pack, select
from bitstrata.kernels.triton import KERNEL, TiledWeight, config
from bitstrata.planes import PlaneWeight

ALL_BITS = tuple(range(1, 9))
LAYOUTS = [*(("affine", size) for size in (1, 12, 32, 43, 64, 100, 128, 200)), ("affine8", 64), ("codebook", 128)]
layouts = pytest.mark.parametrize(("scales", "group_size"), LAYOUTS, ids=str)


@layouts
@pytest.mark.parametrize("shape", [(1, 1), (16, 256), (37, 301), (17, 33), (3, 1100)], ids=str)
def test_unpack_gives_the_weight_back(scales, group_size, shape, seed, monkeypatch):
    weight = random_weight(*shape, ALL_BITS, group_size, scales, seed)
    assert_same_weight(TiledWeight.pack(weight, KERNEL).stored(), weight)
    monkeypatch.setattr("bitstrata.kernels.triton.tiled.STEP", 1)  # a block of 16 rows at a time
    assert_same_weight(TiledWeight.pack(weight, KERNEL).stored(), weight)


def test_copies_and_pickles_hold_the_same_weight(seed, monkeypatch):
    weight = random_weight(37, 301, (2, 3), 43, "affine8", seed)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    tiled = pack(weight, kernel="triton")
    for other in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert other.layout == "tiled"
        assert_same_weight(other.stored(), weight)
        assert other.planes[0].data_ptr() != tiled.planes[0].data_ptr()


def test_a_tile_is_what_the_head_of_the_file_says(seed):
    """One bit at a time: row 8 h + g, column 128 v + 32 c + 8 t + e."""
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(48, 768, (1,), 128, "affine", seed)
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (48, 768))
    plane = torch.zeros(48, 24, dtype=torch.int64)
    plane[row, column // 32] = 1 << column % 32
    plane = torch.where(plane >= 2**31, plane - 2**32, plane).int()
    words = TiledWeight.pack(replace(weight, planes=(plane,)), KERNEL).planes[0].view(3, 3, 8, 4, 2, 2)
    h, g, v, c, t, e = row % 16 // 8, row % 8, column % 256 // 128, column % 128 // 32, column % 32 // 8, column % 8
    found = words[row // 16, column // 256, g, t, h, v].item()
    assert found & 0xFFFFFFFF == 1 << (4 * c + e // 2 + 16 * (e % 2))
    assert words.count_nonzero() == 1


def test_common_groups_need_no_padding():
    weight = random_weight(64, 1024, (2, 4), 128)
    assert TiledWeight.pack(weight, KERNEL).bytes_read(2) == weight.bytes_read(2)


def test_tensors_that_do_not_fit_are_refused():
    tiled = TiledWeight.pack(random_weight(37, 301, (2,)), KERNEL)
    rest = 37, 301, tiled.group_size, tiled.kind, KERNEL
    with pytest.raises(ValueError, match=r"plane 1: expected \d+ contiguous entries of torch\.int32"):
        TiledWeight((tiled.planes[0], tiled.planes[1][:-1]), tiled.scales, *rest)
    with pytest.raises(ValueError, match="scales for 2 bits: expected"):
        TiledWeight(tiled.planes, {2: tiled.scales[2].float()}, *rest)
    with pytest.raises(ValueError, match="scales for 3 bits need as many planes"):
        TiledWeight(tiled.planes, {3: tiled.scales[2]}, *rest)


def test_mixed_kinds_are_refused(monkeypatch):
    affine, codebook = random_weight(5, 33, (2,)), random_weight(5, 33, (3,), kind="codebook")
    mixed = PlaneWeight(codebook.planes, {**affine.scales, **codebook.scales}, 33, 32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="affine and codebook"):
        pack(mixed, kernel="triton")


def problem(device="cuda", dtype=torch.float16):
    return device, dtype


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("BITSTRATA_KERNEL", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
def test_gpus_get_it_and_nothing_else_does(monkeypatch):
    assert select(*problem()) is KERNEL
    assert KERNEL.can_run(*problem("cpu")) == "tensors are on cpu"
    assert KERNEL.can_run(*problem("mps")) == "tensors are on mps"
    reason = "activations are torch.float64; float16, bfloat16 and float32 can be used"
    assert KERNEL.can_run(*problem(dtype=torch.float64)) == reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert KERNEL.can_run(*problem()) == "triton is not installed (pip install 'bitstrata[triton]')"


@pytest.mark.usefixtures("installed")
def test_the_interpreter_only_runs_if_it_is_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = {report.name: report.reason for report in describe(*problem("cpu"))}
    assert reasons["triton"] == "the interpreter is for tests: it only runs if it is forced"
    assert select(*problem("cpu")) is not KERNEL
    monkeypatch.setenv("BITSTRATA_KERNEL", "triton")
    assert select(*problem("cpu")).name == "triton"


@pytest.mark.usefixtures("installed")
def test_forcing_it_on_the_cpu_is_an_error(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "triton")
    with pytest.raises(KernelError, match="BITSTRATA_KERNEL=triton cannot run here: tensors are on cpu"):
        select(*problem("cpu", torch.bfloat16))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config._measured.cache_clear()
    yield tmp_path
    config._measured.cache_clear()


def test_measured_shapes_of_programs_are_kept_and_used(folder):
    tiled = TiledWeight.pack(random_weight(40, 600, (2, 3, 4), 64), KERNEL)
    other = TiledWeight.pack(random_weight(24, 600, (2,), 64), KERNEL)
    by_rule, cpu = config.few_rows(tiled, 2, 1, False), torch.device("cpu")
    few = {bits: config.FewRows(4, 16, 96) for bits in (2, 3)}
    many = config.ManyRows(1, 4, 32, 3)
    path = config.save(cpu, config.Measured({config.shape_key(tiled): few}))
    assert path == folder / "bitstrata" / "triton" / "default.json"
    config.save(cpu, config.Measured(many_rows={config.many_rows_key(tiled, 3, 100): many}))
    assert config.few_rows(tiled, 2, 1, False) == few[2] != by_rule
    for bits, rows, mixed in ((2, 16, False), (4, 1, False), (4, 8, True)):  # a row is the same in any company
        chosen = config.few_rows(tiled, bits, rows, mixed)
        assert (chosen.warps, chosen.blocks) == (16, 1)  # blocks as by rule: nothing was measured for this
    assert config.few_rows(other, 2, 1, False) == replace(by_rule, warps=config.few_rows(other, 2, 1, False).warps)
    assert config.many_rows(tiled, 3, 65) == config.many_rows(tiled, 3, 128) == many
    assert config.many_rows(tiled, 3, 64) != many != config.many_rows(tiled, 3, 129)


def test_the_users_numbers_win_over_the_packages_shape_by_shape(folder, monkeypatch):
    monkeypatch.setattr(config, "FOLDER", folder / "package")
    cpu, here, there = torch.device("cpu"), config.FewRows(1, 2, 0), config.FewRows(1, 4, 0)
    config.save(cpu, config.Measured({"40x600": {2: here}, "16x256": {2: here}}), config.FOLDER)
    config.save(cpu, config.Measured({"40x600": {3: there}}))
    assert config._measured("default").few_rows == {"40x600": {3: there}, "16x256": {2: here}}


BAD_FILES = {
    "no json": "{",
    "a list": "[]",
    "unknown field": '{"few_rows": {"1x1": {"2": {"blocks": 1, "warps": 2, "registers": 0, "colour": 1}}}}',
    "three warps": '{"few_rows": {"1x1": {"2": {"blocks": 1, "warps": 3, "registers": 0}}}}',
    "two numbers of warps": '{"few_rows": {"1x1": {"2": {"blocks": 1, "warps": 2, "registers": 0}, '
    '"3": {"blocks": 1, "warps": 4, "registers": 0}}}}',
    "no stages": '{"many_rows": {"1x1x2x32": {"blocks": 1, "warps": 4, "rows": 32, "stages": 0}}}',
    "bits of words": '{"few_rows": {"1x1": {"two": {"blocks": 1, "warps": 2, "registers": 0}}}}',
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_was_damaged_is_named(folder, content):
    path = folder / "bitstrata" / "triton" / "default.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(KernelError, match=r"default\.json is not a file of measured configurations") as caught:
        config.few_rows(TiledWeight.pack(random_weight(16, 32, (2,), 32), KERNEL), 2, 1, False)
    assert "delete it" in caught.value.hint
