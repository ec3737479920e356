"""What layers cost: the numbers, predictions, resuming, and files that do not match."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.allocation import (
    SENSITIVITY_FILE,
    MeasurementSettings,
    Objective,
    Sensitivity,
    measure_sensitivity,
    page_order,
)
from bitstrata.allocation.layer_loss import layer_losses
from bitstrata.calibration import calibration_windows, read_text
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckError, PlanError
from bitstrata.metrics import Tally
from bitstrata.nn import PlaneLinear, use_bits
from bitstrata.planes import decode
from bitstrata.plans import ModelSizes

SETTINGS = MeasurementSettings(measure="kld", text="text.txt", text_sha256="0", windows=4, seq_len=32, seed=0)


@pytest.fixture(scope="module")
def windows(text):
    cut = calibration_windows(tiny_tokenizer(), read_text(text), num_samples=4, seq_len=32, num_heldout=4, seed=0)
    return cut.calibration


@pytest.fixture(scope="module")
def model(pristine):
    return bitstrata.load(pristine, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(original):
    return AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)


@pytest.fixture(scope="module")
def reader(pristine):
    return CheckpointReader(pristine)


@pytest.fixture(scope="module")
def objective(model, windows, reference):
    return Objective(model, windows, reference)


def measure(objective, reader, windows, path, settings=SETTINGS):
    return measure_sensitivity(objective, reader, settings, path, windows)


@pytest.fixture(scope="module")
def found(objective, reader, windows, tmp_path_factory):
    return measure(objective, reader, windows, tmp_path_factory.mktemp("found") / "s.json")


def direct_loss(model, reference, windows, plan):
    tally = Tally()
    with torch.no_grad(), use_bits(model, plan):
        for ids in windows.split(1):
            tally.add(model(ids).logits[0, :-1], ids[0, 1:], reference(ids).logits[0, :-1])
    return tally.result().kld


def test_losses_are_those_of_the_model_with_one_layer_lowered(model, reference, windows, found, reader):
    layers = reader.spec.planned_layers
    base = dict.fromkeys(layers, 4)
    assert found.base_bits == 4
    assert found.base_loss == pytest.approx(direct_loss(model, reference, windows, 4), rel=1e-3)
    for layer, bits in [(layers[0], 2), (layers[5], 3), (layers[-1], 2)]:
        expected = direct_loss(model, reference, windows, {**base, layer: bits})
        assert found.base_loss + found.losses[layer][bits] == pytest.approx(expected, rel=1e-3)
    assert found.uniform == pytest.approx(
        {bits: direct_loss(model, reference, windows, bits) for bits in (2, 3, 4)}, rel=1e-3
    )


def test_without_a_reference_losses_are_to_the_highest_bits(model, windows):
    objective = Objective(model, windows)
    assert objective.loss(4) == pytest.approx(0, abs=1e-6)
    assert objective.loss(2) > objective.loss(3) > 0


def test_targets_that_are_not_kept_give_the_same_losses(model, windows, reference, monkeypatch):
    monkeypatch.setattr("bitstrata.allocation.objective.KEPT_BYTES", 0)
    for target in (None, reference):
        assert Objective(model, windows, target).loss(3) == pytest.approx(
            direct_loss(model, target or model_at(model, 4), windows, 3), rel=1e-3
        )


def test_a_loss_that_is_no_number_is_an_error(model, windows):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(CheckError, match="the loss of 3 is nan"):
        Objective(broken, windows).loss(3)


def model_at(model, bits):
    return lambda ids: model(ids, bits=bits)


def test_the_square_predicts_small_changes(found, objective, reader):
    """Lengths of sketches are the losses; those of sums, losses of several layers, better than sums of losses are."""
    layers = reader.spec.planned_layers
    generator = np.random.default_rng(0)
    square, added = [], []
    for _ in range(12):
        plan = {layer: int(generator.choice([3, 4])) for layer in layers}
        true = objective.loss(plan)
        constant, linear, products = found.quadratic
        at = np.array([plan[layer] == bits for layer, bits in found.rows])
        square.append(np.log((constant + linear[at].sum() + products[np.ix_(at, at)].sum()) / true))
        added.append(np.log((found.base_loss + sum(found.losses[layer][b] for layer, b in plan.items())) / true))
    assert np.abs(square).max() < 0.25
    assert np.std(square) <= np.std(added) + 0.02


def test_the_square_is_that_of_the_sum(found):
    """Every plan's loss is |base + its rows' changes|^2, the terms of two rows included."""
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(len(found.rows) + 1, 5))  # the base comes last
    constant, linear, products = replace(found, products=vectors @ vectors.T).quadratic
    for _ in range(5):
        chosen = generator.random(len(found.rows)) < 0.3
        expected = np.square(vectors[-1] + vectors[:-1][chosen].sum(axis=0)).sum()
        assert constant + linear[chosen].sum() + products[np.ix_(chosen, chosen)].sum() == pytest.approx(expected)


def test_uniform_plans_are_predicted_as_measured(found, reader):
    for bits, loss in found.uniform.items():
        assert found.predict(dict.fromkeys(reader.spec.planned_layers, bits)) == pytest.approx(loss, rel=1e-4)


def test_predictions_rise_with_the_square(found):
    raw = np.geomspace(1e-6, 1e3, 50)
    corrected = [found.corrected(value) for value in raw]
    assert corrected == sorted(corrected)


def test_a_file_survives_saving(found, reader, tmp_path):
    found.save(tmp_path / "s.json")
    again = Sensitivity.load(tmp_path / "s.json", reader, SETTINGS)
    assert (again.losses, again.uniform, again.settings) == (found.losses, found.uniform, found.settings)
    assert np.array_equal(again.products, found.products)


class Stopping:
    """An objective that is interrupted at its n-th measurement."""

    def __init__(self, objective, after):
        self.objective, self.left, self.highest = objective, after, objective.highest
        self.model = objective.model

    def measure(self, plan):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.objective.measure(plan)


def test_a_measurement_goes_on_where_it_was_stopped(found, objective, reader, windows, tmp_path):
    path = tmp_path / "s.json"
    part = tmp_path / "s.json.part"
    done = 0
    for after in (0, 1, 5, 3):
        with pytest.raises(KeyboardInterrupt):
            measure(Stopping(objective, after), reader, windows, path)
        done += after
        assert len(part.read_bytes().splitlines()) == 1 + done
        with open(part, "ab") as file:  # a kill in the middle of a line
            file.write(b'{"layer": "model.layers.0.self_attn.q')
    total = 3 + 2 * len(reader.spec.planned_layers)
    result = measure(Stopping(objective, total - done), reader, windows, path)
    assert result.losses == found.losses
    assert np.allclose(result.products, found.products)
    assert not part.exists()
    assert Sensitivity.load(path, reader).losses == found.losses


@pytest.mark.parametrize("lines", [1, 3])
def test_a_line_that_lost_only_its_end_costs_one_measurement(lines, objective, reader, windows, tmp_path):
    path, part = tmp_path / "s.json", tmp_path / "s.json.part"
    with pytest.raises(KeyboardInterrupt):
        measure(Stopping(objective, lines - 1), reader, windows, path)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(KeyboardInterrupt):
        measure(Stopping(objective, 4), reader, windows, path)
    kept = [json.loads(line) for line in part.read_bytes().splitlines()]
    assert len(kept) == 1 + max(0, lines - 2) + 4
    with pytest.raises(KeyboardInterrupt):  # and what follows goes on from there
        measure(Stopping(objective, 0), reader, windows, path)
    assert [json.loads(line) for line in part.read_bytes().splitlines()] == kept


def test_a_measurement_under_other_settings_does_not_go_on(objective, reader, windows, tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(KeyboardInterrupt):
        measure(Stopping(objective, 2), reader, windows, path)
    other = SETTINGS.model_copy(update={"seed": 5})
    with pytest.raises(PlanError, match="seed 0, now 5"):
        measure(objective, reader, windows, path, other)
    (tmp_path / "s.json.part").write_bytes(b"[]\n")
    with pytest.raises(PlanError, match="unfinished measurement"):
        measure(objective, reader, windows, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_sha256": "1"}, "another text: text.txt"),
        ({"seed": 1}, "another seed: 0, not 1"),
        ({"windows_sha256": "2"}, "another way to cut the text into windows"),
        ({"windows": 5}, "another windows"),
        ({"measure": "hessian"}, "another measure: kld, not hessian"),
        ({"reference_sha256": "f", "reference": "big"}, "another reference: None, not big"),
    ],
)
def test_a_file_with_other_settings_is_refused_by_name(found, reader, tmp_path, change, named):
    found.save(tmp_path / "s.json")
    with pytest.raises(PlanError, match=named) as caught:
        Sensitivity.load(tmp_path / "s.json", reader, SETTINGS.model_copy(update=change))
    assert "--sensitivity" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw["losses"].popitem(), "do not cover"),
        (lambda raw: raw["uniform"].pop("3"), "do not cover"),
        (lambda raw: next(iter(raw["losses"].values())).update(x=1.0), "whole numbers"),
        (lambda raw: raw.update(products="%"), "products"),
        (lambda raw: raw.update(products=raw["products"][:32]), "finite rows"),
        (lambda raw: raw.update(base_loss="low"), "base_loss"),
        (lambda raw: raw.pop("settings"), "settings"),
        (lambda raw: raw.update(version=7), "version 7"),
        (lambda raw: raw["model"].update(layout="0"), "another model"),
    ],
)
def test_a_malformed_file_is_refused_by_name(found, reader, tmp_path, change, named):
    path = tmp_path / SENSITIVITY_FILE
    found.save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=named):
        Sensitivity.load(path, reader)


def test_layer_losses_are_the_hessians(model, windows):
    found = layer_losses(model, windows)
    layer = next(m for m in model.modules() if isinstance(m, PlaneLinear) and m.name.endswith("down_proj"))
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad(), use_bits(model, 4):
        model(windows)
    handle.remove()
    x = seen[0].flatten(0, 1).double()
    H = x.T @ x / len(x)
    W = {bits: decode(layer.plane_weight(), bits).double() for bits in (2, 3, 4)}
    for bits in (2, 3):
        change = W[bits] - W[4]
        expected = torch.trace(change @ H @ change.T) / torch.trace(W[4] @ H @ W[4].T)
        assert found[layer.name][bits] == pytest.approx(float(expected), rel=1e-3)
    assert found[layer.name][4] == 0


def test_the_cheap_measure_gives_plans_too(objective, reader, windows, tmp_path):
    settings = SETTINGS.model_copy(update={"measure": "hessian"})
    found = measure(objective, reader, windows, tmp_path / "s.json", settings)
    again = Sensitivity.load(tmp_path / "s.json", reader, settings)
    assert again.products is None
    assert again.losses == found.losses
    for bits, loss in found.uniform.items():
        assert found.predict(dict.fromkeys(reader.spec.planned_layers, bits)) == pytest.approx(loss, rel=1e-4)


def test_the_order_of_pages_leads_from_the_smallest_plan_to_the_largest(found, reader):
    sizes = ModelSizes.of(reader)
    for together in (False, True):
        order = page_order(found, reader, sizes, together=together)
        order.check(reader, sizes)
        assert sum(page.saving for page in order.pages) == pytest.approx(
            found.predict(sizes.smallest) - found.predict(sizes.largest)
        )
        assert {len(page.layers) for page in order.pages} == ({1, 2, 3} if together else {1})
