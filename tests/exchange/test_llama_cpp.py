"""Exported GGUF files in llama.cpp: its tokens and its logits against ours. With `-s` the divergences are shown."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from known_models import KNOWN, TEXT

import bitstrata
from bitstrata.exchange.ggml import BLOCK_TYPES
from bitstrata.metrics import Tally
from bitstrata.models import load_tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra peers)")
WRITTEN = TEXT + "Zo\u00eb, \u6f22\u5b57 in 1984"  # letters of no piece


def engine(path):
    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)


def divergence(llama, model, tokens, bits):
    """KL divergence of llama.cpp's next tokens from ours, in nats, and how often the first is the same."""
    llama.eval(tokens)
    theirs = torch.from_numpy(llama.scores[: len(tokens)].copy())
    ids = torch.tensor([tokens])
    with torch.no_grad():
        ours = model(input_ids=ids, bits=bits).logits[0]
    tally = Tally()
    tally.add(theirs[:-1], ids[0, 1:], ours[:-1])
    return tally.result()


@pytest.mark.parametrize("name", KNOWN)
def test_every_architecture_computes_the_same(name, known, tmp_path):
    """In fp32, so that what is left is the order of sums, and llama.cpp's fp16 cache."""
    _, out = known(name)
    path = tmp_path / "model.gguf"
    result = bitstrata.export_model(out, path, format="gguf", bits=3, types="F32")
    assert result.exact
    llama, tokenizer = engine(path), load_tokenizer(out)
    tokens = tokenizer(WRITTEN).input_ids
    assert llama.tokenize(WRITTEN.encode(), add_bos=True, special=False) == tokens
    assert len(tokens) > 20
    model = bitstrata.load(out, bits=3, dtype=torch.float32)
    found = divergence(llama, model, tokens, 3)
    sys.stdout.write(f"{name}: kld {found.kld:.2e}, top-1 {found.top1_agreement:.3f}\n")
    assert found.kld < 1e-4
    assert divergence(llama, model, tokens, 2).kld > 100 * found.kld + 1e-3
    assert llama.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert llama.token_eos() == tokenizer.eos_token_id


@pytest.mark.parametrize(("bits", "name"), [(bits, name) for name in ("llama", "llama-wide") for bits in (2, 3, 4)])
def test_every_bits_runs(bits, name, known, tmp_path):
    """llama.cpp rounds activations to 8 bits beside these types, which is most of what is measured here."""
    _, out = known(name)
    llama_kld = {}
    for refit in (False, True):
        path = tmp_path / f"{refit}.gguf"
        result = bitstrata.export_model(out, path, format="gguf", bits=bits, refit=refit)
        model = bitstrata.load(out, bits=bits, dtype=torch.float32)
        found = divergence(engine(path), model, load_tokenizer(out)(TEXT).input_ids, bits)
        llama_kld[refit] = found.kld
        kinds = sorted({one.type for one in result.layers})
        error = result.relative_error
        sys.stdout.write(f"{name} at {bits} bits as {kinds}: error {error:.1e}, kld {found.kld:.2e}\n")
    assert llama_kld[False] < 0.02


@pytest.mark.parametrize(("name", "kind"), [("llama3", "Q4_0"), ("mistral", "Q8_0"), ("gemma2", "Q5_1")])
def test_an_imported_file_computes_what_llama_cpp_does(name, kind, known, tmp_path):
    _, out = known(name)
    path = tmp_path / "m.gguf"
    bitstrata.export_model(out, path, format="gguf", bits=4, types=kind, refit=True)
    bitstrata.import_model(path, tmp_path / "back")
    llama, tokenizer = engine(path), load_tokenizer(tmp_path / "back")
    tokens = tokenizer(WRITTEN).input_ids
    assert llama.tokenize(WRITTEN.encode(), add_bos=True, special=False) == tokens
    model = bitstrata.load(tmp_path / "back", dtype=torch.float32)
    found = divergence(llama, model, tokens, None)
    sys.stdout.write(f"{name} as {kind}: kld {found.kld:.2e}\n")
    assert found.kld < 0.01


FILE_TYPES = {  # of llama.h, which quantize all weights to one type
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "IQ4_NL": 25,
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_fitted_as_well_as_llama_cpp_does_without_a_matrix(name, known, tmp_path):
    _, out = known("llama-wide")
    plain, theirs = tmp_path / "plain.gguf", tmp_path / "theirs.gguf"
    bitstrata.export_model(out, plain, format="gguf", bits=4, types="F32")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = FILE_TYPES[name], True, 1
    assert llama_cpp.llama_model_quantize(bytes(plain), bytes(theirs), ctypes.byref(settings)) == 0
    exact = {one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(plain).tensors}
    sums = torch.zeros(2, dtype=torch.float64)
    for tensor in gguf.GGUFReader(theirs).tensors:
        if tensor.tensor_type.name == name:
            values = exact[tensor.name].view(len(tensor.data), -1)
            ours = BLOCK_TYPES[name].quantize(values).numpy()
            for index, data in enumerate((tensor.data, ours)):
                found = torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type))
                sums[index] += (found - values).double().square().sum()
    assert sums[1] <= 1.05 * sums[0]
