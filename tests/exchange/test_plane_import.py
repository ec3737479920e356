"""AnyBCQ, Any-Precision LLM and BPDQ into planes, from words that are packed here column by column."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from foreign import LAYERS
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import ModelError
from bitstrata.planes import decode

SIZE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", hidden_size=160, intermediate_size=96, head_dim=16)


def words_by_columns(bits):
    """Bits [P, N, K] -> int32 [K / 32, P, N], a column a bit."""
    P, N, K = bits.shape
    words = np.zeros((K // 32, P, N), dtype=np.uint32)
    for column in range(K):
        words[column // 32] |= bits[:, :, column].astype(np.uint32) << np.uint32(column % 32)
    return torch.from_numpy(words.view(np.int32))


def words_of_threads(bits):
    """Bits [P, N, K] -> int32 [P, N, K / 32]: byte by byte to where a thread of a warp reads it."""
    P, N, K = bits.shape
    octets = np.packbits(bits, axis=2)  # the first column is the highest bit
    stored = np.zeros_like(octets)
    for byte in range(K // 8):
        start = byte // 128 * 128
        threads = min(128, K // 8 - start) // 4
        thread, turn = (byte - start) % threads, (byte - start) // threads
        stored[:, :, start + 4 * thread + 3 - turn] = octets[:, :, byte]
    return torch.from_numpy(stored.reshape(P, N, -1, 4).copy().view(np.int32)[..., 0])


def made(kind, N, K, seed):
    """The tensors of a layer, and what it means at each bits: float64 [N, K]."""
    draw = np.random.default_rng(seed)
    P, J = 4, K // SIZE
    bits = draw.integers(0, 2, (P, N, K)).astype(np.uint8)
    columns = np.arange(K) // SIZE
    means, tensors = {}, {}
    if kind == "anyprec":
        tensors["qweight"] = words_of_threads(bits)
        for b in (3, 4):
            table = draw.normal(size=(N, 2**b)).astype(np.float16)
            code = sum(bits[plane].astype(int) << (b - 1 - plane) for plane in range(b))
            tensors[f"lut{b}"], means[b] = torch.from_numpy(table), np.take_along_axis(table.astype(float), code, 1)
        return tensors, means
    words = words_by_columns(bits)
    if kind == "bpdq":
        c = (draw.uniform(0.2, 1, (J, P + 1, N)) * draw.choice([-1, 1], (J, P + 1, N))).astype(np.float16)
        value = c[columns, P].T.astype(float)
        for plane in range(P):
            value = value + bits[plane] * c[columns, plane].T.astype(float)
        return {"B": words, "c": torch.from_numpy(c)}, {5: value}
    tensors |= {"qweight": words, "q_bias": torch.full((J, N), float("nan")).half()}
    for b in (2, 3, 4):
        alpha, beta = draw.normal(size=(J, b, N)).astype(np.float16), draw.normal(size=(J, N)).astype(np.float16)
        value = beta[columns].T.astype(float)
        for plane in range(b):
            value = value + (2.0 * bits[plane] - 1) * alpha[columns, plane].T.astype(float)
        tensors[f"alpha_{b}"], tensors[f"beta_{b}"], means[b] = torch.from_numpy(alpha), torch.from_numpy(beta), value
    return tensors, means


def write(source, folder, kind):
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    means = {}
    for seed, name in enumerate(f"model.layers.{block}.{layer}" for block in range(2) for layer in LAYERS):
        N, K = state.pop(f"{name}.weight").shape
        tensors, means[name] = made(kind, N, K, seed)
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    precisions = {"seed_precision": 3 if kind == "anyprec" else 2, "parent_precision": 4, "arch_config": {}}
    if kind == "bpdq":
        config["quantization_config"] = {"quant_method": "bpdq", "bits": 8, "group_size": SIZE, "desc_act": False}
    else:
        config[kind] = precisions | ({"group_size": SIZE} if kind == "anybcq" else {})
    (folder / "config.json").write_text(json.dumps(config))
    return means


@pytest.mark.parametrize(
    ("kind", "bits"), [("anybcq", (2, 3, 4)), ("anyprec", (3, 4)), ("bpdq", (4, 5))], ids=["anybcq", "anyprec", "bpdq"]
)
def test_every_precision_is_the_same_numbers(kind, bits, source, tmp_path):
    means = write(source, tmp_path / "theirs", kind)
    result = bitstrata.import_model(tmp_path / "theirs", tmp_path / "ours")
    assert result.exact
    assert result.bits == bits
    assert validate(tmp_path / "ours") == []
    reader = CheckpointReader(tmp_path / "ours")
    assert set(reader.spec.layers) == set(means)
    for name, at in means.items():
        for b, value in at.items():
            assert np.array_equal(decode(reader.layer(name), b, torch.float64).numpy(), value), (name, b)
    model = bitstrata.load(tmp_path / "ours")
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        found = [model(input_ids=ids, bits=b).logits for b in bits]
    assert all(bool(logits.isfinite().all()) for logits in found)
    if kind == "bpdq":
        again = bitstrata.import_model(tmp_path / "theirs", tmp_path / "rounded", refit=True)
        assert again.bits == (4,)
        assert 0 < again.relative_error < 2.0**-10


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("anybcq", {"seed_precision": 1}, "alpha_1"),
        ("anybcq", {"group_size": 64}, "not as its config says"),
        ("anybcq", {"parent_precision": 9}, "no precisions 2 to 9"),
        ("anybcq", {"chunk": 3}, "anybcq.chunk is not known here"),
        ("anyprec", {"parent_precision": 5}, "lut5"),
        ("bpdq", {"group_size": 64}, "does not fit planes"),
        ("bpdq", {"desc_act": True}, "desc_act"),
    ],
)
def test_what_does_not_fit_is_named(kind, change, said, source, tmp_path):
    write(source, tmp_path / "theirs", kind)
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config" if kind == "bpdq" else kind] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        bitstrata.import_model(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
