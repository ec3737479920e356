"""`bitstrata bench` with device cuda, on a pretended one."""

from __future__ import annotations

import importlib.util
import json
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from pretended_gpu import DeviceTensor, on_a_real_one
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.benchmark import bench, clock, linear, model, random_model, run, tune
from bitstrata.benchmark.model import StaticDecoder
from bitstrata.cli.main import run as command
from bitstrata.errors import CheckError
from bitstrata.kernels.triton import TiledWeight, config
from bitstrata.runtime.batching.graph import GraphStep

QUICK = {"rounds": 1, "bits": "2,3"}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def is_pretended(device):
    return isinstance(torch.zeros(1, device=device), DeviceTensor)


def host_seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config._measured.cache_clear()
    config._name_of.cache_clear()
    yield tmp_path
    config._measured.cache_clear()
    config._name_of.cache_clear()


@pytest.fixture
def small(gpu, monkeypatch):
    """The device, with sets of copies that a CPU gets through."""
    if is_pretended(gpu):
        monkeypatch.setattr(clock, "device_seconds", host_seconds)
        monkeypatch.setattr(run, "bench_model", partial(model.bench_model, context=8, tokens=2, rounds=1))
        monkeypatch.setattr(linear, "MEMORY_BYTES", 1 << 14)
    monkeypatch.setitem(random_model.SHAPES, "tiny", TINY)
    return gpu


@pytest.fixture
def launched(gpu, monkeypatch):
    """On a pretended device: the configurations that the launch module was asked for, whose products are the
    reference's."""
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    from bitstrata.kernels.triton import launch

    asked = []

    def product(x, weight, bits, chosen=None):
        asked.append(chosen)
        return weight._product(x, bits)

    if is_pretended(gpu):
        monkeypatch.setattr(launch, "few_rows", product)
        monkeypatch.setattr(launch, "tiles", product)
    return asked


@on_a_real_one
def test_layers(small):
    result = bench(shapes="48x128,5x70", rows="1,17", device=small, **QUICK)
    assert result.kernel == "triton"
    assert {"gpu", "cuda", "triton"} <= result.machine.keys()
    found = {(r.out_features, r.rows, r.name) for r in result.linear if r.regime == "cache"}
    assert found == {
        (n, rows, name) for n in (48, 5) for rows in (1, 17) for name in ("2 bits", "3 bits", "bf16", "fp32")
    }
    for row in result.linear:
        assert row.time > 0
        assert row.floor == pytest.approx(row.bytes / result.bandwidth)
        assert row.bits is None or 0 < row.error < 0.02
    assert "a copy moves" in str(result)


def test_a_wrong_kernel_is_not_timed(small, monkeypatch):
    real = TiledWeight._product
    monkeypatch.setattr(TiledWeight, "_product", lambda *arguments: 1.03 * real(*arguments))
    with pytest.raises(CheckError, match="kernel triton is wrong at 2 bits"):
        bench(shapes="48x128", rows="1", device=small, **QUICK)


@on_a_real_one
def test_a_whole_model_and_a_checkpoint(small, checkpoint):
    result = bench(shapes="tiny", whole=True, head_bits=6, rows="1", regimes=["cache"], device=small, **QUICK)
    assert [row.name for row in result.models] == ["tiny 2 bits", "tiny 3 bits", "tiny bf16"]
    assert all(row.tokens_per_second > 0 and row.bytes > 0 for row in result.models)
    assert result.models[0].bytes < result.models[1].bytes
    assert [row.switch is None for row in result.models] == [False, False, True]
    result = bench(checkpoint, bits="2", rows="1", regimes=["cache"], rounds=1, device=small)
    assert len(result.models) == 2


def test_what_is_timed_is_what_generate_runs(gpu, checkpoint):
    """The same step and cache, at all bits in turn, each of whose texts goes on where it was; a graph on a GPU."""
    loaded = bitstrata.load(checkpoint, device=gpu, dtype=torch.float32)
    ids = torch.arange(8).unsqueeze(0)
    here = bitstrata.load(checkpoint, device="cpu", dtype=torch.float64)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ExitStack() as stack:
        timed = model.decoders(loaded, 8, (4, 2), stack)
        for _ in range(3):
            for decoder in timed:
                decoder.step()
        assert isinstance(timed[0]._own._forward._step, GraphStep)
        for bits, decoder in zip((4, 2), timed, strict=True):
            assert decoder._text.new == here.generate(ids, bits=bits, max_new_tokens=4, **settings)[0, 8:].tolist()


def test_a_dense_decoder_in_place_makes_the_tokens_of_generate(gpu, source):
    """Again after it was rewound, while the addresses stay."""
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(8).unsqueeze(0)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = dense.generate(ids, max_new_tokens=4, **settings)[0, 8:].tolist()
    decoder = StaticDecoder(dense.to(gpu), 8, room=4)
    address = decoder.token
    for _ in range(2):
        decoder.rewind()
        made = [decoder.token.item()]
        for _ in range(3):
            decoder.step()
            made.append(decoder.token.item())
        assert made == expected
    assert decoder.token is address


TUNE = ["bench", "--shapes", "48x128", "--bits", "2,3", "--regime", "cache", "--rounds", "1", "--tune", "--json"]


def test_tuning_keeps_what_was_fastest(small, launched, cache, capfd):
    assert command([*TUNE, "--rows", "1,40", "--device", small], debug=True) == 0
    result = json.loads(capfd.readouterr().out)
    (path,) = (cache / "bitstrata" / "triton").glob("*.json")
    assert any(str(path) in note for note in result["notes"])
    kept = json.loads(path.read_text())
    assert kept["device"] == torch.cuda.get_device_name()
    assert kept["few_rows"]["48x128"].keys() == {"2", "3"}
    assert kept["many_rows"].keys() == {"48x128x2x64", "48x128x3x64"}
    assert {(t["bits"], t["rows"]) for t in result["tuned"]} == {(2, 1), (3, 1), (2, 64), (3, 64)}
    assert result["linear"], "what was found is measured"


def test_the_fastest_that_the_device_can_run_with_one_number_of_warps(gpu, launched, cache, monkeypatch):
    """Pretended times: 2 bits like four warps best, 3 bits two, a little; four blocks cannot run."""
    if not is_pretended(gpu):
        pytest.skip("times are pretended")
    from triton.runtime.errors import OutOfResources

    asked = []

    def timer(call, copies, device):
        call(0)
        chosen = launched[-1]
        asked.append(chosen)
        if chosen.blocks == 4:
            raise OutOfResources(1, 0, "registers")
        bits = 2 if len([c for c in asked if c == asked[0]]) == 1 else 3
        slower = {2: {4: 1.0, 2: 2.0}, 3: {4: 1.1, 2: 1.0}}[bits].get(chosen.warps, 9.0)
        return lambda: slower + (chosen.blocks != 2) + (chosen.registers != 128)

    monkeypatch.setattr(linear, "MEMORY_BYTES", 1 << 14)
    monkeypatch.setattr(tune, "timer", timer)
    found, path = tune.tune([(48, 128)], (2, 3), [8], device=torch.device("cuda:0"))
    assert [t.config for t in found] == [{"blocks": 2, "warps": 4, "registers": 128}] * 2
    assert [t.time for t in found] == [1.0, 1.1]
    assert all(t.before > t.time for t in found)
    assert set(asked) == {*config.few_rows_candidates(), asked[0]}
    measured = config._measured("pretended-gpu")
    assert measured.few_rows == {"48x128": {2: config.FewRows(2, 4, 128), 3: config.FewRows(2, 4, 128)}}
    assert path.parent.is_relative_to(cache)


def test_another_result_is_not_kept(small, launched, cache, monkeypatch):
    if not is_pretended(small):
        pytest.skip("the real kernels are right")
    from bitstrata.kernels.triton import launch

    right = launch.few_rows
    monkeypatch.setattr(launch, "few_rows", lambda x, w, b, c=None: right(x, w, b, c) * (1 if c is None else 1.1))
    with pytest.raises(CheckError, match=r"differ by 0.1 at 2 bits, \[48, 128\]"):
        tune.tune([(48, 128)], (2,), [1], device=torch.device(small), rounds=1)
    assert config._measured("pretended-gpu").few_rows == {}


def test_where_there_is_no_gpu_there_is_nothing_to_tune(capfd):
    assert command([*TUNE, "--device", "cpu"], debug=False) == 2
    said = capfd.readouterr()
    assert "there are no kernels to tune here: tensors are on cpu" in said.err
    assert "hint: --tune is for the Triton kernels on a CUDA device" in said.err
    assert said.out == ""


def test_a_folder_that_cannot_be_written_is_noticed_first(small, cache, capfd):
    (cache / "bitstrata").write_text("not a folder")
    assert command([*TUNE, "--device", small], debug=False) == 4
    said = capfd.readouterr().err
    assert "cannot write into" in said
    assert "XDG_CACHE_HOME" in said
    assert "tuning" not in said


def test_threads_are_not_for_gpus(small, capfd):
    assert command(["bench", "--shapes", "48x128", "--threads", "2", "--device", small], debug=False) == 2
    assert "threads are the CPU's" in capfd.readouterr().err


@pytest.fixture
def script():
    """benchmarks/gpu.py."""
    found = importlib.util.spec_from_file_location("gpu_script", Path(__file__).parents[2] / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@on_a_real_one
def test_the_benchmark_script(small, launched, script, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(script, "parse_shapes", lambda text: [(48, 128), (1024, 8)])
    output = tmp_path / "gpu.json"
    arguments = ["--bits", "2,3", "--rows", "1,17", "--rounds", "1", "--device", small, "--model", "tiny", "--tune"]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments, "--output", str(output)])
    assert script.main() == 0, capfd.readouterr().err
    said = capfd.readouterr().out.splitlines()
    report = json.loads(said[-1])
    assert json.loads(output.read_text()) == report
    assert {"gpu", "cuda", "torch", "triton", "transformers", "bitstrata"} <= report["machine"].keys()
    assert report["copy_bytes_per_s"] > 0
    wide = [row for row in report["linear"] if row["out_features"] == 48]
    names = {1: {"2 bits", "3 bits", "bf16", "fp32"}, 17: {"2 bits", "3 bits", "mixed bits", "bf16", "fp32"}}
    if wide:  # a real GPU's caches hold more copies than there are layers in a model
        assert {rows: {row["name"] for row in wide if row["rows"] == rows} for rows in (1, 17)} == names
        by_name = {row["name"]: row for row in wide if row["rows"] == 17}
        assert by_name["3 bits"]["bytes"] < by_name["mixed bits"]["bytes"] < 2 * by_name["3 bits"]["bytes"]
    assert len(report["models"]) == 3
    assert len(report["tuned"]) == 8
    assert any("int4" in note for note in report["notes"])


def test_the_benchmark_script_needs_a_gpu(script, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu"])
    assert script.main() == 2
    said = capfd.readouterr()
    assert "this benchmark needs a GPU" in said.err
    assert said.out == ""
