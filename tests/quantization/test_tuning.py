"""End-to-end tuning: planes stay, precisions are apart, and the held-out divergence never ends higher than it began."""

from __future__ import annotations

import json

import pytest
import torch
from job_helpers import digests, run
from job_process import finish
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.calibration import BlockRunner, open_blockwise
from bitstrata.checkpoint import CheckpointReader
from bitstrata.models import SourceModel, discover
from bitstrata.planes import PlaneWeight, decode
from bitstrata.planes.decode import signs
from bitstrata.quantization import tuning
from bitstrata.quantization.tuning import Lesson, tune
from bitstrata.solvers import RTN, Tuning
from bitstrata.solvers.grouping import Grouping

QUICK = {"iterations": 1, "sweeps": 1, "tune_steps": 6, "tune_tokens": 64}
NESTED = {"method": "nested", "options": QUICK}
BITS = (2, 3, 4)


class Original:
    """A model, its layers as round-to-nearest makes them, and 128 windows with the hidden states it ends in."""

    def __init__(self, folder, seed, seq_len=16, group_size=32):
        self.source = SourceModel(folder)
        self.model = self.source.skeleton()
        self.discovery = discover(self.model)
        self.runner = BlockRunner(self.source, self.model, self.discovery, seq_len, torch.device("cpu"))
        self.transposed = frozenset(one.name for one in self.discovery.linears if one.transposed)
        vocabulary, draw = self.model.config.vocab_size, torch.Generator().manual_seed(seed)
        self.windows = torch.randint(0, vocabulary, (128, seq_len), generator=draw)
        hidden, self.blocks = self.runner.embed(self.windows), []
        for index, name in enumerate(self.discovery.blocks):
            with self.runner.block(index) as block:
                found = {}
                for one in self.discovery.of_block(index):
                    weight = block.get_submodule(one.name.removeprefix(f"{name}.")).weight
                    found[one.name] = RTN().solve_layer(weight.T if one.transposed else weight, BITS, group_size)
                self.blocks.append(found)
                hidden = self.runner.run(index, block, hidden)
        self.targets = hidden

    @property
    def layers(self):
        return {name: weight for block in self.blocks for name, weight in block.items()}

    def lesson(self, replaced=None):
        return Lesson(self.windows, lambda rows: self.targets[rows], replaced or {})

    def blockwise(self, products=torch.float32):
        names = {f"{name}.weight" for name in self.layers}
        return open_blockwise(self.runner, names, self.windows, products)

    def tuned(self, bits, seed, steps=8, rate=0.03, products=torch.float32, replaced=None, blocks=None, **more):
        generator, options = torch.Generator().manual_seed(seed), Tuning(steps, rate, 64)
        with self.blockwise(products) as blockwise:
            return tune(
                blockwise,
                blocks or self.blocks,
                bits,
                self.lesson(replaced),
                options,
                generator,
                self.transposed,
                **more,
            )


@pytest.fixture(scope="module")
def llama(model):
    return Original(model, 0)


def with_scales(layers, bits, scales):
    return {
        name: PlaneWeight(weight.planes, {bits: scales[name]}, weight.in_features, weight.group_size)
        for name, weight in layers.items()
    }


def test_tuning_helps(llama, seed):
    for bits in (2, 3):
        found = llama.tuned(bits, seed, steps=30)
        assert found.after < 0.95 * found.before
        assert found.scales.keys() == llama.layers.keys()
        for name, weight in llama.layers.items():
            assert not torch.equal(weight.scales[bits].scale, found.scales[name].scale)
            assert found.scales[name].scale.dtype == torch.float16


def divergence(folder, layers, bits, tokens, replaced=None):
    """Mean KL on these tokens, the whole model in memory."""
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    student = {f"{name}.weight": decode(weight, bits, torch.float32) for name, weight in layers.items()}
    with torch.no_grad():
        target = whole(tokens).logits.log_softmax(-1)
        found = functional_call(whole, {**student, **(replaced or {})}, (tokens,)).logits.log_softmax(-1)
    return float((target.exp() * (target - found)).sum(-1).mean())


@pytest.mark.parametrize("logits", [1 << 25, 64 * 24], ids=["together", "in-stretches"])
def test_the_divergence_told_is_that_of_the_weights_as_stored(logits, llama, model, seed, monkeypatch):
    monkeypatch.setattr(tuning, "LOGITS", logits)
    head = AutoModelForCausalLM.from_pretrained(model).lm_head.weight
    replaced = {"lm_head.weight": (head.detach() * 8).round() / 8}
    held = llama.windows[-16:]
    found = llama.tuned(2, seed, replaced=replaced)
    assert found.before == pytest.approx(divergence(model, llama.layers, 2, held, replaced), rel=1e-4)
    after = divergence(model, with_scales(llama.layers, 2, found.scales), 2, held, replaced)
    assert found.after == pytest.approx(after, rel=1e-4)


def derivatives(original, folder, bits, rows):
    """Of the loss by all coefficients, in units of their layers' last scales: autograd, the whole model in float64."""
    source = SourceModel(folder)
    model = source.skeleton()
    source.materialise(model, "")
    model.tie_weights()
    model = model.double()
    leaves, weights = {}, {}
    for name, weight in original.layers.items():
        grouping = Grouping(weight.out_features, weight.in_features, weight.group_size)
        scales = weight.scales[bits].affine()
        start = torch.cat([scales.scale.reshape(bits, -1), scales.offset.reshape(1, -1)]).double()
        leaves[name] = start.requires_grad_(), start[-2].detach().square().mean().sqrt()
        planes = torch.stack([grouping.split(signs(weight, plane, torch.float64)) for plane in range(bits)])
        found = grouping.join(start[-1].unsqueeze(1) + (start[:-1].unsqueeze(2) * planes).sum(0))
        weights[f"{name}.weight"] = found.T if name in original.transposed else found
    tokens = original.windows[rows]
    with torch.no_grad():
        target = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    arguments = {"input_ids": tokens, "use_cache": False}
    found = functional_call(model, weights, (), arguments, tie_weights=False).logits.log_softmax(-1)
    ((target.exp() * (target - found)).sum() / tokens.numel()).backward()
    return {name: unit * leaf.grad if leaf.grad is not None else None for name, (leaf, unit) in leaves.items()}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("size", [32, 24])
def test_a_step_follows_the_derivatives_of_the_whole_model(build, size, tmp_path, seed):
    """A group size that does not divide the columns; experts that no token reaches; W^T."""
    original = Original(build(tmp_path / "model"), seed, group_size=size)
    rows = torch.tensor([3, 5])
    expected = derivatives(original, tmp_path / "model", 3, rows)
    with original.blockwise() as blockwise:
        tuner = tuning._Tuner(
            blockwise, original.blocks, 3, original.lesson(), Tuning(100, 0.03, 32), original.transposed
        )
        tuner.step(rows)
    for block, optimizer in zip(tuner.blocks, tuner.optimizers, strict=True):
        for name, layer in block.items():
            if expected[name] is None:
                assert layer.change not in optimizer.state, name
                assert not layer.change.any(), name
                continue
            found = optimizer.state[layer.change]["exp_avg"].double() * 10  # 1 - beta of the derivative
            error = (found - expected[name]).norm() / expected[name].norm().clamp_min(1e-9)
            assert error < 1e-4, (name, float(error))
            assert layer.change.any(), name


def test_fast_products_end_where_exact_ones_do(llama, seed):
    exact = llama.tuned(2, seed, steps=24)
    fast = llama.tuned(2, seed, steps=24, products=torch.bfloat16)
    assert fast.before == exact.before  # measured in fp32 both
    assert fast.after != exact.after
    assert fast.after - exact.after < 0.1 * (exact.before - exact.after)


def test_a_precision_does_not_know_of_the_others(llama, seed):
    """Tuned with others at hand or alone: the same coefficients, bit for bit."""
    among = llama.tuned(2, seed)
    blocks = [{name: weight.prefix(2) for name, weight in block.items()} for block in llama.blocks]
    alone = llama.tuned(2, seed, blocks=blocks)
    for name, scales in alone.scales.items():
        assert torch.equal(scales.scale, among.scales[name].scale)
        assert torch.equal(scales.offset, among.scales[name].offset)


def test_what_does_not_help_is_not_kept(llama, seed):
    found = llama.tuned(4, seed, rate=50.0)
    assert found.before == found.after
    for name, weight in llama.layers.items():
        assert torch.equal(weight.scales[4].scale, found.scales[name].scale)


@pytest.mark.parametrize("steps", [1, 5, 8], ids=["after-one", "after-five", "after-all"])
def test_a_tuning_that_was_saved_goes_on_to_the_same_bits(steps, llama, seed, monkeypatch):
    monkeypatch.setattr(tuning, "SAVE_SECONDS", -1.0)
    states, told = [], []
    whole = llama.tuned(
        3, seed, save=lambda state: states.append({name: value.clone() for name, value in state.items()})
    )
    assert len(states) == 8
    again = llama.tuned(3, seed, saved=states[steps - 1], step_done=told.append)
    assert told == [True] * steps + [False] * (8 - steps)
    assert (again.before, again.after) == (whole.before, whole.after)
    for name, scales in whole.scales.items():
        assert torch.equal(scales.scale, again.scales[name].scale)
        assert torch.equal(scales.offset, again.scales[name].offset)


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


@pytest.mark.parametrize("file", [pytest.param(7, marks=pytest.mark.slow), 8, pytest.param(9, marks=pytest.mark.slow)])
def test_killed_while_refined_blocks_are_written(file, model, text, tmp_path):
    """The files: the fingerprint, three blocks, two tuned precisions, and then the refined blocks."""
    log, output = tmp_path / "log", tmp_path / "out"
    assert finish(command(model, tmp_path / "whole", text), log) == 0, log.read_text()
    assert finish(command(model, output, text), log, kill_at=2 * file) != 0
    assert finish(command(model, output, text), log) == 0, log.read_text()
    assert digests(output) == digests(tmp_path / "whole")


@pytest.mark.parametrize("file", [7, pytest.param(10, marks=pytest.mark.slow), 13])
def test_killed_while_scales_are_tuned(file, model, text, tmp_path):
    """Saved at every step. The files: the fingerprint, three blocks, of each precision five states and the result."""
    log, output = tmp_path / "log", tmp_path / "out"
    assert finish(command(model, tmp_path / "whole", text), log) == 0, log.read_text()
    assert finish(command(model, output, text), log, kill_at=2 * file, constants={"tuning.SAVE_SECONDS": -1}) != 0
    assert (output / ".job" / "tuning-2.safetensors").exists()
    log.unlink()
    assert finish(command(model, output, text), log) == 0, log.read_text()
    assert digests(output) == digests(tmp_path / "whole")
