"""End-to-end tuning: planes stay, precisions are apart, and the held-out divergence never ends higher than it began."""

from __future__ import annotations

import json

import pytest
import torch
from job_helpers import digests, run
from job_process import finish
from tiny_models import tiny_gpt2
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.planes import decode
from bitstrata.quantization.tuning import tune
from bitstrata.solvers import RTN, Tuning

QUICK = {"iterations": 1, "sweeps": 1, "tune_steps": 6, "tune_tokens": 64}
NESTED = {"method": "nested", "options": QUICK}


def layers_of(model, bits):
    return {
        name: RTN().solve_layer(module.weight, bits, 32)
        for name, module in model.named_modules()
        if name.endswith(("_proj",))
    }


@pytest.fixture(scope="module")
def whole(model):
    return AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)


def windows(seed, count=128):
    return torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(seed))


def tuned(whole, bits, seed, steps=8, fixed=None, rate=0.03):
    layers = layers_of(whole, bits)
    generator = torch.Generator().manual_seed(seed)
    return layers, tune(whole, layers, frozenset(), fixed or {}, windows(seed), Tuning(steps, rate, 64), generator)


def test_tuning_helps_and_leaves_planes_alone(whole, seed):
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    layers, refined = tuned(whole, (2, 3), seed, steps=60)
    for first, last in refined.divergence.values():
        assert last < 0.95 * first
    for name, weight in layers.items():
        new = refined.layers[name]
        assert all(torch.equal(a, b) for a, b in zip(weight.planes, new.planes, strict=True))
        assert not torch.equal(weight.scales[2].scale, new.scales[2].scale)
        assert new.scales[2].scale.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def divergence(whole, layers, bits, tokens, fixed=None):
    """Mean KL on the tokens that are held out: the last ones."""
    student = {f"{name}.weight": decode(weight, bits, torch.float32) for name, weight in layers.items()}
    with torch.no_grad():
        target = whole(tokens).logits.log_softmax(-1)
        found = torch.func.functional_call(whole, {**student, **(fixed or {})}, (tokens,)).logits.log_softmax(-1)
    return float((target.exp() * (target - found)).sum(-1).mean())


def test_the_divergence_told_is_that_of_the_weights_as_stored(whole, seed):
    fixed = {"lm_head.weight": (whole.lm_head.weight * 8).round() / 8}
    layers, refined = tuned(whole, (2, 3), seed, fixed=fixed)
    held = windows(seed)[-16:]
    for bits, (first, last) in refined.divergence.items():
        assert first == pytest.approx(divergence(whole, layers, bits, held, fixed), rel=1e-4)
        assert last == pytest.approx(divergence(whole, refined.layers, bits, held, fixed), rel=1e-4)


def test_a_precision_does_not_know_of_the_others(whole, seed):
    """Tuned with others or alone: the same coefficients, bit for bit."""
    _, together = tuned(whole, (2, 4), seed)
    layers = {name: weight.prefix(2) for name, weight in layers_of(whole, (2, 4)).items()}
    generator = torch.Generator().manual_seed(seed)
    alone = tune(whole, layers, frozenset(), {}, windows(seed), Tuning(8, 0.03, 64), generator)
    for name, weight in alone.layers.items():
        assert torch.equal(weight.scales[2].scale, together.layers[name].scales[2].scale)
        assert torch.equal(weight.scales[2].offset, together.layers[name].scales[2].offset)


def test_what_does_not_help_is_not_kept(whole, seed):
    layers, refined = tuned(whole, (4,), seed, rate=50.0)
    assert refined.divergence[4][0] == refined.divergence[4][1]
    for name, weight in layers.items():
        assert torch.equal(weight.scales[4].scale, refined.layers[name].scales[4].scale)


def test_a_job_that_tunes(model, text, tmp_path):
    settings = {"num_samples": 48, "method": "nested", "options": {**QUICK, "tune_steps": 32, "tune_tokens": 128}}
    tuned_report = run(model, tmp_path / "tuned", text, **settings)
    plain = run(model, tmp_path / "plain", text, **{**settings, "options": {**QUICK, "tune_steps": 0}})
    reader, other = CheckpointReader(tmp_path / "tuned"), CheckpointReader(tmp_path / "plain")
    name = "model.layers.1.mlp.up_proj"
    mine, theirs = reader.layer(name), other.layer(name)
    assert all(torch.equal(a, b) for a, b in zip(mine.planes, theirs.planes, strict=True))
    assert not torch.equal(mine.scales[2].scale, theirs.scales[2].scale)
    # the report is that of the tuned model
    found = bitstrata.evaluate(tmp_path / "tuned", text, reference=model, device="cpu")
    assert {row["bits"] for row in tuned_report.results} == {row.bits for row in found.results}
    assert tuned_report.results[0]["kld"] != plain.results[0]["kld"]
    saved = json.loads((tmp_path / "tuned" / "bitstrata_report.json").read_text())
    assert saved["results"] == list(tuned_report.results)


def test_transposed_layers(text, tmp_path):
    folder = tiny_gpt2(tmp_path / "gpt2")
    report = run(folder, tmp_path / "out", text, num_samples=12, **NESTED)
    klds = [row["kld"] for row in report.results]
    assert klds == sorted(klds, reverse=True)


def command(model, output, text):
    options = [part for key, value in QUICK.items() for part in ("--option", f"{key}={value}")]
    return [
        "quantize", str(model), "-o", str(output), "--method", "nested", "--group-size", "32",
        "--calibration", str(text), "--num-samples", "6", "--seq-len", "32", "--bits", "2,3",
        "--device", "cpu", *options,
    ]  # fmt: skip


@pytest.mark.parametrize("file", [pytest.param(5, marks=pytest.mark.slow), 6, pytest.param(7, marks=pytest.mark.slow)])
def test_killed_while_refined_blocks_are_written(file, model, text, tmp_path):
    """Of the files before it are the fingerprint, three blocks, and then the refined ones."""
    log, output = tmp_path / "log", tmp_path / "out"
    assert finish(command(model, tmp_path / "whole", text), log) == 0, log.read_text()
    assert finish(command(model, output, text), log, kill_at=2 * file) != 0
    assert finish(command(model, output, text), log) == 0, log.read_text()
    assert digests(output) == digests(tmp_path / "whole")
