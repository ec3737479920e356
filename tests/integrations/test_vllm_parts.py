"""The parts of the vLLM plugin that need no vLLM: rows, options, joined layers and their cuts."""

from __future__ import annotations

import pytest
import torch

from bitstrata.checkpoint import QuantizationSpec
from bitstrata.errors import PlanError, UsageError
from bitstrata.integrations.vllm.options import ServeOptions, bits_of_linears
from bitstrata.integrations.vllm.rows import Rows
from bitstrata.integrations.vllm.stored import Stored
from bitstrata.integrations.vllm.versions import ANY_VERSION, check_version
from bitstrata.integrations.vllm.waiting import wait_briefly
from bitstrata.plans import Plan
from bitstrata.runtime import Policy


def layer(**fields):
    return {"in_features": 256, "out_features": 64, **fields}


def spec_of(**layers) -> QuantizationSpec:
    named = {name.replace("_dot_", "."): one for name, one in layers.items()}
    raw = {"quant_method": "bitstrata", "format_version": 4, "method": "rtn", "bits": [2, 3, 4], "group_size": 64}
    return QuantizationSpec.parse({**raw, "layers": named}, "here")


def joined(spec: QuantizationSpec, *names: str, needed=(2, 3, 4), loaded=(2, 3, 4)) -> Stored:
    return Stored.of(spec, names, needed, loaded)


def test_options_are_read_strictly():
    assert ServeOptions.parse(None) == ServeOptions()
    assert ServeOptions.parse({"bits": 2, "max_bits": 3}).max_bits == 3
    for wrong in ({"bits": "2"}, {"bit": 2}, {"max_bits": 9}, {"bits": True}, [2]):
        with pytest.raises(UsageError, match="bitstrata"):
            ServeOptions.parse(wrong)


@pytest.fixture
def plan(tmp_path):
    """A plan of `up` and `down`."""
    path = tmp_path / "plan.json"
    Plan({"up": 2, "down": 4}).save(path)
    return str(path)


def test_a_server_offers_the_bits_below_its_limit_and_its_plans(plan):
    spec = spec_of(up=layer(), down=layer(bits=[2, 3, 4, 5]))
    options = ServeOptions.parse({"max_bits": 3, "plans": {"small": plan}, "bits": "small"})
    offered = options.offer(spec)
    assert (offered.choices, offered.default) == ((2, 3, "small"), "small")
    assert bits_of_linears(spec, offered) == {"up": (2, 3, 2), "down": (2, 3, 4)}
    assert ServeOptions().offer(spec).default == 4


def test_plans_that_do_not_fit_are_refused(plan, tmp_path):
    with pytest.raises(PlanError, match="names layer down"):
        ServeOptions(plans={"small": plan}).offer(spec_of(up=layer()))
    with pytest.raises(PlanError, match="there is no plan"):
        ServeOptions(plans={"small": str(tmp_path / "none.json")}).offer(spec_of(up=layer()))
    with pytest.raises(UsageError, match="a plan cannot be called '3'"):
        ServeOptions(plans={"3": plan}).offer(spec_of(up=layer(), down=layer()))
    with pytest.raises(UsageError, match="there is no plan 'large'"):
        ServeOptions(plans={"small": plan}, bits="large").offer(spec_of(up=layer(), down=layer()))


def test_a_plan_gives_each_expert_its_bits(tmp_path):
    spec, path = spec_of(all_dot_up=layer(experts=2)), tmp_path / "plan.json"
    Plan({"all.0.up": 2, "all.1.up": 3}).save(path)
    bits = bits_of_linears(spec, ServeOptions(plans={"a": str(path)}).offer(spec))
    assert bits == {"all.0.up": (2, 3, 4, 2), "all.1.up": (2, 3, 4, 3)}


def test_policies_that_change_running_requests_are_refused():
    assert str(ServeOptions(policy="load:target_ms=50").make_policy()).startswith("load:target_ms=50")
    assert type(ServeOptions().make_policy()) is Policy
    for policy in ("position", "entropy:hold=2"):
        with pytest.raises(UsageError, match="while it runs"):
            ServeOptions(policy=policy).make_policy()
    with pytest.raises(UsageError, match="not known"):
        ServeOptions(policy="lod").make_policy()


def test_unknown_versions_of_vllm_are_refused_unless_wanted(monkeypatch):
    monkeypatch.delenv(ANY_VERSION, raising=False)
    for known in ("0.32.0", "0.33.1", "0.32.0+cpu"):
        check_version(known)
    for unknown in ("0.31.2", "0.34.0", "1.0", "0.3", "dev"):
        with pytest.raises(UsageError, match="not known"):
            check_version(unknown)
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version("0.34.0")


def rows_of_plans(default: int = 2) -> Rows:
    """Choices 0 to 2 are 2, 3 and 4 bits, choice 3 is a plan."""
    return Rows({"up": (2, 3, 4, 3), "down": (2, 3, 4, 2), "q": (2, 3, 4, 3)}, 4, default)


def test_rows_have_the_bits_of_their_requests():
    rows = Rows({"up": (2, 3, 4)}, 3, default=2)
    up = rows.of_layer("up")
    assert up.of(7, object(), [0, 3, 7]) == 4  # nobody told of requests
    rows.requests.update({0: 0, 1: 1})
    step = object()
    mixed = up.of(7, step, [0, 3, 7])
    assert mixed.tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert mixed.dtype == torch.int8
    assert up.of(7, step, [0, 3, 7]) is mixed  # of all layers of a step
    assert up.of(9, step, [0, 3, 7]).tolist() == [2, 2, 2, 3, 3, 3, 3, 4, 4]  # a batch that was filled up
    rows.requests.update({0: 1})
    assert up.of(2, object(), [0, 1, 2]) == 3
    assert up.of(5, object(), None) == 4  # warming up


def test_a_plan_gives_rows_of_one_request_other_bits_in_other_layers():
    rows = rows_of_plans()
    rows.requests.update({0: 3, 1: 1, 2: 0})
    step, starts = object(), [0, 2, 3, 5]
    assert rows.of_layer("up").of(5, step, starts).tolist() == [3, 3, 3, 2, 2]
    assert rows.of_layer("down").of(5, step, starts).tolist() == [2, 2, 3, 2, 2]
    assert rows.of_choices().of(5, step, starts).tolist() == [3, 3, 1, 0, 0]
    assert rows.of_layer("q").of(5, step, starts) is rows.of_layer("up").of(5, step, starts)
    assert rows.of_layer("down").of(6, step, starts).tolist() == [2, 2, 3, 2, 2, 4]
    assert rows.of_layer("q") == rows.of_layer("up") != rows.of_layer("down")
    rows.requests.update({1: 3, 2: 3})
    assert [rows.of_layer(name).of(5, object(), starts) for name in ("up", "down")] == [3, 2]
    rows.requests.update({0: 1, 1: 1})
    assert rows.of_layer("up").of(5, object(), starts) == 3  # two choices, and equal bits in this layer


def test_rows_of_an_unknown_part_of_a_step_are_refused():
    rows = Rows({"up": (2, 3)}, 2, default=1)
    rows.requests.update({0: 0, 1: 1})
    with pytest.raises(UsageError, match="whose they are is not known"):
        rows.of_layer("up").of(3, object(), [0, 2, 5])


def test_a_buffer_keeps_its_place_and_is_read_as_it_is():
    rows = rows_of_plans(default=3)
    buffer = rows.hold_buffer(8, "cpu")
    up, down = rows.of_layer("up"), rows.of_layer("down")
    seen = up.of(3, None, None)
    assert (seen.tolist(), down.of(2, None, None).tolist()) == ([3, 3, 3], [2, 2])
    buffer[up.table, :3] = torch.tensor([2, 3, 2], dtype=torch.int8)
    assert seen.tolist() == [2, 3, 2]
    assert down.of(3, None, None).tolist() == [2, 2, 2]
    assert up.of(8, None, None).data_ptr() == buffer[up.table].data_ptr()


def test_joined_layers_have_the_tensors_of_all():
    spec = spec_of(q=layer(), k=layer(out_features=32))
    stored = joined(spec, "q", "k")
    pieces = stored.pieces(96, 256)
    assert pieces["plane_3"].shape == (96, 8)
    assert pieces["scale_3"].shape == (3, 96, 4)
    assert (pieces["scale_3"].output_dim, pieces["scale_3"].input_dim) == (1, 2)
    assert (pieces["offset_3"].output_dim, pieces["offset_3"].input_dim) == (0, 1)
    few = joined(spec, "q", "k", needed=[2], loaded=[2])
    assert sorted(few.pieces(96, 256)) == ["offset_2", "plane_0", "plane_1", "scale_2"]
    assert few.dropped == ()


def test_what_other_layers_need_is_dropped():
    stored = joined(spec_of(down=layer()), "down", needed=[2], loaded=[2, 4])
    assert sorted(stored.pieces(64, 256)) == ["offset_2", "plane_0", "plane_1", "scale_2"]
    assert stored.dropped == ("offset_4", "plane_2", "plane_3", "scale_4")
    assert joined(spec_of(up=layer(), head=layer(role="head", bits=[6])), "head", needed=[], loaded=[2]).bits == (6,)


@pytest.mark.parametrize("other", [{"bits": [2, 3, 4, 5]}, {"group_size": 32}, {"decoder": "codebook"}], ids=str)
def test_layers_that_differ_cannot_be_joined(other):
    with pytest.raises(UsageError, match="vLLM joins q, k"):
        joined(spec_of(q=layer(), k=layer(**other)), "q", "k", loaded=[2, 3, 4, 5])


def test_cuts_fall_between_groups_and_words():
    stored = joined(spec_of(down=layer()), "down")
    stored.check_cut(256, 1)
    stored.check_cut(128, 2)
    assert stored.pieces(64, 128)["scale_2"].shape == (2, 64, 2)
    with pytest.raises(UsageError, match=r"down: .*no whole groups of 64 columns"):
        stored.check_cut(32, 8)
    with pytest.raises(UsageError, match="no whole words of 32 columns"):
        joined(spec_of(down=layer(decoder="codebook")), "down").check_cut(16, 16)


@pytest.mark.parametrize("kind", ["affine", "affine8", "codebook"])
def test_scales_of_whole_rows_are_not_cut(kind):
    stored = joined(spec_of(down=layer(group_size=256, decoder=kind)), "down")
    stored.check_cut(128, 2)
    cut = {name: piece.input_dim for name, piece in stored.pieces(64, 128).items()}
    assert {name for name, dim in cut.items() if dim is not None} == {f"plane_{i}" for i in range(4)}


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}], ids=str)
def test_threads_of_torch_wait_briefly_unless_somebody_has_said_how(said):
    environment = dict(said)
    wait_briefly(environment)
    assert environment == (said or {"GOMP_SPINCOUNT": "10000"})
