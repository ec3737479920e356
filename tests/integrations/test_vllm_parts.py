"""The parts of the vLLM plugin that need no vLLM: what requests may ask for, rows, joined layers and their cuts."""

from __future__ import annotations

import pytest
import torch

from bitstrata.checkpoint import QuantizationSpec
from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.integrations.vllm.offered import Offered
from bitstrata.integrations.vllm.options import ServeOptions
from bitstrata.integrations.vllm.rows import Rows
from bitstrata.integrations.vllm.stored import Stored
from bitstrata.integrations.vllm.versions import ANY_VERSION, check_version
from bitstrata.integrations.vllm.words import with_hints


def layer(**fields):
    return {"in_features": 256, "out_features": 64, **fields}


def spec_of(**layers) -> QuantizationSpec:
    named = {name.replace("_dot_", "."): one for name, one in layers.items()}
    raw = {"quant_method": "bitstrata", "format_version": 3, "method": "rtn", "bits": [2, 3, 4], "group_size": 64}
    return QuantizationSpec.parse({**raw, "layers": named}, "here")


def joined(spec: QuantizationSpec, *names: str, max_bits: int = 8, planes: int = 8) -> Stored:
    return Stored.of(spec, names, max_bits, planes)


def test_a_request_gets_what_it_asks_for_or_the_default():
    offered = Offered((2, 3, 4), 3)
    assert [offered.of_request(extra) for extra in (None, {}, {"other": 1}, {"bits": 2})] == [3, 3, 3, 2]


@pytest.mark.parametrize("bits", [0, 5, -2, "3", 3.0, True, [2], {}], ids=repr)
def test_other_bits_are_refused_with_those_that_there_are(bits):
    with pytest.raises(UsageError) as refused, with_hints():
        Offered((2, 3, 4), 3).of_request({"bits": bits})
    assert "supported bits: 2, 3, 4" in str(refused.value)


def test_a_default_must_be_offered():
    with pytest.raises(UnsupportedBitsError, match="bits=5"):
        Offered((2, 3), 5)


def test_options_are_read_strictly():
    assert ServeOptions.parse(None) == ServeOptions()
    assert ServeOptions.parse({"bits": 2, "max_bits": 3}).max_bits == 3
    for wrong in ({"bits": "2"}, {"bit": 2}, {"max_bits": 9}, {"bits": True}, [2]):
        with pytest.raises(UsageError, match="bitstrata"):
            ServeOptions.parse(wrong)


def test_unknown_versions_of_vllm_are_refused_unless_wanted(monkeypatch):
    monkeypatch.delenv(ANY_VERSION, raising=False)
    for known in ("0.32.0", "0.33.1", "0.32.0+cpu"):
        check_version(known)
    for unknown in ("0.31.2", "0.34.0", "1.0", "0.3", "dev"):
        with pytest.raises(UsageError, match="not known"):
            check_version(unknown)
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version("0.34.0")


def test_rows_have_the_bits_of_their_requests():
    rows = Rows(default=4)
    assert rows.of(7, object(), [0, 3, 7]) == 4  # nobody told of requests
    rows.requests.update({0: 2, 1: 3})
    step = object()
    mixed = rows.of(7, step, [0, 3, 7])
    assert mixed.tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert mixed.dtype == torch.int8
    assert rows.of(7, step, [0, 3, 7]) is mixed  # of all layers of a step
    assert rows.of(9, step, [0, 3, 7]).tolist() == [2, 2, 2, 3, 3, 3, 3, 4, 4]  # a batch that was filled up
    rows.requests.update({0: 3})
    assert rows.of(2, object(), [0, 1, 2]) == 3
    assert rows.of(5, object(), None) == 4  # warming up


def test_rows_of_an_unknown_part_of_a_step_are_refused():
    rows = Rows(default=4)
    rows.requests.update({0: 2, 1: 3})
    with pytest.raises(UsageError, match="whose they are is not known"):
        rows.of(3, object(), [0, 2, 5])


def test_a_buffer_keeps_its_place_and_is_read_as_it_is():
    rows = Rows(default=4)
    buffer = rows.hold_buffer(8, "cpu")
    seen = rows.of(3, None, None)
    assert seen.tolist() == [4, 4, 4]
    buffer[:3] = torch.tensor([2, 3, 2], dtype=torch.int8)
    assert seen.tolist() == [2, 3, 2]
    assert rows.of(8, None, None).data_ptr() == buffer.data_ptr()


def test_joined_layers_have_the_tensors_of_all():
    spec = spec_of(q=layer(), k=layer(out_features=32))
    stored = joined(spec, "q", "k")
    pieces = stored.pieces(96, 256)
    assert pieces["plane_3"].shape == (96, 8)
    assert pieces["scale_3"].shape == (3, 96, 4)
    assert (pieces["scale_3"].output_dim, pieces["scale_3"].input_dim) == (1, 2)
    assert (pieces["offset_3"].output_dim, pieces["offset_3"].input_dim) == (0, 1)
    few = joined(spec, "q", "k", max_bits=2, planes=2).pieces(96, 256)
    assert sorted(few) == ["offset_2", "plane_0", "plane_1", "scale_2"]


@pytest.mark.parametrize("other", [{"bits": [2, 3, 4, 5]}, {"group_size": 32}, {"decoder": "codebook"}], ids=str)
def test_layers_that_differ_cannot_be_joined(other):
    with pytest.raises(UsageError, match="vLLM joins q, k"):
        joined(spec_of(q=layer(), k=layer(**other)), "q", "k")


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
